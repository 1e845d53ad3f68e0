"""What flexdpo would do for a dataset, known before anything is trained: tokens, work, speed-up, memory and advice.

Tokens are counted on every row, by the trainer's own tokenisation. What depends on which rows meet in a batch (padding,
the longest row) is taken from one epoch in a random order, and what depends on every token's place (attention, sharing
across examples) from a sample of its batches, which is laid out as the trainer would.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.data.lengths import costs_of
from flexdpo.data.tokenize import TokenizedPreferences, tokenize_preferences
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.features import Layouts, features_of
from flexdpo.estimate.images import count_images
from flexdpo.estimate.lengths import count_rows, regrouped_tokens, shared_prefixes
from flexdpo.estimate.model_shapes import shape_config
from flexdpo.estimate.report import EpochTokens, Estimate, Lengths, RepeatedPrompts, advise, gains_over
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.estimate.stragglers import stragglers_of
from flexdpo.estimate.suggest import suggest
from flexdpo.hf.row_dependence import length_limits
from flexdpo.hf.unwrap import backbone_of, base_model
from flexdpo.training.memory import predict_memory, predict_padded_memory
from flexdpo.training.model_size import ModelSize, without_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def estimate_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: EstimateSettings | None = None, *, model: Any = None
) -> Estimate:
    """Predict what flexdpo would do for a dataset of preferences; ``print(result.table())`` shows all of it.

    The dataset is as for :func:`flexdpo.tokenize_preferences`; ``model``, in place of ``settings.shape``, is a model, a
    transformers config or a :class:`~flexdpo.training.model_size.ModelSize`.

    Raises:
        FlexdpoError: if the data cannot be used, hold no preferences, or a setting is wrong.
    """
    from datasets import Dataset

    settings, size = _sized(settings or EstimateSettings(), model)
    if not isinstance(dataset, Dataset):
        raise FlexdpoError(
            f"expected a datasets.Dataset, found {type(dataset).__name__}; pick one split, and do not stream it: "
            "rows are read from disk in batches anyway"
        )
    whole = len(dataset)
    if settings.sample is not None and settings.sample < whole:
        chosen = np.random.default_rng(settings.seed).choice(whole, settings.sample, replace=False)
        dataset = dataset.select(np.sort(chosen))
    options: dict[str, Any] = {"max_length": settings.max_length, "num_proc": settings.num_proc, "name": "data"}
    tokenised = tokenize_preferences(dataset, tokenizer, **options)
    return estimate_tokenised(tokenised, settings, model=size, dataset_rows=whole)


def _sized(settings: EstimateSettings, model: Any) -> tuple[EstimateSettings, ModelSize]:
    """The settings with the model's limits, where they name none, and its sizes, or those of the shape they name."""
    if model is None:
        return settings, settings.training_setup.measured(shape_config(settings.shape or "llama-8b"))
    if settings.shape is not None and not isinstance(model, ModelSize):
        raise FlexdpoError(f"shape={settings.shape!r} has no effect beside a model; leave one of them out")
    if not settings.limits and not isinstance(model, ModelSize):
        whole = base_model(model if hasattr(model, "parameters") else without_memory(model))
        settings = replace(settings, limits=length_limits(backbone_of(whole)).limits)
    return settings, settings.training_setup.measured(model)


def estimate_tokenised(
    tokenised: TokenizedPreferences,
    settings: EstimateSettings | None = None,
    *,
    model: Any = None,
    dataset_rows: int | None = None,
) -> Estimate:
    """The same for a dataset that was tokenised already; settings about that have no effect.

    ``dataset_rows`` are the rows of the dataset that this is a sample of.
    """
    settings, size = _sized(settings or EstimateSettings(), model)
    data, report = tokenised.dataset, tokenised.report
    counted = count_rows(data, limits=settings.limits)
    labelled = "labels" in data.column_names
    if not counted.edges.any() and not labelled:
        raise FlexdpoError(
            "the rows hold a prompt and a completion but no preferences, so there is nothing to compare; give "
            "'chosen' and 'rejected', or a 'label' beside each completion"
        )
    layouts = Layouts.of(data, counted, settings, in_pieces=not size.state_layers)
    unshared, shared = int(counted.unshared.sum()), int(counted.distinct.sum())
    # a label belongs to a row's own response, so rows with labels are never merged
    regrouped = shared if labelled else regrouped_tokens(data, counted, limits=settings.limits)
    features = features_of(data, counted, layouts, size, settings, regrouped)
    by_name = {feature.name: feature for feature in features}
    across, targets = by_name["across"].tokens, int(counted.targets.sum())
    setup, longest = settings.training_setup, {"packed": layouts.longest_packed, "shared": layouts.longest_shared}
    memory = {name: predict_memory(size, row.tokens, setup, targets=row.targets) for name, row in longest.items()}
    estimate = Estimate(
        report=report,
        dataset_rows=report.rows if dataset_rows is None else dataset_rows,
        lengths=Lengths.of(counted),
        tokens=EpochTokens(layouts.padded_tokens, unshared, shared, regrouped, across, targets),
        repeated=RepeatedPrompts.of(counted),
        images=count_images(data, size),
        prefixes=shared_prefixes(data, counted),
        features=features,
        speedup=gains_over(by_name, by_name["across" if settings.sharing == "step" else "sharing"]),
        rows_per_batch=layouts.rows_per_batch,
        memory={"padded": predict_padded_memory(size, layouts.longest_padded, setup), **memory},
        model=size,
        stragglers=stragglers_of(
            costs_of(counted.distinct, size.hidden),
            settings.processes,
            per_process=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
            balances=bool((counted.edges == 1).all()) and not labelled,
            seed=settings.seed,
        ),
        suggestion=suggest(size, settings, layouts, counted, by_name),
        settings=settings,
    )
    worth_it, advice = advise(estimate)
    return replace(estimate, worth_it=worth_it, advice=advice)
