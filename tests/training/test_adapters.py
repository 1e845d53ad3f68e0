"""Adapters of every kind that peft has: the reference is the policy as it was before its first step."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from safetensors.torch import load_file

from flexdpo import DPOTrainer, FlexdpoError, Group, make_train_step
from flexdpo.training.adapters import StartingWeights
from tests.training.test_trainer import history, settings

LN_2 = pytest.approx(math.log(2), abs=1e-6)
# what a kind must be told for layers as small as these
SIZES: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "C3A": {"block_size": 16},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 64},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": [0, 2, 5, 40], "target_modules": ["embed_tokens"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
}
EXTRA_TOKENS = r"{kind} puts extra tokens before every (prompt|sequence), which packed rows do not have; use LoRA"
ON_TOKENS_ALONE = r"with the adapter {kind} the model does not run on token ids alone.*\({why}.*such as LoRA"
# what puts tokens of its own into every sequence, mixes those of a batch, draws random numbers, or needs more inputs
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "CARTRIDGE": ({"num_virtual_tokens": 2}, EXTRA_TOKENS),
    "CPT": ({"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]}, EXTRA_TOKENS),
    "LILY": ({}, r"LILY computes something from all tokens of a batch .* move the first one's logits by [0-9.]+%"),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 2, "num_tasks": 2}, EXTRA_TOKENS),
    "POLY": ({"n_tasks": 2}, ON_TOKENS_ALONE.replace("{why}", "ValueError: task_ids should not be None")),
    "PREFIX_TUNING": ({"num_virtual_tokens": 2}, EXTRA_TOKENS),
    "PROMPT_TUNING": ({"num_virtual_tokens": 2}, EXTRA_TOKENS),
    "PVERA": ({}, r"draw random numbers in training, and no setting stops it"),
    "P_TUNING": ({"num_virtual_tokens": 2}, EXTRA_TOKENS),
    "SHADOW": ({}, ON_TOKENS_ALONE.replace("{why}", "AttributeError")),
}
# mixes other adapters, which it loads from disk
MIXED = "XLORA"
CHEAP = frozenset({"ADALORA", "IA3", "LOHA", "OSF", "TRAINABLE_TOKENS", "UNILORA"})
EXACT = [
    pytest.param(kind, marks=[] if kind in CHEAP else pytest.mark.slow)
    for kind in sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    if kind not in REFUSED and kind != MIXED
]


def config_of(kind: str, **changes: Any) -> Any:
    cls = next(cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == kind)
    if kind == "ADAMSS" and importlib.util.find_spec("sklearn") is None:
        pytest.skip("AdaMSS needs scikit-learn")
    given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], **SIZES.get(kind, {})}
    return cls(**{name: value for name, value in {**given, **changes}.items() if name in cls.__dataclass_fields__})


def trained(model: Any, seed: int = 0) -> Any:
    """The model as training would leave it: every trainable weight has moved."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def set_scale(model: Any, scale: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


@pytest.fixture
def losses(tmp_path: Path, tokenizer: Any, preferences: Any) -> Any:
    """The losses of two steps; the second shows that the first has moved the policy and not its reference."""

    def run(model: Any, peft_config: Any = None, **changes: Any) -> list[float]:
        args = settings(tmp_path, **{"max_steps": 2, "learning_rate": 1e-2, **changes})
        data = {"train_dataset": preferences, "processing_class": tokenizer}
        return history(DPOTrainer(model, None, args, peft_config=peft_config, **data), "loss")

    return run


@pytest.mark.parametrize("kind", EXACT)
def test_a_trained_adapter_of_every_kind_starts_at_ln_2(losses: Any, small_model: Any, kind: str) -> None:
    for budget in (None, 56):
        first, second = losses(trained(get_peft_model(small_model(), config_of(kind))), max_tokens_per_row=budget)
        assert first == LN_2
        assert second != LN_2


@pytest.mark.parametrize("kind", EXACT)
def test_a_fresh_adapter_of_every_kind_starts_at_ln_2(losses: Any, small_model: Any, kind: str) -> None:
    first, second = losses(small_model(), config_of(kind), learning_rate=5e-2)
    assert first == LN_2
    assert second != LN_2


def test_an_adapter_that_mixes_others_starts_at_ln_2(tmp_path: Path, losses: Any, small_model: Any) -> None:
    for number in range(2):
        parts = trained(get_peft_model(small_model(), config_of("LORA")), seed=number)
        parts.save_pretrained(tmp_path / str(number))
    base = small_model()
    folders = {str(number): str(tmp_path / str(number)) for number in range(2)}
    config = config_of(MIXED, hidden_size=base.config.hidden_size, adapters=folders)
    with pytest.raises(FlexdpoError, match=r"peft cannot put the adapter XLORA into LlamaForCausalLM .*`use_cache`"):
        losses(base, config)
    base.config.use_cache = False
    model = trained(get_peft_model(base, config))
    first, second = losses(model, max_tokens_per_row=56)
    assert first == LN_2
    assert second != LN_2


FORMS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [0, 2, 5, 40]},
    "head": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all", "target_modules": ["c_attn"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 4},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
OFTEN = ("embeddings", "tokens", "bias", "pissa")


@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FORMS])
def test_every_form_of_lora_starts_at_ln_2(losses: Any, small_model: Any, form: str) -> None:
    name, config = "gpt2" if form == "bias" else "llama", config_of("LORA", **FORMS[form])
    assert losses(small_model(name), config)[0] == LN_2
    model = trained(get_peft_model(small_model(name), config))
    set_scale(model, 3.0)
    first, second = losses(model, max_tokens_per_row=56)
    assert first == LN_2
    assert second != LN_2


def test_several_active_adapters_stay_active_and_no_other_is_saved(
    tmp_path: Path, losses: Any, small_model: Any
) -> None:
    # called like a module, and like what others call a reference
    names = ("layers", "reference", "ref")
    model = get_peft_model(small_model(), config_of("LORA"), adapter_name=names[0])
    model.add_adapter(names[1], config_of("LORA", r=2, target_modules=["down_proj"]))
    model.add_adapter(names[2], config_of("LORA", r=2))
    model.base_model.set_adapter(list(names[:2]))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["layers"].weight.requires_grad_(False)
    trained(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    first, second = losses(model)
    assert first == LN_2
    assert second != LN_2
    assert tuple(model.active_adapters) == names[:2]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()} == set(names)
    kept = load_file(tmp_path / "saved" / "layers" / "adapter_model.safetensors")
    assert all("lora_" in name for name in kept)


def test_the_first_weights_come_back_bit_for_bit(small_model: Any) -> None:
    model = trained(get_peft_model(small_model(), config_of("LORA", modules_to_save=["lm_head"])))
    ids = torch.tensor([[3, 4, 5, 6]])
    begin = model(input_ids=ids).logits.detach().clone()
    at_start = StartingWeights(model)
    trained(model, seed=1)
    moved = model(input_ids=ids).logits.detach().clone()
    with at_start():
        assert torch.equal(model(input_ids=ids).logits, begin)
    with pytest.raises(KeyboardInterrupt), at_start():
        raise KeyboardInterrupt
    assert torch.equal(model(input_ids=ids).logits, moved)
    assert not torch.equal(moved, begin)
    set_scale(model, 5.0)
    with pytest.raises(
        FlexdpoError, match=r"no longer runs the adapters that it began with .* leave adapters and their scales"
    ):
        at_start().__enter__()


def test_a_step_of_ones_own_keeps_the_adapter_it_was_given(small_model: Any) -> None:
    model = trained(get_peft_model(small_model(), config_of("LOHA")))
    step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), beta=0.1)
    groups = [Group.from_lists([1, 5, 6], [[7, 8, 2], [9, 2]])]
    got = [float(step(groups).loss) for _ in range(2)]
    assert got[0] == LN_2
    assert got[1] != LN_2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_packed_rows_cannot_run_are_refused(losses: Any, small_model: Any, kind: str) -> None:
    given, why = REFUSED[kind]
    why = why.replace("{kind}", kind)
    with pytest.raises(FlexdpoError, match=why):
        losses(small_model(), config_of(kind, **given))
    # trained before, as the policy
    with pytest.raises(FlexdpoError, match=why):
        losses(trained(get_peft_model(small_model(), config_of(kind, **given))))


def test_what_cannot_be_trained_is_refused(tmp_path: Path, losses: Any, small_model: Any) -> None:
    get_peft_model(small_model(), config_of("LORA")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FlexdpoError, match=r"no weight of this PeftModel is trainable.*is_trainable=True"):
        losses(PeftModel.from_pretrained(small_model(), tmp_path / "adapter"))
    assert losses(PeftModel.from_pretrained(small_model(), tmp_path / "adapter", is_trainable=True))[0] == LN_2
    with pytest.raises(FlexdpoError, match=r"no weight of the model is trainable.*requires_grad_\(True\)"):
        losses(small_model().requires_grad_(False))
    merged = get_peft_model(small_model(), config_of("LORA"))
    merged.merge_adapter()
    with pytest.raises(FlexdpoError, match=r"the loss depends on no trainable weight.*unmerge_adapter"):
        losses(merged)


def test_a_reference_with_a_smaller_vocabulary(
    tmp_path: Path, tokenizer: Any, preferences: Any, small_model: Any
) -> None:
    small = small_model(seed=1)
    small.resize_token_embeddings(50)
    with pytest.raises(FlexdpoError, match=r"the tokenizer has 97 tokens but the reference model embeds 50"):
        DPOTrainer(small_model(), small, settings(tmp_path), train_dataset=preferences, processing_class=tokenizer)
    model = small_model()
    step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), ref_model=small)
    with pytest.raises(FlexdpoError, match=r"line 3 has token 60 but the reference model embeds 50"):
        step([Group.from_lists([1, 5], [[60], [7]], name="line 3")])


def test_a_reference_that_is_not_the_policy_stops_the_run(
    tmp_path: Path, tokenizer: Any, preferences: Any, small_model: Any
) -> None:
    model = trained(get_peft_model(small_model(), config_of("LORA")))
    trainer = DPOTrainer(model, None, settings(tmp_path), train_dataset=preferences, processing_class=tokenizer)
    next(iter(trainer._at_start.values.values())).add_(0.05)
    message = r"the reference's log-probabilities, which are the policy's before the first step, are off by"
    with pytest.raises(FlexdpoError, match=message):
        trainer.train()


def test_a_stale_cache_stops_the_run(tmp_path: Path, tokenizer: Any, preferences: Any, small_model: Any) -> None:
    args = settings(tmp_path, precompute_ref_log_probs=True)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    column = "ref_response_logps"
    values = [[value + 0.1 for value in row] for row in trainer.train_dataset[column]]
    trainer.train_dataset = trainer.train_dataset.remove_columns(column).add_column(column, values)
    with pytest.raises(FlexdpoError, match=r"the reference's log-probabilities, which are the policy's .* are off by"):
        trainer.train()
