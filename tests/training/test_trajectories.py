"""Thirty optimizer steps on the built-in example, packed and shared, against the ordinary run: every figure of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from flexdpo import DPOConfig, DPOTrainer
from flexdpo.example.model import small_llama
from flexdpo.example.task import BodyPair, BodyTask, as_dataset, build_task
from flexdpo.layout.row import Row
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.objective import Objective
from flexdpo.training.batch import PackingCollator
from tests.conftest import strengthen
from tests.example.part import part_of_the_library
from tests.hf.architectures import zoo
from tests.training.unpacked import (
    Pair,
    Recipe,
    Reference,
    assert_same_trajectory,
    frozen_reference,
    judge,
    largest_gaps,
    linear_with_warmup,
    run_unpacked,
    sampled_steps,
)

STEPS = 30
BATCH = 3
# enough for thirty steps of six pairs without a second epoch
PAIRS = 6 * STEPS
SEED = 7
# tokens of a pair after sharing; nearly all of the example's pairs are this long
SHORTEST, LONGEST = 163, 209
# of a batch of three pairs: all in one row, two beside the third, each alone
BUDGETS = {1: 3 * LONGEST, 2: 2 * LONGEST, 3: LONGEST + 1}
KINDS = ("gpt2", "llama")
# beside attention a short convolution, and a delta rule with experts
STATEFUL = {"lfm2": ["conv", "full_attention"], "qwen3_next": ["linear_attention", "full_attention"]}
TOLERANCE = {"gpt2": 1e-8, "llama": 1e-4, **dict.fromkeys(STATEFUL, 1e-4)}
DTYPE = {"gpt2": torch.float64, "llama": torch.float32, **dict.fromkeys(STATEFUL, torch.float32)}
RECIPE = {"gpt2": Recipe(1e-3), "llama": Recipe(5e-4), **dict.fromkeys(STATEFUL, Recipe(5e-4))}
# matrices of a low rank learn more slowly
LORA_RECIPE = Recipe(5e-3)


# --- the data and the models ------------------------------------------------------------------------------------------


@dataclass
class Example:
    """The built-in example's data, ``PAIRS`` of its pairs to learn from, and fresh models by kind."""

    task: BodyTask
    pairs: list[BodyPair]
    models: dict[str, Any]
    references: dict[str, Reference]

    def model(self, kind: str) -> Any:
        return copy.deepcopy(self.models[kind])


@pytest.fixture(scope="module")
def example() -> Example:
    task = build_task(part_of_the_library(), seed=0, held_out_pairs=10)
    fitting = (p for p in task.train if SHORTEST <= tokens_of(p) <= LONGEST and survives_text(p, task.tokenizer))
    pairs = list(islice(fitting, PAIRS))
    assert len(pairs) == PAIRS
    models = {"gpt2": tiny_gpt2(len(task.tokenizer)), "llama": warm_llama(task)}
    return Example(task, pairs, models, {kind: frozen_reference(model) for kind, model in models.items()})


def tokens_of(pair: BodyPair) -> int:
    sequences = [pair.prompt_ids + response for response in (pair.chosen_ids, pair.rejected_ids)]
    return len({sequence[:n] for sequence in sequences for n in range(1, len(sequence) + 1)})


def survives_text(pair: BodyPair, tokenizer: Any) -> bool:
    """Whether its text has the same tokens again; a prompt cut in the middle of a word may not."""
    texts = as_text(pair, tokenizer)
    return all(
        tuple(tokenizer(texts["prompt"] + texts[name]).input_ids) == pair.prompt_ids + ids[:-1]
        for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
    )


def as_text(pair: BodyPair, tokenizer: Any) -> dict[str, str]:
    ids = {"prompt": pair.prompt_ids[1:], "chosen": pair.chosen_ids[:-1], "rejected": pair.rejected_ids[:-1]}
    return {name: tokenizer.decode(value) for name, value in ids.items()}


def tiny_gpt2(vocabulary: int) -> Any:
    """In float64, with weights so large that attention and positions show in every figure."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=1
    )
    return strengthen(GPT2LMHeadModel(config).double(), seed=0).eval()


def warm_llama(task: BodyTask, steps: int = 40, batch: int = 2) -> Any:
    """The example's model after a minute part of its warm-up, in float32."""
    model = small_llama(task.tokenizer, 0, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [torch.tensor(pair.prompt_ids + pair.chosen_ids) for pair in task.train if len(pair.prompt_ids) == 112]
    for step in range(steps):
        drawn = [texts[(step * batch + i) % len(texts)] for i in range(batch)]
        ids = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-100)
        model(input_ids=ids.clamp(min=0), labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def lora(kind: str) -> Any:
    from peft import LoraConfig

    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}[kind]
    return LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")


# --- the two runs -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a trainer logged of each optimizer step, and how many rows it ran in it.

    The loss is the sum of what was differentiated, since ``Trainer`` adds losses up in float32.
    """

    lines: list[dict[str, float]]
    rows: list[int]
    layer_calls: int
    trainer: Any


@dataclass
class Watch(TrainerCallback):
    """Writes down the losses that a trainer hands to ``backward``, by optimizer step; counts how often a layer ran."""

    shares: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    layer_calls: int = 0

    def attach(self, trainer: Any) -> None:
        backward = trainer.accelerator.backward

        def watched(loss: Any, **settings: Any) -> None:
            # accelerate divides by this, which is 1 unless transformers 5.3 tells it of accumulation
            self.shares.append(loss.item() / trainer.accelerator.gradient_accumulation_steps)
            backward(loss, **settings)

        trainer.accelerator.backward = watched
        trainer.add_callback(self)
        parts = trainer.model.named_modules()
        mlp = next(module for name, module in parts if name.endswith((".mlp", ".feed_forward")))
        # before it runs, since a recomputation stops as soon as it has what the backward pass needs
        mlp.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.layer_calls += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self.shares)
        self.shares = []


def recipe_of(kind: str, with_lora: bool) -> Recipe:
    return LORA_RECIPE if with_lora else RECIPE[kind]


def plain_pairs(pairs: Sequence[BodyPair]) -> list[Pair]:
    return [Pair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]


def settings_of(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    """Settings with the same name and meaning here, in transformers and in TRL."""
    return {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "seed": SEED,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "lr_scheduler_type": "constant",
        **changes,
    }


def train_packed(
    example: Example,
    kind: str,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    pairs: list[BodyPair] | None = None,
    with_lora: bool = False,
    eval_pairs: list[BodyPair] | None = None,
    **changes: Any,
) -> Run:
    recipe = recipe or recipe_of(kind, with_lora)
    args = DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1, beta=recipe.beta, prove=False,  # its passes are not the run's
        **settings_of(recipe, **changes),
    )  # fmt: skip
    trainer = DPOTrainer(
        example.model(kind), None, args, train_dataset=as_dataset(pairs or example.pairs),
        eval_dataset=None if eval_pairs is None else as_dataset(eval_pairs),
        processing_class=example.task.tokenizer, peft_config=lora(kind) if with_lora else None,
    )  # fmt: skip
    watch = Watch()
    watch.attach(trainer)
    trainer.train()
    require_precision(trainer, DTYPE[kind])
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line, shares in zip(logged, watch.steps, strict=True):
        assert line["loss"] == pytest.approx(sum(shares), rel=1e-6)
    lines = [{**line, "loss": sum(shares)} for line, shares in zip(logged, watch.steps, strict=True)]
    return Run(lines, [len(shares) for shares in watch.steps], watch.layer_calls, trainer)


def require_precision(trainer: Any, dtype: torch.dtype) -> None:
    """The run really was in this precision: no autocast, weights and optimizer state alike."""
    assert trainer.accelerator.mixed_precision == "no"
    assert {p.dtype for p in trainer.model.parameters()} == {dtype}
    states = [s for state in trainer.optimizer.state.values() for name, s in state.items() if name != "step"]
    assert states
    assert {s.dtype for s in states} == {dtype}


def train_unpacked(
    example: Example,
    kind: str,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    pairs: list[BodyPair] | None = None,
    with_lora: bool = False,
    evaluate: Callable[[int, Any, Any], None] | None = None,
    **changes: Any,
) -> list[dict[str, float]]:
    recipe = recipe or recipe_of(kind, with_lora)
    plain = plain_pairs(pairs or example.pairs)
    order = sampled_steps(len(plain), folder, **settings_of(recipe, **changes))
    steps = [[[plain[i] for i in micro_batch] for micro_batch in step] for step in order]
    model, reference = example.model(kind), example.references[kind]
    if with_lora:
        from peft import get_peft_model

        set_seed(SEED)
        model = get_peft_model(model, lora(kind)).eval()
    after = None if evaluate is None else (lambda step: evaluate(step, model, reference))
    return run_unpacked(model, reference, steps, recipe, after)


@pytest.fixture(scope="module")
def ordinary(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, float]]]:
    """The unpacked run of a case, made once for all ways of packing it."""
    made: dict[Any, list[dict[str, float]]] = {}

    def curve(kind: str, with_lora: bool = False, **changes: Any) -> list[dict[str, float]]:
        key = (kind, with_lora, *sorted(changes.items()))
        if key not in made:
            made[key] = train_unpacked(example, kind, tmp_path_factory.mktemp("order"), with_lora=with_lora, **changes)
        return made[key]

    return curve


# --- the matrix -------------------------------------------------------------------------------------------------------

CHECKPOINTED = {
    "none": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: how a step's pairs are laid out, and what else is switched on."""

    kind: str
    rows: int
    batch: int = BATCH
    accumulation: int = 1
    budget: int = 0
    with_lora: bool = False
    checkpointing: str = "none"

    def __str__(self) -> str:
        parts = [self.kind, f"{self.rows} rows", f"{self.accumulation}x{self.batch} pairs"]
        parts += ["lora"] * self.with_lora + [self.checkpointing] * (self.checkpointing != "none")
        return ", ".join(parts)


def check(case: Case, example: Example, ordinary: Any, folder: Path) -> None:
    sizes = {"per_device_train_batch_size": case.batch, "gradient_accumulation_steps": case.accumulation}
    # of equal micro-batches the mean of means is the mean of all
    want = ordinary(case.kind, case.with_lora, per_device_train_batch_size=case.batch * case.accumulation)
    got = train_packed(
        example, case.kind, folder, max_tokens_per_row=case.budget or BUDGETS[case.rows], with_lora=case.with_lora,
        **sizes, **CHECKPOINTED[case.checkpointing],
    )  # fmt: skip
    assert got.rows == [case.rows] * STEPS
    # a checkpointed layer runs again in the backward pass, and one with an adapter once more without it as reference
    passes = case.rows * STEPS * (1 + (case.checkpointing != "none") + case.with_lora)
    # one pass more to learn how the model's head works
    assert passes <= got.layer_calls <= passes + 1
    assert_the_run_moved(want)
    assert_same_trajectory(got.lines, want, TOLERANCE[case.kind])


def assert_the_run_moved(lines: list[dict[str, float]]) -> None:
    """Thirty steps that change nothing would agree with anything."""
    assert max(abs(line["rewards/chosen"]) for line in lines) > 0.1
    assert len({line["loss"] for line in lines}) == len(lines)


# two micro-batches of a row each, two of two rows each (two pairs and one), three of a row each
ACCUMULATED = [
    {"rows": 2, "batch": 2, "accumulation": 2, "budget": BUDGETS[2]},
    {"rows": 4, "batch": 3, "accumulation": 2, "budget": BUDGETS[2]},
    {"rows": 3, "batch": 1, "accumulation": 3, "budget": BUDGETS[3]},
]
PLAIN = [{"rows": rows} for rows in BUDGETS]
QUICK = [
    Case("gpt2", **PLAIN[0]),
    Case("gpt2", **ACCUMULATED[2]),
    Case("gpt2", 2, with_lora=True),
]
MATRIX = [
    Case(kind, **layout, with_lora=with_lora, checkpointing=checkpointing)
    for kind in KINDS
    for layout in [*PLAIN, *ACCUMULATED]
    for with_lora in (False, True)
    for checkpointing in CHECKPOINTED
    if checkpointing == "none" or layout == PLAIN[1] or (layout == ACCUMULATED[1] and with_lora)
    # the larger steps where they are cheap
    if kind == "gpt2" or layout != ACCUMULATED[1]
]
# rows, pairs per micro-batch, accumulation, LoRA
AGAINST_TRL = [(1, 3, 1, False), (2, 3, 1, False), (3, 3, 1, False), (4, 3, 2, False), (2, 3, 1, True)]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_thirty_steps_are_the_ordinary_ones(case, example, ordinary, tmp_path) -> None:
    check(case, example, ordinary, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MATRIX if case not in QUICK], ids=str)
def test_thirty_steps_are_the_ordinary_ones_whatever_is_switched_on(case, example, ordinary, tmp_path) -> None:
    check(case, example, ordinary, tmp_path)


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_thirty_steps_of_a_model_with_states(name: str, example: Example, tmp_path: Path) -> None:
    architecture = zoo()[name]
    sizes = {"vocab_size": len(example.task.tokenizer), "num_hidden_layers": 2, "router_aux_loss_coef": 0.0,
             "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}  # fmt: skip
    config = getattr(transformers, architecture.config_class)(
        **{**architecture.config, **sizes, "layer_types": STATEFUL[name]}
    )
    set_seed(SEED)
    # weights as people have them: strong ones hand the roundings of a scan on, one step after another
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    example.models[name], example.references[name] = model, frozen_reference(model)
    want = train_unpacked(example, name, tmp_path / "unpacked")
    got = train_packed(example, name, tmp_path / "packed", max_tokens_per_row=BUDGETS[2]).lines
    assert_same_trajectory(got, want, TOLERANCE[name])
    assert_the_run_moved(want)


@pytest.fixture(scope="module")
def trl_curve(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, float]]]:
    """The run of an unmodified TRL trainer on the text of the same pairs, made once."""
    trl = pytest.importorskip("trl")
    made: dict[Any, list[dict[str, float]]] = {}

    def curve(with_lora: bool = False, **changes: Any) -> list[dict[str, float]]:
        key = (with_lora, *sorted(changes.items()))
        if key not in made:
            folder, model = tmp_path_factory.mktemp("trl"), example.model("llama")
            # it loads the reference from where the policy says it came from
            model.config._name_or_path = str(folder / "policy")
            model.save_pretrained(folder / "policy")
            args = trl.DPOConfig(
                output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                disable_tqdm=True, logging_steps=1, gradient_checkpointing=False, max_length=None,
                **settings_of(recipe_of("llama", with_lora), **changes),
            )  # fmt: skip
            texts = Dataset.from_list([as_text(pair, example.task.tokenizer) for pair in example.pairs])
            # of the adapter's first weights
            set_seed(SEED)
            trainer = trl.DPOTrainer(
                model, None, args, train_dataset=texts, processing_class=example.task.tokenizer,
                peft_config=lora("llama") if with_lora else None,
            )  # fmt: skip
            trainer.train()
            made[key] = [line for line in trainer.state.log_history if "loss" in line]
        return made[key]

    return curve


def test_the_example_s_model_follows_the_ordinary_run_and_that_of_trl(example, ordinary, trl_curve, tmp_path) -> None:
    got = train_packed(example, "llama", tmp_path, max_steps=5, max_tokens_per_row=BUDGETS[2])
    assert got.rows == [2] * 5
    for want in (ordinary("llama", max_steps=5), trl_curve(max_steps=5)):
        assert_same_trajectory(got.lines, want, TOLERANCE["llama"])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "batch", "accumulation", "with_lora"), AGAINST_TRL)
def test_thirty_steps_are_those_of_trl(example, trl_curve, tmp_path, rows, batch, accumulation, with_lora) -> None:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    want = trl_curve(with_lora, **sizes)
    budget = BUDGETS[rows] if accumulation == 1 else BUDGETS[2]
    got = train_packed(example, "llama", tmp_path, max_tokens_per_row=budget, with_lora=with_lora, **sizes)
    assert got.rows == [rows] * STEPS
    assert_the_run_moved(want)
    assert_same_trajectory(got.lines, want, TOLERANCE["llama"])


# --- epochs, schedules, clipping, evaluation --------------------------------------------------------------------------


def test_epochs_end_with_partial_batches_and_windows(example, tmp_path) -> None:
    """13 pairs: six batches of 2 and one of 1 in each epoch, so of three windows of 3 batches the last has but one."""
    changes = {
        "pairs": example.pairs[:13], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "num_train_epochs": 2, "max_steps": -1,
    }  # fmt: skip
    want = train_unpacked(example, "gpt2", tmp_path, **changes)
    got = train_packed(example, "gpt2", tmp_path, max_tokens_per_row=LONGEST + 1, **changes)
    assert got.rows == [6, 6, 1] * 2
    assert_same_trajectory(got.lines, want, TOLERANCE["gpt2"])


def test_a_linear_schedule_and_clipping(example, tmp_path) -> None:
    recipe = Recipe(2e-3, max_grad_norm=0.2, schedule=linear_with_warmup(3, 9))
    changes = {
        "max_steps": 9, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear", "warmup_steps": 3,
        "recipe": recipe,
    }  # fmt: skip
    want = train_unpacked(example, "gpt2", tmp_path, **changes)
    got = train_packed(example, "gpt2", tmp_path, max_tokens_per_row=2 * LONGEST, **changes)
    assert min(line["grad_norm"] for line in want) > 2 * recipe.max_grad_norm
    rates = [line["learning_rate"] for line in got.lines]
    assert rates == pytest.approx([recipe.learning_rate * recipe.schedule(step) for step in range(9)])
    assert_same_trajectory(got.lines, want, TOLERANCE["gpt2"])


def test_evaluation_disturbs_nothing(example, tmp_path) -> None:
    held_out = list(example.task.held_out[:10])
    judged: list[dict[str, float]] = []

    def evaluate(step: int, model: Any, reference: Any) -> None:
        if step % 4 == 0:
            judged.append(judge(model, reference, plain_pairs(held_out), RECIPE["gpt2"].beta))

    sizes = {"max_steps": 8, "per_device_train_batch_size": 4}
    want = train_unpacked(example, "gpt2", tmp_path, evaluate=evaluate, **sizes)
    got = train_packed(
        example, "gpt2", tmp_path, max_tokens_per_row=2 * LONGEST, eval_pairs=held_out, **sizes,
        eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=4,
    )  # fmt: skip
    assert_same_trajectory(got.lines, want, TOLERANCE["gpt2"])
    evaluated = [line for line in got.trainer.state.log_history if "eval_loss" in line]
    found = [{name: line[f"eval_{name}"] for name in judged[0]} for line in evaluated]
    for line, other in zip(found, judged, strict=True):
        # Trainer averages evaluation losses in float32
        assert line.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)
    assert_same_trajectory(found, judged, TOLERANCE["gpt2"])


def test_a_system_prompt_shared_by_a_step_changes_nothing(example, tmp_path) -> None:
    """Every pair begins with the same 150 tokens, which then run once for each row."""
    start = (example.pairs[0].prompt_ids + example.pairs[1].prompt_ids)[:150]
    pairs = [replace(pair, prompt_ids=start + pair.prompt_ids[1:]) for pair in example.pairs[:24]]
    changes = {"pairs": pairs, "max_steps": 6, "per_device_train_batch_size": 4}
    want = train_unpacked(example, "gpt2", tmp_path, **changes)
    got = train_packed(example, "gpt2", tmp_path, sharing="step", max_tokens_per_row=3 * LONGEST + 150, **changes)
    assert got.rows == [2] * 6
    # three or two beginnings of four are saved
    assert got.trainer.tokens["run"] == sum(map(tokens_of, pairs)) - 6 * 2 * 150
    assert_same_trajectory(got.lines, want, TOLERANCE["gpt2"])


# --- seeded bugs: each must break the comparison ----------------------------------------------------------------------


def per_row_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Objective.loss

    def of_the_row(self: Any, policy: Any, reference: Any, rows: Any, totals: Any, average: Any) -> Any:
        result = whole(self, policy, reference, rows, BatchTotals.of(rows[0].groups), average)
        return result._replace(loss=result.loss / 2)

    monkeypatch.setattr(Objective, "loss", of_the_row)


def unscaled_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    one = property(lambda self: 1, lambda self, value: None)
    monkeypatch.setattr(DPOTrainer, "current_gradient_accumulation_steps", one, raising=False)


def a_moving_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexdpo.training.model_loading.frozen_copy", lambda model: model)


def siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token reads all that stand before it in the row, as under a plain causal mask."""
    inputs = Row.inputs

    def leaking(self: Any) -> dict[str, Any]:
        self.layout.subtree_end.fill_(self.layout.length)
        return inputs(self)

    monkeypatch.setattr(Row, "inputs", leaking)


def responses_as_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second response counts its positions on from the first."""
    inputs = Row.inputs

    def counted(self: Any) -> dict[str, Any]:
        found = inputs(self)
        return {**found, "position_ids": torch.arange(self.layout.length)[None] % 512}

    monkeypatch.setattr(Row, "inputs", counted)


def one_pair_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = PackingCollator.__call__

    def repeating(self: Any, examples: Any) -> Any:
        return collate(self, [*examples[:-1], examples[0]])

    monkeypatch.setattr(PackingCollator, "__call__", repeating)


BUGS = [
    per_row_averages,
    unscaled_accumulation,
    a_moving_reference,
    siblings_see_each_other,
    responses_as_a_sequence,
    one_pair_twice,
]


@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.__name__ if bug else "none")
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_seeded_bug_breaks_the_comparison(example, ordinary, tmp_path, monkeypatch, kind, bug) -> None:
    changes = {"max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    want = ordinary(kind, **changes)
    if bug is not None:
        bug(monkeypatch)
    # two pairs in one row and the third in another
    got = train_packed(example, kind, tmp_path, max_tokens_per_row=BUDGETS[2], **changes)
    assert got.rows == [4] * 3
    gap = max(largest_gaps(got.lines, want).values())
    assert (gap > 10 * TOLERANCE[kind]) if bug is not None else (gap <= TOLERANCE[kind])
