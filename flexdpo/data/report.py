"""What became of the rows of a dataset or a stream: counted once, told in the same words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexdpo.data.draft import EMPTY_PROMPT, NOTES, SKIP_REASONS, Settings
from flexdpo.data.layouts import described
from flexdpo.errors import FlexdpoError, quoted

# more rows without a prompt than this are no oversight: of a column, and of common beginnings
_MOST_EMPTY = {True: 0.5, False: 0.1}
# too few rows of a stream to judge by
_FEWEST_ROWS = 64
_NUMBERS = ("rows", "used", "truncated", "responses", "cut", "longest")


@dataclass(frozen=True)
class DataReport:
    """What became of every row of a dataset; ``used + sum(skipped.values()) == rows``."""

    name: str
    rows: int
    used: int
    # how many were left out for each of ``SKIP_REASONS`` that occurred, and the first row, counted from 0
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0  # used rows of which at least one response was cut to fit ``max_length``
    longest: int = 0  # tokens of the longest used prompt with one response behind it
    notes: tuple[str, ...] = ()  # what else happened to the rows, one sentence each
    layout: str = ""  # as what the rows were read, and the columns

    def summary(self) -> str:
        """Return one line for people, one for the layout and one for each note."""
        parts = [f"{self.used} of {self.rows} rows used"]
        if self.truncated:
            parts.append(f"{self.truncated} of them cut to max_length")
        parts += [f"skipped {n} ({why}, first at row {self.first_skipped[why]})" for why, n in self.skipped.items()]
        more = [f"read as {self.layout}"] if self.layout else []
        more += [f"note: {note}" for note in self.notes]
        return "\n  ".join([f"{self.name}: {'; '.join(parts)}", *more])


class Counts:
    """Counters in memory that a loader's worker processes share with the one that reports."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        names = [*_NUMBERS, *SKIP_REASONS, *NOTES]
        self._place = {name: number for number, name in enumerate(names)}
        # how often, and the row where first
        self._values = torch.zeros(len(names), 2, dtype=torch.int64).share_memory_()

    def clear(self) -> None:
        """Begin again."""
        self._values.zero_()

    def add(self, tokenised: Mapping[str, Any]) -> None:
        """Count a batch of :func:`~flexdpo.data.encode.tokenize_batch`, as lists or arrays."""
        columns = {name: np.asarray(tokenised[name]) for name in ("row", "_skip", "_cut", "_responses", "_longest")}
        rows, used = columns["row"], columns["_skip"] == 0
        cut = columns["_cut"][used]
        values = self._values.numpy().copy()
        added = (len(rows), used.sum(), (cut > 0).sum(), columns["_responses"][used].sum(), cut.sum())
        values[: len(added), 0] += added
        longest = self._place["longest"], 0
        values[longest] = max(values[longest], columns["_longest"][used].max(initial=0))
        found = {reason: columns["_skip"] == code for code, reason in enumerate(SKIP_REASONS, start=1)}
        found |= {column: used & (np.asarray(tokenised[column]) > 0) for column in NOTES}
        for name, hits in found.items():
            entry = values[self._place[name]]
            if hits.any() and not entry[0]:
                entry[1] = rows[hits.argmax()]
            entry[0] += hits.sum()
        # in one go, so that whoever looks meanwhile finds sums that fit
        self._values.copy_(torch.from_numpy(values))

    def of(self, name: str) -> int:
        """How many there are of one of the numbers, the reasons to skip and the notes."""
        return int(self._values[self._place[name], 0])

    def as_report(self, name: str, whole: NDArray[np.int64] | None = None) -> DataReport:
        """The account so far; ``whole`` are the rows' uncut lengths, 0 where they are not known."""
        values = {field: self._values[place].tolist() for field, place in self._place.items()}
        rows, used, truncated, responses, cut, longest = (values[field][0] for field in _NUMBERS)
        skipped = {reason: values[reason][0] for reason in SKIP_REASONS if values[reason][0]}
        first = {reason: values[reason][1] for reason in skipped}
        notes = [f"not read: {quoted(self._settings.unread)}"] if self._settings.unread else []
        if cut:
            keeps = None if whole is None or not whole.any() else fitting_length(whole)
            notes.append(cut_note(cut, responses, self._settings.max_length, keeps))
        for column, text in NOTES.items():
            number, row = values[column]
            if number:
                notes.append(f"{text} in {number} rows, first at row {row}")
        how = described(self._settings)
        return DataReport(name, rows, used, skipped, first, truncated, longest, tuple(notes), how)


def merged(name: str, reports: Sequence[DataReport]) -> DataReport:
    """One account of several datasets; what is said of rows says of which dataset."""
    if len(reports) == 1:
        return reports[0]
    skipped: dict[str, int] = {}
    first: dict[str, int] = {}
    for report in reports:
        for reason, number in report.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + number
            first.setdefault(reason, report.first_skipped[reason])
    return DataReport(
        name,
        sum(report.rows for report in reports),
        sum(report.used for report in reports),
        skipped,
        first,
        sum(report.truncated for report in reports),
        max(report.longest for report in reports),
        tuple(line.strip() for report in reports for line in report.summary().splitlines()),
        f"a mixture of {len(reports)} datasets",
    )


def fitting_length(whole: NDArray[np.int64]) -> int:
    """The ``max_length`` that would cut no response of 95 % of the rows.

    Args:
        whole: Tokens of each row's longest response and its prompt, uncut; 0 where they are not known.
    """
    return int(np.quantile(whole[whole > 0], 0.95, method="inverted_cdf"))


def cut_note(cut: int, responses: int, max_length: int | None, keeps: int | None = None) -> str:
    """Say how many responses lost their end to ``max_length``, and which one would keep 95 % of the rows whole."""
    way_out = (
        f"; max_length={keeps} would keep 95 % of the rows whole" if keeps and keeps > (max_length or keeps) else ""
    )
    said = f"{cut} of {responses} responses cut to max_length={max_length}, and without the token that ends them"
    if 2 * cut > responses:
        said += ": more than half of all, so that the model would not learn to end a response"
    return said + way_out


def none_usable(report: DataReport) -> FlexdpoError:
    """The error for a dataset without a row to train on, with the reasons."""
    counts = [
        f"{n} skipped ({reason}, first at row {report.first_skipped[reason]})" for reason, n in report.skipped.items()
    ]
    why = "; ".join(counts) or "there are none"
    return FlexdpoError(f"{report.name}: none of the {report.rows} rows can be used: {why}")


def require_prompts(name: str, counts: Counts, settings: Settings, *, so_far: bool = False) -> None:
    """Refuse a dataset of which many rows have no prompt, or have it twice.

    Args:
        name: How the error calls it.
        counts: Of its rows.
        settings: How they were read.
        so_far: More rows will come, so too few are not judged by.

    Raises:
        FlexdpoError: with the counts, the columns that are not read and the way out.
    """
    rows = counts.of("rows")
    if settings.largest_id is not None or (so_far and rows < _FEWEST_ROWS):
        return
    column = settings.prompt[0] if settings.prompt else None
    without = counts.of(EMPTY_PROMPT) + counts.of("_promptless")
    # where no row can be used, the reasons say more
    if (counts.of("used") or column is None) and without > _MOST_EMPTY[column is not None] * rows:
        why = (
            f"column {column!r} is empty" if column else "there is no column 'prompt' and the responses begin otherwise"
        )
        others = f" (not read: {quoted(settings.unread)})" if settings.unread else ""
        raise FlexdpoError(
            f"{name}: {without} of {rows} rows have an empty prompt: {why} there; give every row its prompt in a "
            f"column 'prompt'{others}"
        )
    twice = counts.of("_echoed")
    if 2 * twice > rows:
        raise FlexdpoError(
            f"{name}: in {twice} of {rows} rows every response begins with the text of the prompt, which so stands "
            f"twice; cut it off the responses, or drop column {column!r}: the prompt is what they begin with"
        )
