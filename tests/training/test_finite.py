"""NaN and infinity, provoked everywhere: no weight and no checkpoint holds one, and the message names the example."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.training.batch import REFERENCE_COLUMN
from flexdpo.training.train_step import make_train_step
from tests.conftest import build_model, odd_groups, preference_rows
from tests.processes import run_processes
from tests.training.test_trainer import settings

INF, NAN = math.inf, math.nan
# a word that no other example has
BAD_WORD, BAD_ROW = 3, 2
Provoke = Callable[[DPOTrainer], None]


@pytest.fixture(scope="module")
def data() -> Dataset:
    rows = [{name: text.replace("w3 ", "w4 ") for name, text in row.items()} for row in preference_rows(6)]
    rows[BAD_ROW]["rejected"] += f"w{BAD_WORD} "
    return Dataset.from_list(rows)


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: Any, small_model: Any, data: Dataset) -> Any:
    def build(model: Any = None, ref_model: Any = None, **changes: Any) -> DPOTrainer:
        # what is damaged from the start is found by the proof, before the first step
        changes = {"prove": False} | changes
        defaults = {"per_device_train_batch_size": 3, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        if changes.get("save_strategy") == "no":
            del defaults["save_steps"]
        args = settings(tmp_path / "run", train_sampling_strategy="sequential", **defaults | changes)
        return DPOTrainer(model or small_model(), ref_model, args, train_dataset=data, processing_class=tokenizer)

    return build


# --- the faults ------------------------------------------------------------------------------------------------------


def weight(name: str, value: float, index: Any = ...) -> Provoke:
    """Damage a weight of the policy."""

    def provoke(trainer: DPOTrainer) -> None:
        with torch.no_grad():
            trainer.model.get_parameter(name)[index] = value

    return provoke


def gradient(name: str, value: float, *, only_call: int | None = None) -> Provoke:
    """Put a value into the gradient of a parameter, at every backward pass or at one alone."""

    def provoke(trainer: DPOTrainer) -> None:
        calls = []

        def hook(found: torch.Tensor) -> torch.Tensor | None:
            calls.append(1)
            if only_call is not None and len(calls) != only_call:
                return None
            found = found.clone()
            found.view(-1)[0] = value
            return found

        trainer.model.get_parameter(name).register_hook(hook)

    return provoke


def gradient_of_the_word(value: float) -> Provoke:
    """Put a value into the gradient wherever one word is read: only one example has it, in a row with others."""

    def provoke(trainer: DPOTrainer) -> None:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                at = (args[0] == BAD_WORD)[..., None]
                output.register_hook(lambda found: found.masked_fill(at, value))

        trainer.model.get_input_embeddings().register_forward_hook(hook)

    return provoke


def reference(value: float) -> Provoke:
    """Change what was precomputed for the chosen response of one example."""

    def provoke(trainer: DPOTrainer) -> None:
        rows = trainer.train_dataset[:][REFERENCE_COLUMN]
        rows[BAD_ROW] = [value, rows[BAD_ROW][1]]
        others = trainer.train_dataset.remove_columns(REFERENCE_COLUMN)
        trainer.train_dataset = others.add_column(REFERENCE_COLUMN, rows)

    return provoke


def logits_of_the_word(value: float) -> Provoke:
    def provoke(trainer: DPOTrainer) -> None:
        with torch.no_grad():
            trainer.model.lm_head.weight[BAD_WORD] *= value

    return provoke


NAMED = rf"step 1, row {BAD_ROW}: the log-probability of response \d under the"
GRADIENT = r"step 1: the gradient of [\w.]+ is not finite though the loss is, at row"
NORM = rf"step 1: the gradient's norm is not finite though the loss is, at row {BAD_ROW};"
TOGETHER = "the gradient or the loss is not finite in the batch of"
OVER = {"precompute_ref_log_probs": True}
LAYER = "model.layers.0.self_attn.k_proj.weight"
WAYS: dict[str, tuple[Provoke, str, dict[str, Any]]] = {
    "infinity in an embedding": (
        weight("model.embed_tokens.weight", INF, BAD_WORD), rf"{NAMED} policy is nan", {},
    ),
    "NaN in an embedding": (weight("model.embed_tokens.weight", NAN, (BAD_WORD, 0)), rf"{NAMED} policy is nan", {}),
    "NaN in one layer": (weight(LAYER, NAN), "step 1, row 0: the log-probability of response 0 under the policy", {}),
    "infinity in a norm": (weight("model.norm.weight", INF, 0), r"step 1, row 0: the log-probability of response", {}),
    "infinity in the head": (logits_of_the_word(INF), r"step 1, row 0: the log-probability of response", {}),
    "infinity in a precomputed reference": (reference(INF), rf"{NAMED} precomputed reference is inf", OVER),
    "NaN in a precomputed reference": (reference(NAN), rf"{NAMED} precomputed reference is nan", OVER),
    "NaN in one gradient": (gradient(LAYER, NAN), rf"{GRADIENT} 0;", {}),
    "infinity in one gradient": (gradient("model.norm.weight", -INF), rf"{GRADIENT} 0;", {}),
    "NaN in a gradient, not clipped": (gradient(LAYER, NAN), rf"{GRADIENT} 0;", {"max_grad_norm": 0.0}),
    "NaN in the gradient of one example": (gradient_of_the_word(NAN), rf"{GRADIENT} {BAD_ROW};", {}),
    "NaN in one example, each in a row of its own": (
        gradient_of_the_word(NAN), rf"{GRADIENT} {BAD_ROW};", {"max_tokens_per_row": 56},
    ),
    "NaN in one example, precomputed reference": (gradient_of_the_word(NAN), rf"{GRADIENT} {BAD_ROW};", OVER),
    "infinity in one example of the second accumulated batch": (
        gradient_of_the_word(INF),
        rf"{GRADIENT} {BAD_ROW};",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "NaN once, in the second accumulated batch": (
        gradient(LAYER, NAN, only_call=2),
        rf"step 1: {TOGETHER} row 0, row 1, row 2, though none of them is at fault alone;",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "NaN at the second step": (
        gradient(LAYER, NAN, only_call=2), rf"step 2: {TOGETHER} row 3, row 4, row 5, though none", {},
    ),
    "forward_kl far on the wrong side": (
        reference(200.0), NORM, {**OVER, "f_divergence_type": "forward_kl"},
    ),
    "alpha_divergence far on the wrong side": (
        reference(400.0), NORM, {**OVER, "f_divergence_type": "alpha_divergence"},
    ),
    "ipo of a score that is a huge number": (
        reference(900.0),
        rf"step 1: the loss is not finite though every log-probability is, at row {BAD_ROW};",
        {**OVER, "f_divergence_type": "forward_kl", "loss_type": "ipo"},
    ),
    "a beta beyond float32": (lambda trainer: None, rf"{GRADIENT} 0;", {"beta": 1e300}),
    "a loss that spikes": (lambda trainer: None, rf"{GRADIENT} 0;", {"loss_weights": [1e300]}),
    "a loss that couples its pairs": (gradient_of_the_word(NAN), rf"{GRADIENT} {BAD_ROW};", {"loss_type": "aot"}),
    "a ranking": (gradient_of_the_word(NAN), rf"{GRADIENT} {BAD_ROW};", {"loss_type": "plackett_luce"}),
    "a learning rate beyond float32": (
        lambda trainer: None,
        r"checkpoint-1 is not written, since [\w.]+ holds values that are not finite; go on from the checkpoint before",
        {"learning_rate": 3e38, "optim": "sgd", "max_grad_norm": 0.0, "loss_weights": [1e4]},
    ),
    "a learning rate that ends in infinity at the second step": (
        lambda trainer: None,
        r"step 2, row 3: the log-probability of response",
        {"learning_rate": 1e37, "optim": "sgd"},
    ),
}  # fmt: skip


# the others repeat them in other places
_BY_DEFAULT = (
    "NaN in an embedding",
    "NaN in a gradient, not clipped",
    "infinity in one example of the second accumulated batch",
    "NaN in one example, precomputed reference",
    "forward_kl far on the wrong side",
    "a learning rate beyond float32",
)


@pytest.mark.parametrize("name", [n if n in _BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in WAYS])
def test_nothing_but_finite_values_is_kept(name: str, trainer: Any, tmp_path: Path) -> None:
    provoke, message, changes = WAYS[name]
    run = trainer(**changes)
    provoke(run)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(FlexdpoError, match=message) as raised:
        run.train()
    assert "\n" not in str(raised.value)
    steps = run.state.global_step
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(saved) == min(steps, 1 if "step 2" in message else 0)
    for folder in saved:
        assert all(bool(torch.isfinite(each).all()) for each in load_file(folder / "model.safetensors").values())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    if steps == 0:
        for key, value in run.model.state_dict().items():
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key


def test_the_model_is_not_saved_either(trainer: Any, tmp_path: Path) -> None:
    run = trainer()
    weight(LAYER, NAN)(run)
    with pytest.raises(FlexdpoError, match=rf"the model is not written, since {LAYER} holds values"):
        run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_no_checkpoint_holds_an_optimizer_that_is_not_finite(trainer: Any, tmp_path: Path) -> None:
    run = trainer(save_steps=1)
    parameter = dict(run.model.named_parameters())[LAYER]

    class Spoil(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            run.optimizer.state[parameter]["exp_avg"][0] = INF

    run.add_callback(Spoil())
    with pytest.raises(FlexdpoError, match=rf"checkpoint .* is not written, since the optimizer's exp_avg of {LAYER}"):
        run.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_a_forward_pass_that_overflows(trainer: Any, small_model: Any, dtype: torch.dtype, largest: float) -> None:
    run = trainer(small_model("llama", dtype), save_strategy="no")
    with torch.no_grad():
        run.model.model.embed_tokens.weight[BAD_WORD] = largest
        run.model.model.layers[0].input_layernorm.weight[:] = largest
    with pytest.raises(FlexdpoError, match=r"step 1, row \d: the log-probability of response \d under the policy is"):
        run.train()


def test_an_adapter_and_a_reference_that_are_not_finite(trainer: Any, small_model: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    run = trainer(adapted)
    next(p for name, p in run.model.named_parameters() if "lora_B" in name).data[:] = NAN
    with pytest.raises(FlexdpoError, match="step 1, row 0: the log-probability of response 0 under the policy is nan"):
        run.train()
    damaged = small_model()
    damaged.model.embed_tokens.weight.data[BAD_WORD] = INF
    with pytest.raises(FlexdpoError, match=rf"{NAMED} reference is nan"):
        trainer(None, damaged).train()


def test_an_interrupted_step_leaves_nothing_to_the_next_run(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(gradient_accumulation_steps=2, save_strategy="no")
    backward = run.accelerator.backward
    calls = []

    def fail(loss: torch.Tensor, **options: Any) -> None:
        backward(loss, **options)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(run.accelerator, "backward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not run._guard.ran


# --- loops of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_accelerate", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_that_raised_is_forgotten(rng: Any, with_accelerate: bool, max_grad_norm: float | None) -> None:
    """The next good batch gives what it would have given without it."""
    groups, weights = odd_groups(rng), []
    for spoilt in (False, True):
        model = build_model("llama")
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "max_tokens_per_row": 64}
        if with_accelerate:
            options["accelerator"] = Accelerator(cpu=True)
            model, optimizer = options["accelerator"].prepare(model, optimizer)
        step = make_train_step(model, optimizer, **options)
        if spoilt:
            handle = model.model.norm.weight.register_hook(lambda found: found * NAN)
            with pytest.raises(FlexdpoError, match=r"^the gradient of [\w.]+ is not finite .* is, at pair;"):
                step(groups)
            handle.remove()
            handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step(groups)
            handle.remove()
            assert all(parameter.grad is None for parameter in model.parameters())
        step(groups)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for got, want in zip(weights[1], weights[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_gradient_scaler_skips_what_overflows_until_its_scale_is_used_up(rng: Any) -> None:
    model, accelerator = build_model("llama").float(), Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    optimizer.scaler = accelerator.scaler
    step = make_train_step(model, optimizer, accelerator=accelerator)
    before = copy.deepcopy(model.state_dict())
    model.model.norm.weight.register_hook(lambda found: found * INF)
    for _ in range(3):
        assert not bool(torch.isfinite(step(odd_groups(rng)).grad_norm))
    assert accelerator.scaler.get_scale() == 0.5
    with pytest.raises(FlexdpoError, match="not finite though the loss is, at pair"):
        step(odd_groups(rng))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


TWO_PROCESSES = """
import sys
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer, FlexdpoError
from flexdpo.training.model_loading import load_model, load_tokenizer
from tests.conftest import preference_rows
from tests.processes import leave
torch.set_num_threads(1)
model, output = sys.argv[1:]
args = DPOConfig(output, max_steps=2, use_cpu=True, learning_rate=1e-3, report_to="none", disable_tqdm=True,
                 save_strategy="no", per_device_train_batch_size=2, ddp_backend="gloo", prove=False)
trainer = DPOTrainer(load_model(model), None, args, train_dataset=Dataset.from_list(preference_rows(8)),
                     processing_class=load_tokenizer(model))
weights = [p.detach().clone() for p in trainer.model.parameters()]
if args.process_index == 1:
    value = float("nan")
    trainer.model.model.norm.weight.register_hook(lambda found: found * value)
try:
    trainer.train()
except FlexdpoError as error:
    print(error)
assert all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), weights, strict=True))
# a loss, on one process alone
if args.process_index == 1:
    trainer.model.model.embed_tokens.weight.data[:] = value
try:
    trainer.train()
except FlexdpoError as error:
    print(error)
leave()
"""


@pytest.mark.distributed
def test_all_processes_stop_where_one_has_a_gradient_that_is_not_finite(tmp_path: Path, saved_model: Any) -> None:
    printed = run_processes(["-c", TWO_PROCESSES, str(saved_model("llama")), str(tmp_path / "two")], 2)
    said = [[line for line in each.splitlines() if line.startswith("step 1")] for each in printed]
    elsewhere = "or it comes from another process, whose message says more"
    assert [len(lines) for lines in said] == [2, 2]
    assert elsewhere in said[0][0]
    assert "the gradient of model.norm.weight is not finite though the loss is, at row" in said[1][0]
    assert elsewhere in said[0][1]
    assert "the log-probability of response 0 under the policy is nan" in said[1][1]
