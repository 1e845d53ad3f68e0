"""Result files of what was computed and not timed: kernels compiled for cards, and the head's work counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class ComputedFile:
    """One result file that names its kind.

    Attributes:
        path: Where it lies.
        data: What it holds.
    """

    path: Path
    data: dict[str, Any]

    @classmethod
    def of(cls, path: Path, data: dict[str, Any]) -> ComputedFile:
        """Take a file whose figures are complete.

        Raises:
            FlexdpoError: if the kind is unknown or figures are missing.
        """
        found = cls(path, data)
        if data["kind"] not in _KINDS:
            raise FlexdpoError(f"{path} holds results of the kind {data['kind']!r}; known: {', '.join(_KINDS)}")
        try:
            found.section()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FlexdpoError(f"{path} is no complete result of the kind {data['kind']!r}: {error!r}") from error
        return found

    def section(self) -> str:
        """Title, table and provenance as Markdown."""
        title, table = _KINDS[self.data["kind"]](self.data)
        versions = ", ".join(f"{name} {version}" for name, version in self.data["versions"].items())
        return f"**{title}**\n\n{table}\n\n{versions}; {self.data['date']}; `{self.path.name}`."


def _compiled(data: dict[str, Any]) -> tuple[str, str]:
    """A line per kernel, forward and backward beside each other; registers and bytes are a thread's or a block's."""
    header = ["card", "kernel", "tile", "registers", "spilled", "shared"]
    header += [f"backward: {name}" for name in header[2:]]
    lines = []
    for card, cases in data["cards"].items():
        for case, kernels in cases.items():
            cells = [cell for which in ("forward", "backward") for cell in _kernel_cells(kernels[which])]
            lines.append([f"{card} ({kernels['forward']['arch']})", case, *cells])
    title = f"Attention kernels as compiled, {data['dtype']}, not timed: no card was at hand"
    return title, _markdown(header, lines, words=2)


def _kernel_cells(kernel: dict[str, Any]) -> list[str]:
    tiles = kernel["tile"]
    pairs = [f"{queries} x {keys}" for queries, keys in zip(tiles[::2], tiles[1::2], strict=True)]
    shared = f"{kernel['shared_bytes'] / 1024:.0f} of {kernel['shared_limit'] / 1024:.0f} KB"
    return [", ".join(dict.fromkeys(pairs)), str(kernel["registers"]), f"{kernel['spilled_bytes']:,} B", shared]


def _head(data: dict[str, Any]) -> tuple[str, str]:
    size, card = data["size"], data["card"]
    title = (
        f"The head on an {card['name']} by arithmetic, not timed: {size['targets']} targets, "
        f"{size['vocabulary']} words, hidden size {size['hidden']}, {data['dtype']}, forward and backward"
    )
    header = [
        "four products at full speed",
        "the products made",
        "bytes moved beside them",
        "in all",
        "share of full speed",
    ]
    line = [
        f"{1e3 * data['ideal_seconds']:.1f} ms",
        f"{1e3 * data['product_seconds']:.1f} ms",
        f"{data['other_bytes'] / 1e9:.1f} GB",
        f"{1e3 * data['seconds']:.1f} ms",
        f"{data['efficiency']:.0%}",
    ]
    note = f"At {card['flops'] / 1e12:.0f} TFLOP/s and {card['bandwidth'] / 1e12:.2f} TB/s, one kernel after the other."
    return title, f"{_markdown(header, [line], words=0)}\n\n{note}"


def _markdown(header: list[str], lines: list[list[str]], *, words: int) -> str:
    """A table whose first columns hold words and the others figures."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


_KINDS: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "compiled kernels": _compiled,
    "head counted": _head,
}
