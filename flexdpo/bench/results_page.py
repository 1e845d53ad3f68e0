"""The results page: what ``flexdpo bench`` measured, next to what the paper published, as Markdown in README.

Result files that say their ``kind`` hold what was computed and not timed: :mod:`flexdpo.bench.results_computed`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.bench.results_computed import ComputedFile
from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN = "<!-- results: written by `flexdpo results` from the files of `flexdpo bench`; edits here are lost -->"
END = "<!-- end of results -->"
# what others measured: profiles.json holds the figures
_PAPER = (
    "Paper: samples per second on 8 H100 with prompts shared, over packed FlashAttention-3; ideal by its token counts "
    "([arXiv:2410.20305](https://arxiv.org/abs/2410.20305), October 2024)."
)
# how the results name a baseline
_TITLES = {"padded_labels": "padded, logits at labels", "varlen": "shared by varlen_attn"}
_LEGEND = (
    "Over: median of the ratios of step times measured side by side (lower to upper quartile, where a step was "
    "measured more than once). Ideal: the ratio of the multiplications; efficiency: the one divided by the other, "
    "above 100% where the baseline loses more than its extra work. Memory: peak of a step beyond what was there "
    "before it, in GB."
)
_SHAPE_OF_A_RESULT = {
    "settings": ("device", "scale", "model", "pairs"),
    "environment": ("versions", "device", "threads", "date"),
    "profiles": (),
}


@dataclass(frozen=True)
class Speedup:
    """How many times faster the shared step is than a baseline.

    Attributes:
        median: Of the ratios measured side by side.
        low: Their lower quartile.
        high: Their upper quartile.
        ideal: Ratio of the multiplications.
        efficiency: ``median / ideal``.
    """

    median: float
    low: float
    high: float
    ideal: float
    efficiency: float


@dataclass(frozen=True)
class ProfileResult:
    """The figures of one length profile on one device.

    Attributes:
        name: The dataset whose lengths were drawn.
        speedups: By baseline, one of :data:`flexdpo.bench.bench.BASELINES`.
        tokens: By arm, the baselines and ``"shared"``: tokens run in all batches of the measurement.
        pairs_per_second: By arm.
        peak_bytes: By arm; ``None`` where the system cannot tell.
        rounds: By arm: how often each batch was measured; slow arms sit most rounds out.
    """

    name: str
    speedups: dict[str, Speedup]
    tokens: dict[str, int]
    pairs_per_second: dict[str, float]
    peak_bytes: dict[str, int | None]
    rounds: dict[str, int]


@dataclass(frozen=True)
class BenchFile:
    """One result file of ``flexdpo bench --json``.

    Attributes:
        path: Where it lies.
        settings: What was asked for.
        environment: Versions, device and date.
        dtype: Of the weights.
        checkpointing: Whether layers ran again in the backward pass.
        profiles: In the order of the file.
    """

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    dtype: str
    checkpointing: bool
    profiles: tuple[ProfileResult, ...]

    @property
    def title(self) -> str:
        """Device and model in words."""
        where = self.environment["device"]
        if self.settings["device"] == "cpu":
            threads = self.environment["threads"]
            where += f", {threads} thread" + ("s" if threads != 1 else "")
        return f"{where}: model `{self.settings['model']}`, {self.dtype}"

    @property
    def baselines(self) -> list[str]:
        """What was compared, in the order of the file."""
        return list(dict.fromkeys(name for profile in self.profiles for name in profile.speedups))


@dataclass(frozen=True)
class PaperFigures:
    """What the paper reports of one dataset, on 8 H100.

    Attributes:
        speedup: Shared over packed, both with packing; the baseline is FlashAttention-3.
        ideal: Ratio of the token counts at median lengths.
    """

    speedup: float
    ideal: float


def paper_figures() -> dict[str, PaperFigures]:
    """The published figures by profile, from the package's own file.

    Source:
        Wang & Hegde 2024, arXiv:2410.20305.
    """
    data = json.loads(files("flexdpo.bench").joinpath("profiles.json").read_text(encoding="utf-8"))
    return {
        name: PaperFigures(profile["published"]["speedup_vs_flash3"], profile["ideal_token_ratio_at_medians"])
        for name, profile in data["profiles"].items()
    }


@dataclass(frozen=True)
class OutsideFigure:
    """What somebody else published of their own training, with other models and data than ours.

    Attributes:
        who: The project.
        what: The run.
        device: One of the GPUs it ran on.
        source: Where it stands.
        date: Month and year.
        tokens_per_second: Per GPU.
        mfu: Share of the GPU's peak that the model's multiplications took.
    """

    who: str
    what: str
    device: str
    source: str
    date: str
    tokens_per_second: int
    mfu: float


def outside_figures() -> list[OutsideFigure]:
    """The figures that other projects published, from the package's own file."""
    data = json.loads(files("flexdpo.bench").joinpath("profiles.json").read_text(encoding="utf-8"))
    return [OutsideFigure(**figure) for figure in data["outside"]]


def load_results(folder: str | Path) -> list[BenchFile]:
    """Read the results of ``flexdpo bench --json`` in a folder; see :func:`load_files`."""
    return [found for found in load_files(folder) if isinstance(found, BenchFile)]


def load_files(folder: str | Path) -> list[BenchFile | ComputedFile]:
    """Read every ``*.json`` of a folder as a result of ``flexdpo bench --json``, or of the kind it names.

    Returns:
        The files, sorted by name, those that were timed before those that were computed.

    Raises:
        FlexdpoError: if the folder or its files are missing, or one is no such result; nothing is passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FlexdpoError(f"{folder}: no such folder; name the one with the files of flexdpo bench --json")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FlexdpoError(
            f"{folder} has no *.json; make one with flexdpo bench --json {folder / 'bench-cpu-tiny.json'}"
        )
    return sorted((load_result(path) for path in paths), key=lambda found: isinstance(found, ComputedFile))


def load_result(path: str | Path) -> BenchFile | ComputedFile:
    """Read one result of ``flexdpo bench --json``, or of the kind it names.

    Raises:
        FlexdpoError: if the file cannot be read or is something else.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlexdpoError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"{path} is not JSON ({error}); write it again with flexdpo bench --json") from error
    if isinstance(data, dict) and "kind" in data:
        return ComputedFile.of(path, data)
    _require_bench_result(path, data)
    try:
        return BenchFile(
            path,
            data["settings"],
            data["environment"],
            data["dtype"],
            data["gradient_checkpointing"],
            tuple(_profile(name, figures) for name, figures in data["profiles"].items()),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_a_result(path, f"its figures lack {error}") from error


def _require_bench_result(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        raise _not_a_result(path, f"found a {type(data).__name__} instead of an object")
    for part, names in _SHAPE_OF_A_RESULT.items():
        if not isinstance(data.get(part), dict):
            raise _not_a_result(path, f"{part!r} is missing")
        for name in names:
            if name not in data[part]:
                raise _not_a_result(path, f"{part!r} lacks {name!r}")
    if not data["profiles"]:
        raise _not_a_result(path, "it holds no profile")


def _not_a_result(path: Path, why: str) -> FlexdpoError:
    return FlexdpoError(f"{path} is not a result of flexdpo bench --json: {why}; keep other files elsewhere")


def _profile(name: str, figures: dict[str, Any]) -> ProfileResult:
    arms = figures["arms"]
    totals = {baseline: phases["total"] for baseline, phases in figures["speedups"].items()}
    return ProfileResult(
        name,
        {
            baseline: Speedup(*(float(total[part]) for part in ("median", "low", "high", "ideal", "efficiency")))
            for baseline, total in totals.items()
        },
        {arm: values["tokens"] for arm, values in arms.items()},
        {arm: values["pairs_per_second"] for arm, values in arms.items()},
        {arm: values["peak_bytes"] for arm, values in arms.items()},
        {arm: values["rounds"] for arm, values in arms.items()},
    )


# --- Markdown --------------------------------------------------------------------------------------------------------


def render_page(results: Sequence[BenchFile | ComputedFile]) -> str:
    """Write all results as Markdown: a table per file, how to read it, and what others published."""
    timed = [_section(result) for result in results if isinstance(result, BenchFile)]
    computed = [result.section() for result in results if isinstance(result, ComputedFile)]
    return "\n\n".join([*timed, f"{_LEGEND} {_PAPER}", _outside(), *computed])


def _outside() -> str:
    lines = [
        f"{figure.who}, {figure.what}: {figure.tokens_per_second:,} tokens/s per {figure.device}, {figure.mfu:.1%} MFU "
        f"([{figure.source.removeprefix('https://')}]({figure.source}), {figure.date})."
        for figure in outside_figures()
    ]
    return "\n".join(["Published by others, not measured here:", *lines])


def _section(result: BenchFile) -> str:
    return f"**{result.title}**\n\n{_table(result)}\n\n{_provenance(result)}"


def _table(result: BenchFile) -> str:
    paper = paper_figures()
    header = ["lengths of"]
    for baseline in result.baselines:
        header += [f"over {_TITLES.get(baseline, baseline)}", "ideal", "efficiency"]
    header += ["memory: " + " / ".join([*result.baselines, "shared"]), "paper: over packed", "ideal"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [_table_line(profile, result.baselines, paper.get(profile.name)) for profile in result.profiles]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table_line(profile: ProfileResult, baselines: list[str], paper: PaperFigures | None) -> list[str]:
    cells = [profile.name]
    for baseline in baselines:
        speedup = profile.speedups.get(baseline)
        if speedup is None:
            cells += ["", "", ""]
            continue
        # one measurement has no quartiles
        several = profile.rounds.get(baseline, 1) > 1
        quartiles = f" ({speedup.low:.2f} to {speedup.high:.2f})" if several else ""
        cells += [f"{speedup.median:.2f}{quartiles}", f"{speedup.ideal:.2f}", f"{speedup.efficiency:.0%}"]
    cells.append(" / ".join(_gigabytes(profile.peak_bytes.get(arm)) for arm in [*baselines, "shared"]))
    return [*cells, *(["", ""] if paper is None else [f"{paper.speedup:.2f}", f"{paper.ideal:.2f}"])]


def _gigabytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    # three digits, whatever the size
    return f"{count / 1e9:.1f}" if count >= 1e10 else f"{count / 1e9:.2f}"


def _provenance(result: BenchFile) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.environment["versions"].items())
    scale = result.settings["scale"]
    lengths = "" if scale == 1 else f", all lengths times {scale:g}"
    day = str(result.environment["date"])[:10]
    return f"{result.settings['pairs']} pairs per step{lengths}; {versions}; {day}; `{result.path.name}`."


def update_page(readme: str | Path, page: str, *, check: bool = False) -> bool:
    """Put a page between the two marker comments of a Markdown file.

    Args:
        readme: The file; it holds :data:`BEGIN` and :data:`END` once each.
        page: What stands between them.
        check: Leave the file as it is.

    Returns:
        Whether the file already said the same.

    Raises:
        FlexdpoError: if the file cannot be read or written, or lacks its markers.
    """
    path = Path(readme)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"{path} cannot be read: {error}; name the file with --readme") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise FlexdpoError(
            f"{path} needs these two lines once each, in this order, around the results:\n{BEGIN}\n{END}"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{page}\n\n{END}{after}"
    if new != text and not check:
        try:
            path.write_text(new, encoding="utf-8")
        except OSError as error:
            raise FlexdpoError(f"{path} cannot be written: {error.strerror}") from error
    return new == text
