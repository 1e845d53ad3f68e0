"""Preference data to tokenised groups, with every unusable row counted; rows are counted from 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from flexdpo.data.cache import map_settings
from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN, STATUS_COLUMNS, TOKENISED_COLUMNS, Settings, column_types
from flexdpo.data.encode import tokenize_batch, tokenizer_name
from flexdpo.data.ids import longest_if_usable
from flexdpo.data.images import images_of_row, is_processor, processing_digest, reader_of, tokenizer_of
from flexdpo.data.layouts import LAYOUTS, OWN_LAYOUT, described, settings_for
from flexdpo.data.mixture import Mixture
from flexdpo.data.pictures import paths_of
from flexdpo.data.report import Counts, DataReport, merged, none_usable, require_prompts
from flexdpo.errors import FlexdpoError, first_line, found, is_the_disks, nearest, quoted
from flexdpo.layout.groups import Group
from flexdpo.layout.sequences import require_count
from flexdpo.objective.unpaired import LabelledGroup

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)


class TokenizedPreferences(NamedTuple):
    """A tokenised dataset and the account of its rows.

    Its columns are ``prompt_ids: list[int]``, ``response_ids: list[list[int]]``, ``edges: list[list[int]]`` (pairs
    ``[chosen, rejected]`` of indices into ``response_ids``) and ``row: int`` (row of the source, from 0).
    """

    dataset: Dataset
    report: DataReport


def group_from_row(row: Mapping[str, Any]) -> Group:
    """Build the group of one row of a tokenised dataset (see :class:`TokenizedPreferences`)."""
    edges = [(chosen, rejected) for chosen, rejected in row["edges"]]
    group = Group.from_lists(row["prompt_ids"], row["response_ids"], edges, name=f"row {row['row']}")
    if row.get(IMAGES_COLUMN):
        images, image_token_id = images_of_row(row)
        group = replace(group, images=images, image_token_id=image_token_id)
    labels = row.get(LABELS_COLUMN)
    return LabelledGroup(**vars(group), labels=tuple(labels)) if labels else group


def largest_id(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> int:
    """Of the vocabulary."""
    return int(max(tokenizer_of(processing_class).get_vocab().values()))


def require_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token its EOS token as one: padding is never attended to and never scored."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise FlexdpoError(
            f"the tokenizer {tokenizer_name(tokenizer)} has neither a pad nor an EOS token; set tokenizer.eos_token "
            "to the token that ends a text in this vocabulary"
        )
    tokenizer.pad_token = tokenizer.eos_token


def tokenize_preferences(
    dataset: Dataset | Mixture,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> TokenizedPreferences:
    """Turn a preference dataset into token ids, as TRL's ``DPOTrainer`` does, and account for every row.

    A row is read as the first of ``flexdpo.data.layouts.LAYOUTS`` whose columns are all there, which the report names;
    this function's own output goes through as it is, with its other columns. Text or lists of messages; with messages,
    ``tools`` and ``chat_template_kwargs`` are honoured. Text responses end with the EOS token. A response is what
    follows the tokens that the prompt alone and prompt + response have in common.

    A processor as ``tokenizer`` reads the images of a column ``images`` or ``image`` too, as TRL does: paths, bytes and
    PIL images. A prompt is cut on its left to ``max_prompt_length`` tokens, once for all its responses, and a response
    on its right, to ``max_length`` tokens with its prompt; ``None`` is no limit. ``num_proc`` processes tokenise,
    ``None`` means this one alone; ``name`` is how errors, the progress bar and the report call the dataset.

    Returns:
        The usable rows in their order, and a report that counts the others by reason.

    Raises:
        FlexdpoError: for a setting, a column or a value (with its row) that cannot be used, or when no row is left.
    """
    from datasets import Dataset

    _require_tokenizer(tokenizer, name)
    if isinstance(dataset, Mixture):
        tokenize = partial(
            tokenize_preferences, tokenizer=tokenizer, max_length=max_length, truncation_mode=truncation_mode,
            max_prompt_length=max_prompt_length, num_proc=num_proc,
        )  # fmt: skip
        return _as_one([tokenize(each.data, name=f"{name}, {each.name}") for each in dataset.parts], name)
    if not isinstance(dataset, Dataset):
        raise FlexdpoError(f"{name}: expected a datasets.Dataset, found {type(dataset).__name__}; pick one split")
    require_settings(max_length, truncation_mode, num_proc, max_prompt_length)
    if len(dataset) == 0:
        raise FlexdpoError(f"{name}: the dataset has no rows; give a dataset with at least one")
    columns, largest = dataset.column_names, largest_id(tokenizer)
    settings = settings_for(columns, largest, max_length, name, images=is_processor(tokenizer))
    settings = replace(settings, max_prompt_length=max_prompt_length)
    plain = dataset.with_format(None)
    # this module's own output, of which no row is too long, stays as it is
    fits = settings.layout == OWN_LAYOUT and max_prompt_length is None
    if fits and (longest := longest_if_usable(plain, max_length, largest)) is not None:
        return TokenizedPreferences(
            plain, DataReport(name, len(plain), len(plain), longest=longest, layout=described(settings))
        )
    try:
        mapped = _map(plain, tokenizer, settings, num_proc, name)
    except FlexdpoError as error:
        # rows are tokenised without the name, so that it does not change what the cache finds
        raise FlexdpoError(f"{name}: {error}") from error
    return _account(mapped, settings, name)


def _require_tokenizer(tokenizer: Any, name: str) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin):
        raise FlexdpoError(
            f"{name}: expected a tokenizer or a processor, got {found(tokenizer)}; AutoTokenizer.from_pretrained loads "
            "a model's own"
        )
    if is_processor(tokenizer):
        # rows of a cache ask for it
        reader_of(tokenizer)


def _as_one(each: Sequence[TokenizedPreferences], name: str) -> TokenizedPreferences:
    from datasets import concatenate_datasets

    labelled = {LABELS_COLUMN in tokenised.dataset.column_names for tokenised in each}
    if len(labelled) > 1:
        raise FlexdpoError(f"{name}: some datasets hold labelled responses and others preferences; no loss takes both")
    # what was precomputed for some of them only
    columns = [*TOKENISED_COLUMNS, *([LABELS_COLUMN] if labelled == {True} else [])]
    rows = concatenate_datasets(
        [
            tokenised.dataset.select_columns(
                [*columns, *(c for c in (IMAGES_COLUMN,) if c in tokenised.dataset.column_names)]
            )
            for tokenised in each
        ]
    )
    return TokenizedPreferences(rows, merged(name, [tokenised.report for tokenised in each]))


def require_settings(
    max_length: int | None, truncation_mode: str, num_proc: int | None, max_prompt_length: int | None
) -> None:
    """Refuse settings of :func:`tokenize_preferences` that have no meaning."""
    if truncation_mode == "keep_end":
        raise FlexdpoError(
            "truncation_mode='keep_end' cuts every response's copy of the prompt at another place, so that nothing "
            "can be shared, and TRL has deprecated it; use 'keep_start'"
        )
    if truncation_mode != "keep_start":
        hint = nearest(str(truncation_mode), ["keep_start"])
        raise FlexdpoError(f"unknown truncation_mode {truncation_mode!r}{hint}; the only one is 'keep_start'")
    for name, value, least in (
        ("max_length", max_length, 2),  # a prompt and a response
        ("max_prompt_length", max_prompt_length, 1),
        ("num_proc", num_proc, 1),
    ):
        if value is not None:
            require_count(name, value, least)
    if max_prompt_length is not None and max_length is not None and max_prompt_length >= max_length:
        raise FlexdpoError(
            f"max_prompt_length={max_prompt_length} leaves no room for a response within max_length={max_length}; "
            "lower it, or raise max_length"
        )


def _map(dataset: Dataset, tokenizer: Any, settings: Settings, num_proc: int | None, name: str) -> Dataset:
    from datasets import Value
    from pyarrow import ArrowInvalid

    kept = carried_columns(dataset.column_names, settings)
    text, number = Value("string"), Value("int32")
    images = {"path": text, "bytes": Value("binary"), "digest": text, "tokens": number, "token_id": number}
    images["processor"] = text
    features = column_types(
        {
            **({LABELS_COLUMN: [Value("bool")]} if LAYOUTS[settings.layout].labelled else {}),
            **({IMAGES_COLUMN: [images]} if settings.images is not None else {}),
            **{column: dataset.features[column] for column in kept},
            **{column: Value("int64") for column in STATUS_COLUMNS},
        }
    )
    files = list(paths_of(dataset, settings.images)) if settings.images else []
    about = (processing_digest(tokenizer), astuple(settings), kept, *([files] if files else []))
    place = map_settings(dataset, about, "tokenized")
    tokenise = partial(
        dataset.map,
        tokenize_batch,
        with_indices=True,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        remove_columns=[column for column in dataset.column_names if column not in kept],
        features=features,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
        **place,
    )
    kept_there = sorted(_cached(place))
    try:
        return tokenise()
    except (OSError, ArrowInvalid) as error:
        if not kept_there or is_the_disks(error):
            raise
        logger.warning(f"{kept_there[0]} is damaged ({first_line(error)}), so it is written again")
    for file in kept_there:
        file.unlink(missing_ok=True)
    return tokenise()


def _cached(place: dict[str, Any]) -> list[Path]:
    """The files that a run before has left where ``map_settings`` says, one for each of its processes."""
    file = Path(place.get("cache_file_name", "nowhere"))
    return list(file.parent.glob(f"{file.stem}*{file.suffix}")) if "cache_file_name" in place else []


def carried_columns(columns: Sequence[str], settings: Settings) -> list[str]:
    """A dataset of ours may carry precomputed columns along; of anything else the columns have served their purpose."""
    return [column for column in columns if settings.layout == OWN_LAYOUT and column not in TOKENISED_COLUMNS]


def _account(mapped: Dataset, settings: Settings, name: str) -> TokenizedPreferences:
    """Count the status columns, then drop them and the rows that cannot be used."""
    status: dict[str, Any] = mapped.with_format("numpy", columns=[*STATUS_COLUMNS, "row"])[:]
    counts = Counts(settings)
    counts.add(status)
    report = counts.as_report(name, status["_whole"])
    require_prompts(name, counts, settings)
    if not report.used:
        raise none_usable(report)
    dataset = mapped.remove_columns(list(STATUS_COLUMNS))
    own = (*TOKENISED_COLUMNS, LABELS_COLUMN, IMAGES_COLUMN)
    stale = [column for column in dataset.column_names if column not in own]
    if report.truncated and stale:
        dataset = dataset.remove_columns(stale)
        dropped = f"dropped {quoted(stale)}, which belonged to the responses before they were cut"
        report = replace(report, notes=(*report.notes, dropped))
    if report.skipped:
        dataset = dataset.select(np.flatnonzero(status["_skip"] == 0))
    return TokenizedPreferences(dataset, report)
