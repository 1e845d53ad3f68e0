"""The results page: what ``flexdpo bench`` measured, next to what the paper published, as Markdown in README.

Result files that say their ``kind`` hold what was computed and not timed: kernels compiled for cards, and the head's
work counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexdpo.bench.profiles import profile_data
from flexdpo.errors import FlexdpoError
from flexdpo.show.table import markdown

BEGIN = "<!-- results: written by `flexdpo results` from the files of `flexdpo bench`; edits here are lost -->"
END = "<!-- end of results -->"
_TIMED = "flexdpo bench --json"
# how the results name a baseline
_TITLES = {"padded_labels": "padded, logits at labels", "varlen": "shared by varlen_attn"}
_LEGEND = (
    "Over: median of the ratios of step times measured side by side (lower to upper quartile, where a step was "
    "measured more than once). Ideal: the ratio of the multiplications; efficiency: the one divided by the other, "
    "above 100% where the baseline loses more than its extra work. Memory: peak of a step beyond what was there "
    "before it, in GB. Paper: samples per second on 8 H100 with prompts shared, over packed FlashAttention-3; ideal by "
    "its token counts ([arXiv:2410.20305](https://arxiv.org/abs/2410.20305), October 2024)."
)


class ResultFile(NamedTuple):
    """A result file and what it holds."""

    path: Path
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        """What it is the result of."""
        return str(self.data.get("kind", _TIMED))

    def section(self) -> str:
        """Title, table and provenance as Markdown."""
        title, body, about = _KINDS[self.kind](self.data)
        return f"**{title}**\n\n{body}\n\n{about}; `{self.path.name}`."


def load_files(folder: str | Path) -> list[ResultFile]:
    """Read every ``*.json`` of a folder by :func:`load_result`; sorted by name, those that were timed first."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FlexdpoError(f"{folder}: no such folder; name the one with the files of flexdpo bench --json")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        example = folder / "bench-cpu-tiny.json"
        raise FlexdpoError(f"{folder} has no *.json; make one with flexdpo bench --json {example}")
    return sorted(map(load_result, paths), key=lambda found: found.kind != _TIMED)


def load_result(path: str | Path) -> ResultFile:
    """Read one result of ``flexdpo bench --json``, or of the kind it names; nothing else passes."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlexdpoError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"{path} is not JSON ({error}); write it again with flexdpo bench --json") from error
    if not isinstance(data, dict):
        raise FlexdpoError(f"{path} is no result: found a {type(data).__name__} instead of an object")
    found = ResultFile(path, data)
    if found.kind not in _KINDS:
        raise FlexdpoError(f"{path} holds results of the kind {found.kind!r}; known: {', '.join(_KINDS)}")
    try:
        found.section()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FlexdpoError(
            f"{path} is no complete result of the kind {found.kind!r}: {why}; keep other files elsewhere"
        ) from error
    return found


def render_page(results: Sequence[ResultFile]) -> str:
    """Write all results as Markdown: a table per file, how to read it, and what others published."""
    timed = [result.section() for result in results if result.kind == _TIMED]
    computed = [result.section() for result in results if result.kind != _TIMED]
    line = "{who}, {what}: {tokens_per_second:,} tokens/s per {device}, {mfu:.1%} MFU ([{site}]({source}), {date})."
    outside = [line.format(**of, site=of["source"].removeprefix("https://")) for of in profile_data()["outside"]]
    return "\n\n".join([*timed, _LEGEND, "\n".join(["Published by others, not measured here:", *outside]), *computed])


# --- the kinds: title, body and provenance of each -------------------------------------------------------------------


def _timed(data: dict[str, Any]) -> tuple[str, str, str]:
    """A line per length profile: the shared step over each baseline, its memory, and the paper's figures."""
    for part in ("settings", "environment", "profiles"):
        if not isinstance(data.get(part), dict):
            raise KeyError(part)
    settings, environment, profiles = data["settings"], data["environment"], data["profiles"]
    if not profiles:
        raise ValueError("it holds no profile")
    baselines = list(dict.fromkeys(name for figures in profiles.values() for name in figures["speedups"]))
    header = ["lengths of"]
    for baseline in baselines:
        header += [f"over {_TITLES.get(baseline, baseline)}", "ideal", "efficiency"]
    header += ["memory: " + " / ".join([*baselines, "shared"]), "paper: over packed", "ideal"]
    lines = [_profile_line(name, figures, baselines) for name, figures in profiles.items()]
    where = f"{environment['device']}{_threads(environment) if settings['device'] == 'cpu' else ''}"
    lengths = "" if settings["scale"] == 1 else f", all lengths times {settings['scale']:g}"
    about = f"{settings['pairs']} pairs per step{lengths}; {_provenance(environment)}"
    return f"{where}: model `{settings['model']}`, {data['dtype']}", markdown(header, lines), about


def _profile_line(name: str, figures: dict[str, Any], baselines: Sequence[str]) -> list[str]:
    cells, variants = [name], figures["variants"]
    for baseline in baselines:
        if baseline not in figures["speedups"]:
            cells += ["", "", ""]
            continue
        speed = figures["speedups"][baseline]["total"]
        # one measurement has no quartiles
        quartiles = f" ({speed['low']:.2f} to {speed['high']:.2f})" if variants[baseline]["rounds"] > 1 else ""
        cells += [f"{speed['median']:.2f}{quartiles}", f"{speed['ideal']:.2f}", f"{speed['efficiency']:.0%}"]
    cells.append(" / ".join(_gigabytes(variants.get(each, {}).get("peak_bytes")) for each in [*baselines, "shared"]))
    paper = profile_data()["profiles"].get(name)
    if paper is None:
        return [*cells, "", ""]
    return [*cells, f"{paper['published']['speedup_vs_flash3']:.2f}", f"{paper['ideal_token_ratio_at_medians']:.2f}"]


def _gigabytes(count: int | None) -> str:
    # three digits, whatever the size
    return "unknown" if count is None else f"{count / 1e9:.{1 if count >= 1e10 else 2}f}"


def _threads(environment: dict[str, Any]) -> str:
    return f", {environment['threads']} thread{'s' if environment['threads'] != 1 else ''}"


def _provenance(environment: dict[str, Any]) -> str:
    """The versions, whose seconds they are where not the clock's, and the day."""
    clock = "; seconds of the process alone" if environment.get("seconds_of") == "the process" else ""
    return f"{_versions(environment)}{clock}; {environment['date'][:10]}"


def _versions(of: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in of["versions"].items())


def _completions(data: dict[str, Any]) -> tuple[str, str, str]:
    """A line per number of completions and length of prompt: padded and shared, side by side."""
    header = ["completions", "prompt", "longest", "tokens padded", "shared", "fewer"]
    header += ["step padded", "shared", "faster", "gradients"]
    lines = []
    for step in data["steps"]:
        low, middle, high = step["speed_up"]
        tokens = [step["tokens_in"], step["tokens_run"]]
        cells = [str(step[name]) for name in ("completions", "prompt", "completion")]
        cells += [*(f"{count:,}" for count in tokens), f"{tokens[0] / tokens[1]:.2f}"]
        cells += [f"{1e3 * step[f'{kind}_seconds']:,.0f} ms" for kind in ("padded", "shared")]
        lines.append([*cells, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{step['gradient_error']:.0e}"])
    environment = data["environment"]
    where = f"{environment['device']}{_threads(environment)}"
    title = f"The drop-in on completions of one prompt, {where}: model `{data['model']}`, {data['dtype']}"
    note = (
        f"A completion has at least half the tokens of the longest; forward and backward of their "
        f"log-probabilities, logits at completions alone; medians of {data['rounds']} measured side by side, and how "
        "far any gradient is off, relative to its largest entry."
    )
    return title, f"{markdown(header, lines, words=0)}\n\n{note}", _provenance(environment)


def _compiled(data: dict[str, Any]) -> tuple[str, str, str]:
    """A line per kernel, forward and backward beside each other; registers and bytes are a thread's or a block's."""
    header = ["card", "kernel", "tile", "registers", "spilled", "shared"]
    header += [f"backward: {name}" for name in header[2:]]
    lines = []
    for card, cases in data["cards"].items():
        for case, kernels in cases.items():
            cells = [cell for which in ("forward", "backward") for cell in _kernel_cells(kernels[which])]
            lines.append([f"{card} ({kernels['forward']['arch']})", case, *cells])
    title = f"Attention kernels as compiled, {data['dtype']}, not timed: no card was at hand"
    return title, markdown(header, lines, words=2), f"{_versions(data)}; {data['date']}"


def _kernel_cells(kernel: dict[str, Any]) -> list[str]:
    tiles = kernel["tile"]
    pairs = [f"{queries} x {keys}" for queries, keys in zip(tiles[::2], tiles[1::2], strict=True)]
    shared = f"{kernel['shared_bytes'] / 1024:.0f} of {kernel['shared_limit'] / 1024:.0f} KB"
    return [", ".join(dict.fromkeys(pairs)), str(kernel["registers"]), f"{kernel['spilled_bytes']:,} B", shared]


def _head(data: dict[str, Any]) -> tuple[str, str, str]:
    size, card = data["size"], data["card"]
    title = (
        f"The head on an {card['name']} by arithmetic, not timed: {size['targets']} targets, "
        f"{size['vocabulary']} words, hidden size {size['hidden']}, {data['dtype']}, forward and backward"
    )
    cells = {
        "four products at full speed": f"{1e3 * data['ideal_seconds']:.1f} ms",
        "the products made": f"{1e3 * data['product_seconds']:.1f} ms",
        "bytes moved beside them": f"{data['other_bytes'] / 1e9:.1f} GB",
        "in all": f"{1e3 * data['seconds']:.1f} ms",
        "share of full speed": f"{data['efficiency']:.0%}",
    }
    note = f"At {card['flops'] / 1e12:.0f} TFLOP/s and {card['bandwidth'] / 1e12:.2f} TB/s, one kernel after the other."
    table = markdown(list(cells), [list(cells.values())], words=0)
    return title, f"{table}\n\n{note}", f"{_versions(data)}; {data['date']}"


_KINDS: dict[str, Callable[[dict[str, Any]], tuple[str, str, str]]] = {
    _TIMED: _timed,
    "completions timed": _completions,
    "compiled kernels": _compiled,
    "head counted": _head,
}


def update_page(readme: str | Path, page: str, *, check: bool = False) -> bool:
    """Put a page between the two lines of a file, unless this is a ``check``; returns whether it stood there before."""
    path = Path(readme)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"{path} cannot be read: {error}; name the file with --readme") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise FlexdpoError(
            f"{path} needs these two lines once each, in this order, around the results:\n{BEGIN}\n{END}"
        )
    new = f"{text.split(BEGIN)[0]}{BEGIN}\n\n{page}\n\n{END}{text.split(END)[1]}"
    if new != text and not check:
        try:
            path.write_text(new, encoding="utf-8")
        except OSError as error:
            raise FlexdpoError(f"{path} cannot be written: {error.strerror}") from error
    return new == text
