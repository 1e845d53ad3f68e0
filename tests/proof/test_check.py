"""``flexdpo check``: the verdict, why, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexdpo import FlexdpoError
from flexdpo.proof.check import check_model, run_check
from flexdpo.proof.tiny_models import shrunk_config, tiny_model
from tests.hf.architectures import available_or_skip, build_model, zoo
from tests.images.models import KINDS


def save_config(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_an_exact_model_on_one_screen(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(sliding_window=4096, hidden_size=256, head_dim=32)
    text, code = run_check(save_config(config, tmp_path))
    assert code == 0
    assert "Gemma2ForCausalLM (model_type gemma2)" in text
    assert "verdict   exact" in text
    assert "sliding window of 4096 tokens; score softcap 50.0; logit softcap 30.0" in " ".join(text.split())
    assert "tiny model with random weights" in text
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines[1:])) <= 100  # the first names the folder


def test_a_refused_model_says_why_and_the_way_out(tmp_path: Path) -> None:
    text, code = run_check(save_config(transformers.xLSTMConfig(num_hidden_layers=2), tmp_path))
    assert code == 3
    assert "verdict   REFUSED" in text
    assert "why       it carries a recurrent state" in text
    assert "way out   train it without flexdpo" in text


@pytest.mark.parametrize(
    ("name", "changes", "way", "code"),
    [
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv (1): shared", 0),
        (
            "qwen3_5_text",
            {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
            "Qwen3_5GatedDeltaNet (1): shared; where that fills chunks of the scan, it runs less than one again",
            0,
        ),
        (
            "jamba",
            # a scan in Python costs by the number of its states
            {"num_hidden_layers": 2, "hidden_size": 32, "mamba_expand": 1, "mamba_d_state": 4},
            "JambaMambaMixer (1): scan unfolded to whole sequences, since selective_scan_fn takes no state",
            0,
        ),
        (
            "zaya",
            {},
            "ZayaCCAProjection (2): run whole along every path, since its state goes past any known kernel",
            0,
        ),
    ],
)
def test_layers_that_carry_a_state(name: str, changes: dict[str, Any], way: str, code: int, tmp_path: Path) -> None:
    text, found = run_check(save_config(build_model(name, **changes).config, tmp_path))
    assert found == code
    assert way in " ".join(text.split())


def test_a_model_that_only_running_it_refuses(tmp_path: Path) -> None:
    result = check_model(save_config(transformers.DogeConfig(), tmp_path))
    assert result.verdict == "refused"
    assert "DogeAttention received a mask" in result.reason


def test_json(tmp_path: Path) -> None:
    text, code = run_check(save_config(transformers.GPT2Config(), tmp_path), json=True)
    found = json.loads(text)
    assert code == 0
    assert found["verdict"] == "exact"
    assert found["model_class"] == "GPT2LMHeadModel"
    assert found["probe"]["value_error"] < 1e-9
    assert found["probe"]["wrong_value_error"] > 1e-2
    text, code = run_check(save_config(transformers.XLMConfig(), tmp_path), json=True)
    assert code == 3
    assert json.loads(text)["probe"] is None


def test_a_config_file_and_a_saved_model(tmp_path: Path) -> None:
    build_model("mistral", dtype=torch.float32).save_pretrained(tmp_path)
    folder = check_model(str(tmp_path))
    assert (folder.verdict, folder.probed) == ("exact", "saved model")
    file = check_model(str(tmp_path / "config.json"))
    assert (file.verdict, file.probed) == ("exact", "tiny model with random weights")


def test_a_model_of_images_and_text_is_asked_about_its_text(tmp_path: Path) -> None:
    KINDS["llava"].make().save_pretrained(tmp_path)
    found = [check_model(str(tmp_path / name)) for name in ("", "config.json")]
    assert [(each.verdict, each.model_class) for each in found] == [("exact", "LlavaForConditionalGeneration")] * 2


def test_a_config_that_cannot_be_run_is_accepted_but_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such size\nand more")

    monkeypatch.setattr("flexdpo.proof.check.tiny_model", fail)
    text, code = run_check(save_config(transformers.LlamaConfig(), tmp_path))
    assert code == 0
    assert "verdict   accepted, not proven" in text
    assert "no tiny model could be run (no such size)" in text
    assert "flexdpo.parity_probe(model)" in text


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexdpo.proof.check.why_unreachable", lambda _: "the hub cannot be reached: no route")
    asked: list[bool] = []

    def from_pretrained(*_: Any, local_files_only: bool, **__: Any) -> Any:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("flexdpo.proof.check.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(
        FlexdpoError, match=r"cannot load a config from 'no-such-name' \(the hub cannot be reached: no route"
    ):
        run_check("no-such-name")
    assert asked == [True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "missing"), "does not exist; give a model folder"),
        (str, r"has no config\.json, so it is no saved model"),
        (
            lambda folder: save_config(transformers.ViTConfig(), folder),
            "'vit' model: transformers has no causal language",
        ),
    ],
)
def test_nothing_to_check(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FlexdpoError, match=message):
        run_check(make(tmp_path))


def test_a_shrunk_config_keeps_every_layer_type() -> None:
    config = transformers.Gemma3TextConfig()
    cut = shrunk_config(config)
    assert set(cut.layer_types) == set(config.layer_types)
    assert len(cut.layer_types) == cut.num_hidden_layers <= 4
    assert cut.sliding_window == 8
    assert cut.head_dim == config.head_dim
    assert config.num_hidden_layers == 26


def test_layers_that_come_once_in_a_while_are_kept() -> None:
    """One in eight attends, and every other one has experts: computed from periods, in no list."""
    config = transformers.JambaConfig()
    assert set(shrunk_config(config).layers_block_type) == set(config.layers_block_type) == {"attention", "mamba"}


# default configs that are not complete, describe an encoder, or that transformers itself cannot run
# fmt: off
INCOMPLETE = {
    "bert", "bert-generation", "cohere_compass_text", "dbrx", "deepseek_v2", "doge", "dots1", "electra", "emu3",
    "ernie", "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron", "qwen4_exp",
    "qwen4_exp_text", "roc_bert",
}
# fmt: on


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(n for n, a in zoo().items() if a.exact and n not in INCOMPLETE))
def test_full_sized_configs_are_cut_built_and_found_exact(name: str) -> None:
    from flexdpo import parity_probe

    architecture = available_or_skip(name)
    report = parity_probe(tiny_model(getattr(transformers, architecture.config_class)()))
    # its router draws random numbers in training, however it is set
    assert report.exact == (name != "phimoe"), report
