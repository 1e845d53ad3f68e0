"""Preferences from a stream: read, tokenised and shuffled through bounded buffers, never held as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain, count, cycle, islice
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from flexdpo.config import DPOConfig
from flexdpo.data.draft import IMAGES_COLUMN, LABELS_COLUMN, TOKENISED_COLUMNS, Settings
from flexdpo.data.encode import tokenize_batch
from flexdpo.data.images import is_processor
from flexdpo.data.layouts import LAYOUTS, settings_for
from flexdpo.data.load import silent_json_reader
from flexdpo.data.mixture import Mixture, alternating
from flexdpo.data.pictures import undecoded_stream
from flexdpo.data.report import Counts, DataReport, merged, none_usable, require_prompts
from flexdpo.data.tokenize import carried_columns, largest_id, require_settings
from flexdpo.errors import FlexdpoError

_ROWS_AT_ONCE = 64
# rows of a stream without a usable one before that is an error
_PATIENCE = 1000


@dataclass(eq=False, repr=False)
class StreamedPreferences(IterableDataset[dict[str, Any]]):
    """Tokenised rows of a stream, as :func:`~flexdpo.data.tokenize.tokenize_preferences` makes them, in bounded memory.

    Every process and every worker of a ``DataLoader`` reads the whole stream and takes its share of whole batches, so
    batch ``k`` of one process without workers is batch ``k`` of all. The order is a function of the source, ``seed``
    and the epoch, so a run that skips the batches it has seen goes on exactly where it stopped.

    A training stream has no end: after the last row it begins again with the next epoch, and a batch may reach across
    the border. A stream for evaluation ends; where the last batch does not fill all processes, the first rows are
    repeated with their number ``row`` turned into ``-1 - row``, so that nobody counts them twice.

    Raises:
        FlexdpoError: for what cannot be used; while iterating, for a row, with its number, or a source that breaks off.
    """

    source: Any  # a ``datasets.IterableDataset``, or a mixture of some; shuffled anew each epoch if it was shuffled
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    _: KW_ONLY
    max_length: int | None  # most tokens of prompt + response
    truncation_mode: str = "keep_start"
    max_prompt_length: int | None = None
    name: str = "train"
    endless: bool = True
    batch_size: int = 1
    num_processes: int = 1
    shuffle_buffer: int = 0  # of so many tokenised rows; 0 keeps the order of the source
    seed: int = 0
    max_positions: int | None = None  # an example with more tokens is refused, as learned positions ask for
    epoch: int = field(default=0, init=False)
    # a run that continues from its last step would take one more: transformers counts a stream's steps once taken
    closed: bool = field(default=False, init=False)
    settings: Settings = field(init=False)
    _parts: list[StreamedPreferences] = field(init=False)
    _shares: list[float | None] = field(init=False)

    def __post_init__(self) -> None:
        require_settings(self.max_length, self.truncation_mode, None, self.max_prompt_length)
        if self.shuffle_buffer < 0:
            raise FlexdpoError(f"shuffle_buffer={self.shuffle_buffer}: use 0 to keep the order, or a number of rows")
        if isinstance(self.source, Mixture):
            self._parts = [
                StreamedPreferences(
                    part.data,
                    self.tokenizer,
                    max_length=self.max_length,
                    max_prompt_length=self.max_prompt_length,
                    name=f"{self.name}, {part.name}",
                    endless=False,
                    max_positions=self.max_positions,
                )
                for part in self.source.parts
            ]
            self._shares = [part.fraction for part in self.source.parts]
            if len({LAYOUTS[part.settings.layout].labelled for part in self._parts}) > 1:
                raise FlexdpoError(f"{self.name}: some streams hold labelled responses and others preferences")
            return
        self._parts, self._shares = [self], [None]
        if not is_stream(self.source):
            raise FlexdpoError(
                f"{self.name}: expected a datasets.IterableDataset, found {type(self.source).__name__}; pick one "
                "split, or wrap a Python generator with IterableDataset.from_generator"
            )
        if getattr(self.source, "_distributed", None) is not None:
            raise FlexdpoError(
                f"{self.name}: the stream was already split by process; give the whole stream to every process, "
                "batches are shared out here"
            )
        self.source = undecoded_stream(self.source.with_format(None))
        columns = self.source.column_names
        if columns is None and (columns := next(self._read(), None)) is None:
            raise FlexdpoError(f"{self.name}: the stream has no rows; give one with at least one")
        self.columns = list(columns)
        images = is_processor(self.tokenizer)
        settings = settings_for(self.columns, largest_id(self.tokenizer), self.max_length, self.name, images=images)
        self.settings = replace(settings, max_prompt_length=self.max_prompt_length)
        self._counts = Counts(self.settings)

    @classmethod
    def for_run(
        cls, source: Any, tokenizer: Any, args: DPOConfig, *, name: str, max_positions: int | None = None
    ) -> StreamedPreferences:
        """The stream of a run; refuses settings that need the whole dataset. It is trained on if called "train"."""
        training, sampling = name == "train", args.train_sampling_strategy
        needs_everything = {
            "precompute_ref_log_probs": args.precompute_ref_log_probs,
            f"train_sampling_strategy={sampling!r}": training and sampling in ("group_by_length", "batch_rebalance"),
            "regroup_prompts": training and args.regroup_prompts,
        }
        for setting, asked in needs_everything.items():
            if asked:
                raise FlexdpoError(
                    f"{setting} looks at the whole dataset, and a stream is read once; leave it out, or load the "
                    "dataset without streaming"
                )
        if training and args.max_steps <= 0:
            raise FlexdpoError("a stream has no length, so say how long to train: set max_steps")
        for strategy in ("eval_strategy", "save_strategy", "logging_strategy"):
            if training and getattr(args, strategy) == "epoch":
                raise FlexdpoError(f"{strategy}='epoch' has no meaning for a stream, which has no end; use 'steps'")
        # accelerate would otherwise read it in the first process and send it around, as it can tensors and not rows
        args.accelerator_config.dispatch_batches = False
        return cls(
            source,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            name=name,
            endless=training,
            batch_size=args.train_batch_size if training else args.eval_batch_size,
            num_processes=args.world_size,
            shuffle_buffer=args.stream_shuffle_buffer if training else 0,
            seed=args.seed if args.data_seed is None else args.data_seed,
            max_positions=max_positions,
        )

    @property
    def report(self) -> DataReport:
        """The account of the rows read so far in the first pass."""
        return merged(self.name, [part._counts.as_report(part.name) for part in self._parts])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration's first pass; the passes after it count on from there."""
        self.epoch = epoch

    def preview(self, rows: int) -> DataReport:
        """What becomes of the source's beginning, up to so many usable rows, for a word before training."""
        counts, wholes = self._new_counts(), [list[int]() for _ in self._parts]
        for _ in islice(self._rows(0, counts, wholes), rows):
            pass
        each = [
            count.as_report(f"{part.name}, its beginning", np.asarray(whole))
            for part, count, whole in zip(self._parts, counts, wholes, strict=True)
        ]
        return merged(f"{self.name}, its beginning", each)

    def sample(self, rows: int) -> datasets.Dataset:
        """The first usable rows of the source as a tokenised dataset, to look at before training or to compare by."""
        found = list(islice(self._rows(0, self._new_counts()), rows))
        if not found:
            raise none_usable(self.report)
        return datasets.Dataset.from_list(found)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.closed:
            return
        rows = chain.from_iterable(map(self._pass, count())) if self.endless else self._once()
        worker = get_worker_info()
        if worker is None or worker.num_workers == 1:
            yield from rows
            return
        size = self.batch_size * self.num_processes
        for number, row in enumerate(rows):
            # the loader takes one batch from each worker in turn
            if number // size % worker.num_workers == worker.id:
                yield row

    def _once(self) -> Iterator[dict[str, Any]]:
        size, first = self.batch_size * self.num_processes, list[dict[str, Any]]()
        for number, row in enumerate(self._pass(0)):
            if number < size:
                first.append(row)
            yield row
        if self.num_processes > 1:
            for row in islice(cycle(first), -(number + 1) % size):
                yield {**row, "row": -1 - row["row"]}

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        """One pass over the source, in the order of its epoch."""
        epoch, worker = self.epoch + number, get_worker_info()
        # every worker reads every row, so one of them counts for all; a later pass meets the same rows again
        counted = number == 0 and (worker is None or worker.id == 0)
        rows = self._rows(epoch, [part._counts for part in self._parts] if counted else self._new_counts())
        rows = _shuffled(rows, self.shuffle_buffer, (self.seed, epoch)) if self.shuffle_buffer else rows
        first = next(rows, None)
        if first is None:
            raise none_usable(self.report)
        yield first
        yield from rows

    def _new_counts(self) -> list[Counts]:
        return [Counts(part.settings) for part in self._parts]

    def _rows(
        self, epoch: int, counts: Sequence[Counts], wholes: Sequence[list[int] | None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The usable rows of all parts, one part after another or in turn."""
        wholes = wholes or [None] * len(counts)
        each = [
            part._usable(epoch, count, whole) for part, count, whole in zip(self._parts, counts, wholes, strict=True)
        ]
        shares = [share for share in self._shares if share is not None]
        return alternating(each, shares) if shares else chain.from_iterable(each)

    def _usable(self, epoch: int, counts: Counts, whole: list[int] | None = None) -> Iterator[dict[str, Any]]:
        """Tokenised rows in the order of the source; the others are counted, and uncut lengths put into ``whole``."""
        counts.clear()
        self.source.set_epoch(epoch)
        kept = carried_columns(self.columns, self.settings)
        more = [LABELS_COLUMN] if LAYOUTS[self.settings.layout].labelled else []
        more += [] if self.settings.images is None else [IMAGES_COLUMN]
        start = 0
        for batch in self._read():
            rows = len(next(iter(batch.values())))
            for column in self.columns:
                # a file without a value anywhere in this part of it has no such column here
                batch.setdefault(column, [None] * rows)
            indices = list(range(start, start + rows))
            try:
                tokenised = tokenize_batch(batch, indices, tokenizer=self.tokenizer, settings=self.settings)
            except FlexdpoError as error:
                raise FlexdpoError(f"{self.name}: {error}") from error
            start += rows
            counts.add(tokenised)
            if whole is not None:
                whole += tokenised["_whole"]
            require_prompts(self.name, counts, self.settings, so_far=True)
            if not counts.of("used") and start + _ROWS_AT_ONCE > _PATIENCE:
                raise none_usable(counts.as_report(f"{self.name}, the beginning of the stream"))
            columns = {column: tokenised[column] for column in (*TOKENISED_COLUMNS, *more)}
            columns |= {column: batch[column] for column in kept}
            for number, skip in enumerate(tokenised["_skip"]):
                if not skip:
                    self._require_usable(tokenised, number, kept)
                    yield {column: values[number] for column, values in columns.items()}
        if start:
            require_prompts(self.name, counts, self.settings)

    def _read(self) -> Iterator[dict[str, list[Any]]]:
        start = 0
        # iterated by batches, because a stream shares itself out among a loader's workers by files otherwise
        batches = iter(self.source.iter(batch_size=_ROWS_AT_ONCE))
        while True:
            try:
                with silent_json_reader():
                    batch = next(batches, None)
            except FlexdpoError:
                raise
            except Exception as error:  # formats, file systems and functions mapped over a stream may raise anything
                raise FlexdpoError(
                    f"{self.name}: the stream broke off in its rows {start} to {start + _ROWS_AT_ONCE - 1} (counted "
                    f"from 0): {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                ) from error
            if batch is None:
                return
            start += len(next(iter(batch.values())))
            yield batch

    def _require_usable(self, tokenised: dict[str, list[Any]], number: int, kept: list[str]) -> None:
        """What a dataset that is there as a whole is asked before training."""
        place = f"{self.name}: row {tokenised['row'][number]} (counted from 0)"
        longest = tokenised["_longest"][number]
        if self.max_positions is not None and longest > self.max_positions:
            raise FlexdpoError(
                f"{place} has {longest} tokens but the model has {self.max_positions} positions; set max_length to at "
                f"most {self.max_positions}"
            )
        if kept and tokenised["_cut"][number]:
            raise FlexdpoError(
                f"{place} is longer than max_length={self.settings.max_length}, and column {kept[0]!r} belongs to the "
                "uncut responses; raise max_length or drop the column"
            )


def _shuffled(rows: Iterator[dict[str, Any]], size: int, seed: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Fill a buffer, then hand out a random one of its rows for every row that comes."""
    generator = np.random.default_rng(seed)
    buffer: list[dict[str, Any]] = list(islice(rows, size))
    for row in rows:
        place = int(generator.integers(size))
        buffer[place], out = row, buffer[place]
        yield out
    for place in generator.permutation(len(buffer)):
        yield buffer[place]


def is_stream(dataset: object) -> bool:
    """Whether this is a ``datasets.IterableDataset``, or a mixture of some."""
    return dataset.streams if isinstance(dataset, Mixture) else isinstance(dataset, datasets.IterableDataset)
