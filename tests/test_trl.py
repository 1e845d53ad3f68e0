"""Unmodified TRL trainers, with prefix sharing and without: the same losses, gradient norms and metrics throughout."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    MixtralConfig,
    Qwen3NextConfig,
    TrainerCallback,
)

import flexdpo
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from tests.conftest import CONFIGS, VOCABULARY, preference_rows, strengthen
from tests.hf.architectures import needs_states

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

STEPS = 6
TOLERANCE = 1e-5
ALL = {"min_gain": 1.0, "min_prefix": 1}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": CONFIGS["llama"],
    "qwen3": CONFIGS["qwen3"],
    # a window shorter than the prompts, in the first of two layers
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "mixtral": lambda: MixtralConfig(**_SHAPE, **_EXPERTS),
    "gpt_oss": lambda: GptOssConfig(
        **_SHAPE,
        **_EXPERTS,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt2": CONFIGS["gpt2"],
    "lfm2": lambda: Lfm2Config(**_SHAPE, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: Qwen3NextConfig(
        **_SHAPE,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        # embeddings that are the head too would be so strong as to leave all probability to one token
        tie_word_embeddings=False,
    ),
}
WITH_STATES = ("lfm2", "qwen3_next")


def build(name: str, seed: int = 0, *, rewards: bool = False) -> Any:
    torch.manual_seed(seed)
    config = MODELS[name]()
    if rewards:
        config.num_labels, config.pad_token_id = 1, 2
    kind = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
    model = strengthen(kind.from_config(config), seed)
    if name in ("gemma3", "gpt2", "lfm2"):
        # their embeddings are the head too: so strong ones would leave all probability to one token
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.data.mul_(0.2)
    return model


def build_reference(name: str) -> Any:
    """A reference somewhat away from the policy, but so near that losses with exponentials magnify no rounding."""
    policy, reference = build(name), build(name, seed=1)
    for of_reference, of_policy in zip(reference.parameters(), policy.parameters(), strict=True):
        of_reference.data.lerp_(of_policy.data, 0.99)
    return reference


def conversations(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": said("system", "w7 w8 w9") + said("user", row["prompt"]),
            "chosen": said("assistant", row["chosen"]),
            "rejected": said("assistant", row["rejected"]),
        }
        for row in rows
    ]


CHAT = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"


class Generating(TrainerCallback):
    """Samples from the policy in the middle of training, as an evaluation might."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ids = torch.tensor([[5, 6, 7], [2, 6, 7]])
        model.generate(ids, attention_mask=(ids != 2).long(), max_new_tokens=3, do_sample=False, pad_token_id=2)


def train(
    folder: Path,
    tokenizer: Any,
    name: str,
    share: bool,
    *,
    rewards: bool = False,
    lora: str = "",
    chat: bool = False,
    side: str = "right",
    callbacks: tuple[Any, ...] = (),
    policy: Any = None,
    resume: str | None = None,
    **settings: Any,
) -> Any:
    """Train for six steps and return the trainer; only ``flexdpo.trl.enable`` tells the two runs apart."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.chat_template = side, CHAT
    rows = preference_rows(24, seed=3)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        # a gradient that is zero but for rounding would make a full step otherwise
        "adam_epsilon": 1e-4,
        "save_strategy": "no",
        **settings,
    }
    config = trl.RewardConfig if rewards else trl.DPOConfig
    model = policy or build(name, rewards=rewards)
    kwargs: dict[str, Any] = {
        "args": config(**settings),
        "train_dataset": Dataset.from_list(conversations(rows) if chat else rows),
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
    }
    if lora:
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
        if rewards:
            adapter.task_type, adapter.modules_to_save = "SEQ_CLS", ["score"]
        if lora == "trained before":
            model = peft.get_peft_model(model, adapter)
        else:
            adapter.init_lora_weights = True
            kwargs["peft_config"] = adapter
    elif not rewards and policy is None:
        kwargs["ref_model"] = build_reference(name)
    trainer = (trl.RewardTrainer if rewards else trl.DPOTrainer)(model, **kwargs)
    if share:
        flexdpo.trl.enable(trainer, **ALL)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


_CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def assert_same_history(
    got: list[dict[str, float]],
    want: list[dict[str, float]],
    but: tuple[str, ...] = (),
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> None:
    assert len(got) == len(want) == steps + 1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - {*_CLOCK, *but}:
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), f"{key} at {theirs['step']}"


def compare(folder: Path, tokenizer: Any, name: str, **settings: Any) -> Any:
    plain, shared = (train(folder / str(share), tokenizer, name, share, **settings) for share in (False, True))
    steps = settings.get("max_steps", STEPS)
    # chunks of its scans end elsewhere in a row, and the longer sums within them round otherwise
    tolerance = 10 * TOLERANCE if name == "qwen3_next" else TOLERANCE
    assert_same_history(shared.state.log_history, plain.state.log_history, steps=steps, tolerance=tolerance)
    assert not any("grad_norm" in logs and not logs["grad_norm"] > 0 for logs in plain.state.log_history)
    references = [] if settings.get("precompute_ref_log_probs") else [getattr(shared, "ref_model", None)]
    for model in (shared.model, *references):
        if model is not None:
            stats = flexdpo.sharing_stats(model)
            passed = {reason for reason in stats.passed_through if reason != "generation"}
            assert stats.batches_shared >= STEPS
            assert stats.tokens_run < 0.8 * stats.tokens_in
            assert not passed
    return shared


_SMOOTHED = ["exo_pair", "robust", "aot", "aot_unpaired"]
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in _SMOOTHED},
    **{
        name: {"loss_type": [name]}
        for name in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft"),
            "sigmoid_norm",
        )
    },
    # it divides beta times the margin by a temperature of 0.05, and multiplies the margin's rounding with it
    "discopop": {"loss_type": ["discopop"], "beta": 0.05},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": "new"},
    "lora trained before": {"lora": "trained before"},
    "lora checkpointed": {"lora": "new", "gradient_checkpointing": True},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpoints": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    "conversations": {"chat": True},
    "left": {"side": "left"},
    "truncated": {"max_length": 20, "pad_to_multiple_of": 8},
    "generating": {"callbacks": (Generating(),)},
}
REWARD_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "left": {"side": "left"},
    "conversations": {"chat": True},
    **{key: WAYS[key] for key in ("lora", "checkpoints", "reentrant checkpoints", "accumulated")},
}


# with router logits in the config, transformers weighs those of one new token by the mask of all, and stops
_FAIL_WITHOUT_SHARING = {("mixtral", "generating"), ("gpt_oss", "generating")}


def sweep(names: list[str], quick: set[tuple[str, str]], without: tuple[str, ...] = ()) -> list[Any]:
    """Every model but some with every one of ``names``; all but the quick ones are slow."""

    def marks(model: str, name: str) -> list[pytest.MarkDecorator]:
        return [needs_states] * (model in WITH_STATES) + [pytest.mark.slow] * ((model, name) not in quick)

    return [
        pytest.param(model, name, id=f"{model}-{name}", marks=marks(model, name))
        for model in MODELS
        for name in names
        if model not in without and (model, name) not in _FAIL_WITHOUT_SHARING
    ]


@pytest.mark.parametrize(("name", "loss"), sweep([*LOSSES], {*((model, "sigmoid") for model in MODELS)}))
def test_dpo_losses(name: str, loss: str, tmp_path: Path, tokenizer: Any) -> None:
    shared = compare(tmp_path, tokenizer, name, **LOSSES[loss])
    if name in ("mixtral", "gpt_oss"):
        assert all(logs["aux_loss"] > 0 for logs in shared.state.log_history[:-1])


_QUICK_WAYS = {("llama", way) for way in ("lora", "precomputed", "synchronised", "conversations", "generating")}
_QUICK_WAYS |= {("gpt_oss", "checkpoints"), ("gpt2", "reentrant checkpoints"), ("mixtral", "accumulated")}


@pytest.mark.parametrize(("name", "way"), sweep([*WAYS], _QUICK_WAYS))
def test_dpo_ways(name: str, way: str, tmp_path: Path, tokenizer: Any) -> None:
    compare(tmp_path, tokenizer, name, **WAYS[way])


@pytest.mark.parametrize(
    ("name", "way"),
    # transformers has no LFM2 that classifies
    sweep([*REWARD_WAYS], {("qwen3", "plain"), ("gpt2", "left"), ("llama", "lora")}, without=("lfm2",)),
)
def test_reward_modelling(name: str, way: str, tmp_path: Path, tokenizer: Any) -> None:
    compare(tmp_path, tokenizer, name, rewards=True, **REWARD_WAYS[way])


@needs_states
@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_STATES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_thirty_steps_of_a_model_with_states(name: str, side: str, tmp_path: Path, tokenizer: Any) -> None:
    compare(tmp_path, tokenizer, name, max_steps=30, side=side)


def test_completions_sampled_during_training(tmp_path: Path, tokenizer: Any, saved_model: Any) -> None:
    """GRPO: prompts padded on the left, four completions each, sampled between the steps by the same model."""
    folder, prompts = saved_model("llama"), [{"prompt": row["prompt"]} for row in preference_rows(24, seed=3)]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split())) % 3) for text in completions]

    def sampled(share: bool) -> Any:
        args = trl.GRPOConfig(
            str(tmp_path / str(share)), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=STEPS,
            logging_steps=1, learning_rate=1e-4, adam_epsilon=1e-4, save_strategy="no", beta=0.1,
            per_device_train_batch_size=8, num_generations=4, max_completion_length=8, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=copy.deepcopy(tokenizer),
        )
        if share:
            flexdpo.trl.enable(trainer, **ALL)
        trainer.train()
        return trainer

    plain, shared = sampled(False), sampled(True)
    # seconds of sampling and rewarding
    but = tuple(key for logs in plain.state.log_history for key in logs if "time" in key)
    assert_same_history(shared.state.log_history, plain.state.log_history, but=but)
    for model in (shared.model, shared.ref_model):
        stats = flexdpo.sharing_stats(model)
        assert stats.batches_shared >= STEPS
        assert stats.passed_through.keys() <= {"generation"}


def test_a_reference_that_the_trainer_loads_itself(tmp_path: Path, tokenizer: Any, saved_model: Any) -> None:
    compare(tmp_path, tokenizer, "llama", policy=str(saved_model("llama")))


def test_the_comparison_can_fail(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With responses that see each other, losses are others from the first step on."""
    from flexdpo.dropin import plan
    from flexdpo.dropin.batch_trie import BatchTrie

    trie_of = plan.trie_of

    def leaking(*args: Any) -> BatchTrie:
        trie = trie_of(*args)
        return BatchTrie(**{**vars(trie), "subtree_end": torch.full_like(trie.subtree_end, len(trie))})

    monkeypatch.setattr(plan, "trie_of", leaking)
    plain, shared = (train(tmp_path, tokenizer, "llama", share).state.log_history for share in (False, True))
    with pytest.raises(AssertionError):
        assert_same_history(shared, plain)
    assert shared[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)


# --- logs and checkpoints --------------------------------------------------------------------------------------------


class Heard(TrainerCallback):
    """Keeps every log as a tracker gets it."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_the_saving_is_logged(tmp_path: Path, tokenizer: Any) -> None:
    heard = Heard()
    trainer = train(tmp_path, tokenizer, "llama", True, callbacks=(heard,))
    steps, last = heard.logs[:-1], heard.logs[-1]
    stats = flexdpo.sharing_stats(trainer.model) + flexdpo.sharing_stats(trainer.ref_model)
    assert len(steps) == STEPS
    assert sum(logs["sharing/tokens_in"] for logs in steps) == stats.tokens_in == last["sharing/tokens_in"]
    assert sum(logs["sharing/tokens_run"] for logs in steps) == stats.tokens_run == last["sharing/tokens_run"]
    assert last["sharing/saved"] == pytest.approx(stats.saved, abs=1e-4)
    assert all(logs["sharing/passed_through"] == 0 for logs in heard.logs)
    assert all(0.3 < logs["sharing/saved"] < 0.8 for logs in heard.logs)
    # nothing of it is kept in the state that checkpoints hold
    assert not any("sharing" in key for logs in trainer.state.log_history for key in logs)


def test_dropout_is_said_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    heard = Heard()
    with pytest.warns(UserWarning, match="uses dropout or noise in training"):
        train(tmp_path, tokenizer, "llama", True, policy=model, callbacks=(heard,), disable_dropout=False)
    assert all(logs["sharing/passed_through"] > 0 for logs in heard.logs)


def test_nothing_is_saved_in_checkpoints(tmp_path: Path, tokenizer: Any) -> None:
    """The same files with the same contents, and training goes on from them without flexdpo as if it had not been."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    plain = train(tmp_path / "plain", tokenizer, "llama", False, **saving)
    train(tmp_path / "shared", tokenizer, "llama", True, **saving)
    folders = [tmp_path / kind / "checkpoint-3" for kind in ("plain", "shared")]
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    for name in ("config.json", "generation_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert "sharing" not in (folders[1] / "trainer_state.json").read_text()
    from safetensors.torch import load_file

    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
    went_on = train(tmp_path / "on", tokenizer, "llama", False, resume=str(folders[1]))
    # TRL counts these from the restart on
    assert_same_history(went_on.state.log_history, plain.state.log_history, but=("num_tokens", "train_loss"))


# --- on and off ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: Any) -> Any:
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, disable_tqdm=True)
    return trl.DPOTrainer(
        build("llama"),
        build("llama", seed=1),
        args,
        train_dataset=Dataset.from_list(preference_rows(4)),
        processing_class=tokenizer,
    )


def test_a_second_time(trainer: Any) -> None:
    flexdpo.trl.enable(trainer)
    with pytest.raises(FlexdpoError, match="this DPOTrainer has a model that shares prefixes already"):
        flexdpo.trl.enable(trainer)


def test_disable(trainer: Any) -> None:
    with pytest.raises(FlexdpoError, match="this DPOTrainer shares no prefixes"):
        flexdpo.trl.disable(trainer)
    before = [type(callback) for callback in trainer.callback_handler.callbacks]
    callback = flexdpo.trl.enable(trainer)
    flexdpo.trl.disable(trainer)
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == before
    assert callback.stats.tokens_in == 0
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(FlexdpoError, match="shares no prefixes"):
            flexdpo.sharing_stats(model)


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))


def test_an_unsupported_policy_leaves_all_models_as_they_were(trainer: Any) -> None:
    trainer.model = bloom()
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        flexdpo.trl.enable(trainer)
    assert trainer.ref_model.config._attn_implementation == "sdpa"
    with pytest.raises(FlexdpoError, match="shares no prefixes"):
        flexdpo.sharing_stats(trainer.ref_model)


def test_an_unsupported_reference_runs_without_sharing(trainer: Any) -> None:
    trainer.ref_model = bloom()
    with pytest.warns(UserWarning, match="DPOTrainer runs one of its models without sharing: BloomForCausalLM"):
        callback = flexdpo.trl.enable(trainer)
    assert callback.models == (trainer.model,)


def test_models_are_found_wherever_a_trainer_keeps_them(trainer: Any) -> None:
    """In lists, in wrappers that are no models, in judges and callbacks; each once."""
    kept = {name: build("llama", seed=2, rewards=name == "reward") for name in ("reward", "wrapped", "judge", "heard")}
    trainer.reward_funcs = [len, kept["reward"], trainer.model]
    trainer.critic = torch.nn.ModuleDict({"value": kept["wrapped"]})
    trainer.judge = type("Judge", (), {})()
    trainer.judge.scorer = kept["judge"]
    listener = TrainerCallback()
    listener.teachers = {"first": kept["heard"]}
    trainer.add_callback(listener)
    callback = flexdpo.trl.enable(trainer, **ALL)
    assert callback.models[0] is trainer.model
    assert {*map(id, callback.models)} == {*map(id, (trainer.model, trainer.ref_model, *kept.values()))}
    assert len(callback.models) == 6
    trainer.model.config.use_cache = True  # TRL switches it off
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    # in evaluation mode nobody wants a cache of a model that scores; of the policy somebody may
    for model in callback.models:
        model.eval()(ids)
    assert all(flexdpo.sharing_stats(model).batches_shared == 1 for model in callback.models[1:])
    assert flexdpo.sharing_stats(trainer.model).passed_through == {"use_cache": 1}
    trainer.ref_model.generate(ids, max_new_tokens=2, pad_token_id=2)
    assert flexdpo.sharing_stats(trainer.ref_model).passed_through == {"generation": 2}
    assert callback.stats.tokens_in == 6 * 6
    flexdpo.trl.disable(trainer)
    assert not any(map(flexdpo.dropin.share.is_shared, callback.models))


def test_what_is_no_trainer() -> None:
    with pytest.raises(FlexdpoError, match=r"enable takes a transformers\.Trainer such as trl\.DPOTrainer, got Llama"):
        flexdpo.trl.enable(build("llama"))
