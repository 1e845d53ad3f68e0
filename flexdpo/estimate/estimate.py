"""What flexdpo would do for a dataset, known before anything is trained: tokens, work, speed-up, memory and advice.

Tokens are counted on every row, by the trainer's own tokenisation. What depends on which rows meet in a batch (padding,
the longest row) is taken from one epoch in a random order, and what depends on every token's place (attention, sharing
across examples) from a sample of its batches, which is laid out as the trainer would.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.data.tokenize import DataReport, TokenizedPreferences, tokenize_preferences
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.advice import Suggestion, advise, suggest
from flexdpo.estimate.costs import find_machine, shape_of
from flexdpo.estimate.features import Feature, Layouts, features_of
from flexdpo.estimate.lengths import (
    RowTokens,
    SharedPrefixes,
    classes_of,
    count_rows,
    regrouped_tokens,
    shared_prefixes,
)
from flexdpo.estimate.model_shapes import find_shape
from flexdpo.layout.row import tile_multiple
from flexdpo.training.memory import MemoryPrediction, ModelSize, TrainingSetup, predict_memory, predict_padded_memory
from flexdpo.training.row_budget import free_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# of an H100, the device whose costs are assumed where none is there
_ASSUMED_MEMORY = 80 * 10**9
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class EstimateSettings:
    """What to predict for.

    Attributes:
        shape: A model shape by name (see ``flexdpo bench --help``), where no model or config is given.
        device: ``"cuda"`` (an H100) or ``"cpu"`` (one core): whose costs the speed-up is predicted with.
        dtype: Of weights and activations: ``"float32"`` or ``"bfloat16"``; by default bfloat16 on CUDA.
        max_length: Longest prompt plus response in tokens.
        per_device_train_batch_size: Rows of the dataset in a forward pass of an ordinary trainer.
        gradient_accumulation_steps: Forward passes per optimizer step; flexdpo can take all in one.
        max_tokens_per_row: Longest packed row; ``None`` puts a batch into one row.
        gradient_checkpointing: Whether layers run again in the backward pass.
        reference: Whether a reference model runs beside the policy, and its weights are kept.
        sharing: ``"step"`` shares across the examples of a batch too, as in the trainer.
        setup: How the model is trained, for the memory; by default from the above, all weights by AdamW.
        memory: Bytes of the device; by default what is free on it, or 80 GB for a GPU that is not there.
        sample: Use this many rows of the dataset, drawn at random.
        num_proc: Processes that tokenise.
        batches: Batches of the sample that are laid out token by token.
        seed: Of the sample and of the order.
    """

    shape: str = "llama-8b"
    device: str = "cuda"
    dtype: str | None = None
    max_length: int | None = 1024
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_tokens_per_row: int | None = None
    gradient_checkpointing: bool = False
    reference: bool = True
    sharing: str = "group"
    setup: TrainingSetup | None = None
    memory: int | None = None
    sample: int | None = None
    num_proc: int | None = None
    batches: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        find_machine(self.device)
        if self.dtype is None:
            object.__setattr__(self, "dtype", "bfloat16" if self.device == "cuda" else "float32")
        if self.dtype not in _DTYPE_BYTES:
            raise FlexdpoError(f"dtype {self.dtype!r} is unknown; use {' or '.join(_DTYPE_BYTES)}")
        names = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_tokens_per_row",
            "sample",
            "batches",
        )
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {value}")

    @property
    def training_setup(self) -> TrainingSetup:
        """How the model is trained, as far as memory depends on it."""
        if self.setup is not None:
            return self.setup
        width = _DTYPE_BYTES[str(self.dtype)]
        return TrainingSetup(
            weight_bytes=width,
            compute_bytes=width,
            gradient_checkpointing=self.gradient_checkpointing,
            reference=self.reference,
            device_type=self.device,
        )

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens, as the trainer does."""
        return tile_multiple(self.device)


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over rows or responses."""

    mean: float
    median: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread:
        """The spread of at least one value."""
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="higher").tolist()
        return cls(float(values.mean()), int(median), int(p90), int(p99), int(values.max()))


@dataclass(frozen=True)
class Lengths:
    """Lengths of the used rows, in tokens.

    Attributes:
        prompt: Of the prompts.
        response: Of the responses, one by one.
        longest: Of each row's prompt with its longest response.
        unshared: Of each row as an ordinary trainer runs it: its prompt once for each response.
        distinct: Of each row's trie: what flexdpo runs.
        responses: Number of rows by number of responses ``K``.
    """

    prompt: Spread
    response: Spread
    longest: Spread
    unshared: Spread
    distinct: Spread
    responses: dict[int, int]

    @classmethod
    def of(cls, counted: RowTokens) -> Lengths:
        """The lengths of counted rows."""
        numbers, counts = np.unique(counted.responses, return_counts=True)
        return cls(
            Spread.of(counted.prompts),
            Spread.of(counted.response_tokens),
            Spread.of(counted.longest),
            Spread.of(counted.unshared),
            Spread.of(counted.distinct),
            dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        )


@dataclass(frozen=True)
class EpochTokens:
    """Tokens of one epoch, in the order of what is saved. All but ``padded`` and ``across`` are exact.

    Attributes:
        padded: As an ordinary trainer runs them in batches padded to their longest.
        unshared: The same without padding: the trainer's ``tokens/unshared``.
        shared: With every group's prompt once: the trainer's ``tokens/run``, under ``sharing="group"``.
        regrouped: With rows that have the same prompt merged (``regroup_prompts=True``).
        across: With common beginnings of the examples of a batch shared as well (``sharing="step"``).
        targets: Distinct response tokens, whose log-probabilities are computed.
    """

    padded: int
    unshared: int
    shared: int
    regrouped: int
    across: int
    targets: int

    @property
    def shared_share(self) -> float:
        """Share of an ordinary trainer's tokens that are never run, padding not counted."""
        return 1 - self.shared / self.unshared


@dataclass(frozen=True)
class RepeatedPrompts:
    """Rows whose prompts are the same.

    Attributes:
        prompts: Distinct prompts that occur more than once.
        rows: Rows with such a prompt.
        most: Rows with the most frequent one.
    """

    prompts: int
    rows: int
    most: int

    @classmethod
    def of(cls, counted: RowTokens) -> RepeatedPrompts:
        """Those of counted rows."""
        _, counts = classes_of(counted.prompt_keys)
        repeated = counts[counts > 1]
        return cls(int(repeated.size), int(repeated.sum()), int(counts.max()))


@dataclass(frozen=True)
class Estimate:
    """The prediction for a dataset.

    Attributes:
        report: What becomes of every row, as the trainer reports it.
        dataset_rows: Rows of the whole dataset; more than ``report.rows`` where a sample was used.
        lengths: Of the used rows.
        tokens: Of an epoch over the used rows.
        repeated: Rows with equal prompts.
        prefixes: Rows that begin alike.
        features: What each feature contributes, each on top of those before it; the first is padded training.
        speedup: Predicted gain of a step with the settings as they are, over ``"padded"`` and ``"packed"`` training.
        rows_per_batch: Packed rows, and so forward passes, that a batch takes on average.
        memory: Predicted bytes at the peak of a step of ``"padded"``, ``"packed"`` and ``"shared"`` training.
        model: The sizes that work and memory were predicted with.
        suggestion: Settings to train with.
        advice: Plain sentences, the verdict first.
        worth_it: Whether sharing is predicted to gain at least a tenth over packed or padded training.
        settings: What was asked for.
    """

    report: DataReport
    dataset_rows: int
    lengths: Lengths
    tokens: EpochTokens
    repeated: RepeatedPrompts
    prefixes: SharedPrefixes
    features: tuple[Feature, ...]
    speedup: dict[str, float]
    rows_per_batch: float
    memory: dict[str, MemoryPrediction]
    model: ModelSize
    suggestion: Suggestion
    advice: tuple[str, ...]
    worth_it: bool
    settings: EstimateSettings

    @property
    def is_sample(self) -> bool:
        """Whether only part of the dataset was looked at."""
        return self.report.rows < self.dataset_rows

    def as_json(self) -> dict[str, Any]:
        """Plain values, with totals beside the parts of memory."""
        values = asdict(self)
        values["tokens"]["shared_share"] = self.tokens.shared_share
        values["is_sample"] = self.is_sample
        for name, predicted in self.memory.items():
            values["memory"][name]["total"] = predicted.total
        return values

    def table(self) -> str:
        """The prediction in aligned lines, for people."""
        from flexdpo.estimate.table import estimate_table

        return estimate_table(self)


def estimate_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: EstimateSettings | None = None,
    *,
    model: Any = None,
) -> Estimate:
    """Predict what flexdpo would do for a dataset of preferences.

    Args:
        dataset: Text or messages, or token ids; see :func:`flexdpo.tokenize_preferences`.
        tokenizer: Of the model to train.
        settings: What to predict for.
        model: A model, a transformers config or a :class:`~flexdpo.training.memory.ModelSize` in place of
            ``settings.shape``.

    Returns:
        Counts, predictions, a configuration and advice. ``print(result.table())`` shows all of it.

    Raises:
        FlexdpoError: if the data cannot be used, hold no preferences, or a setting is wrong.
    """
    settings = settings or EstimateSettings()
    size = model_size(settings, model)
    _require_dataset(dataset)
    whole = len(dataset)
    if settings.sample is not None and settings.sample < whole:
        chosen = np.random.default_rng(settings.seed).choice(whole, settings.sample, replace=False)
        dataset = dataset.select(np.sort(chosen))
    tokenised = tokenize_preferences(
        dataset, tokenizer, max_length=settings.max_length, num_proc=settings.num_proc, name="data"
    )
    return estimate_tokenised(tokenised, settings, model=size, dataset_rows=whole)


def _require_dataset(dataset: Any) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise FlexdpoError(
            f"expected a datasets.Dataset, found {type(dataset).__name__}; pick one split, and do not stream it: "
            "rows are read from disk in batches anyway"
        )


def model_size(settings: EstimateSettings, model: Any = None) -> ModelSize:
    """The sizes to predict with: those of ``model``, or of the shape that the settings name."""
    if model is not None:
        return ModelSize.of(model)
    return replace(ModelSize.of(find_shape(settings.shape).config()), name=settings.shape)


def estimate_tokenised(
    tokenised: TokenizedPreferences,
    settings: EstimateSettings | None = None,
    *,
    model: Any = None,
    dataset_rows: int | None = None,
) -> Estimate:
    """The same for a dataset that was tokenised already.

    Args:
        tokenised: From :func:`flexdpo.tokenize_preferences`.
        settings: What to predict for; those about tokenisation have no effect.
        model: As in :func:`estimate_dataset`.
        dataset_rows: Rows of the dataset that this is a sample of.
    """
    settings = settings or EstimateSettings()
    data = tokenised.dataset
    counted = count_rows(data)
    labelled = "labels" in data.column_names
    _require_preferences(counted, labelled)
    size = model_size(settings, model)
    layouts = Layouts.of(data, counted, settings)
    prefixes, repeated = shared_prefixes(data, counted), RepeatedPrompts.of(counted)
    # a label belongs to a row's own response, so rows with labels are never merged
    regrouped = int(counted.distinct.sum()) if labelled else regrouped_tokens(data, counted)
    machine = find_machine(settings.device)
    features = features_of(data, counted, layouts, settings, shape_of(size), machine, regrouped=regrouped)
    by_name = {feature.name: feature for feature in features}
    tokens = EpochTokens(
        padded=layouts.padded_tokens,
        unshared=int(counted.unshared.sum()),
        shared=int(counted.distinct.sum()),
        regrouped=regrouped,
        across=by_name["across"].tokens,
        targets=int(counted.targets.sum()),
    )
    memory = _memory(size, settings, layouts)
    suggestion = suggest(size, settings, layouts, counted, by_name, free=_device_memory(settings))
    worth_it, advice = advise(settings, tokenised.report, tokens, repeated, prefixes, by_name, memory, suggestion)
    return Estimate(
        report=tokenised.report,
        dataset_rows=tokenised.report.rows if dataset_rows is None else dataset_rows,
        lengths=Lengths.of(counted),
        tokens=tokens,
        repeated=repeated,
        prefixes=prefixes,
        features=features,
        speedup=_speedup(by_name, settings),
        rows_per_batch=layouts.rows_per_batch,
        memory=memory,
        model=size,
        suggestion=suggestion,
        advice=advice,
        worth_it=worth_it,
        settings=settings,
    )


def _require_preferences(counted: RowTokens, labelled: bool) -> None:
    if not counted.edges.any() and not labelled:
        raise FlexdpoError(
            "the rows hold a prompt and a completion but no preferences, so there is nothing to compare; give "
            "'chosen' and 'rejected', or a 'label' beside each completion"
        )


def _speedup(features: dict[str, Feature], settings: EstimateSettings) -> dict[str, float]:
    """Over padded training, and over packed training, which computes log-probabilities at the targets too."""
    mine = features["across" if settings.sharing == "step" else "sharing"]
    return {name: features[arm].seconds / mine.seconds for name, arm in (("padded", "padded"), ("packed", "targets"))}


def _memory(size: ModelSize, settings: EstimateSettings, layouts: Layouts) -> dict[str, MemoryPrediction]:
    setup = settings.training_setup
    packed, shared = layouts.longest_packed, layouts.longest_shared
    return {
        "padded": predict_padded_memory(size, layouts.longest_padded, setup),
        "packed": predict_memory(size, packed.tokens, setup, targets=packed.targets),
        "shared": predict_memory(size, shared.tokens, setup, targets=shared.targets),
    }


def _device_memory(settings: EstimateSettings) -> int:
    if settings.memory is not None:
        return settings.memory
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        return _ASSUMED_MEMORY
    return free_memory(settings.device)


__all__ = [
    "EpochTokens",
    "Estimate",
    "EstimateSettings",
    "Feature",
    "Lengths",
    "RepeatedPrompts",
    "Spread",
    "Suggestion",
    "estimate_dataset",
    "estimate_tokenised",
    "model_size",
]
