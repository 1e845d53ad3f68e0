"""Training curves from a metrics file, and the two functions every picture of flexdpo is made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

TRAIN_COLOUR = "#2b6cb0"
EVAL_COLOUR = "#c2410c"
PLOTTED_KEYS = ("loss", "rewards/accuracies", "rewards/margins")


class Curve(NamedTuple):
    """One logged quantity over the steps of one phase.

    Attributes:
        steps: Optimizer steps, ``[N]`` float64, ascending.
        values: The logged values, ``[N]`` float64; NaN where the run logged NaN.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """Make a matplotlib figure of ``width x height`` inches on the Agg canvas, leaving pyplot's state alone.

    Nothing is registered with pyplot, so drawing inside somebody's notebook changes neither their backend nor
    their open figures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path``; the file's ending chooses the format (``.png``, ``.pdf``, ``.svg``, ...).

    Raises:
        FlexdpoError: if the folder does not exist or matplotlib cannot write such files.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FlexdpoError(f"{path}: the folder {path.parent} does not exist; create it first")
    ending, known = path.suffix.lstrip(".").lower(), sorted(figure.canvas.get_supported_filetypes())
    if ending not in known:
        raise FlexdpoError(
            f"{path}: cannot write a picture with the ending {path.suffix!r}{nearest(ending, known)}; "
            f"use one of {', '.join(known)}"
        )
    figure.savefig(path)
    return path


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Average each value with its neighbours, ``window`` values in all, itself included.

    The window is centred, so the line does not lag behind the points; at both ends it shrinks to what is
    there.

    Args:
        values: ``[N]`` float64; NaN and infinite values are left out of every average.
        window: Odd number of values; an even one is rounded up.

    Returns:
        ``[N]`` float64, NaN only where a whole window has no finite value.
    """
    half = window // 2
    smoothed = np.full(values.shape, np.nan)
    for centre in range(values.size):
        near = values[max(centre - half, 0) : centre + half + 1]
        finite = near[np.isfinite(near)]
        if finite.size:
            smoothed[centre] = finite.mean()
    return smoothed


def read_curves(metrics_jsonl: str | Path) -> dict[str, dict[str, Curve]]:
    """Read a file of logged dicts, one JSON object per line, into curves per phase and key.

    Every line with a metric needs ``step``; ``phase`` is optional. Loss, reward accuracy and reward margin
    are read, each also with the prefix ``eval_``; other keys are left alone. Empty lines are skipped.

    Returns:
        ``{phase: {key: Curve}}`` in the order of first appearance; the phase is ``""`` where a line names
        none.

    Raises:
        FlexdpoError: if the file is missing, empty or without any of these metrics, or a line (its number is
            given) is not a JSON object, has no numeric ``step``, or carries a metric that is not a number.
    """
    path = Path(metrics_jsonl)
    if not path.is_file():
        raise FlexdpoError(f"{path}: no such metrics file; give the metrics.jsonl that a training run wrote")
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    wanted = [*PLOTTED_KEYS, *(f"eval_{key}" for key in PLOTTED_KEYS)]
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            entry = _parse_line(line, f"{path}, line {number}")
            for key in wanted:
                if key in entry:
                    point = _point(entry, key, f"{path}, line {number}")
                    phase = points.setdefault(str(entry.get("phase") or ""), {})
                    phase.setdefault(key, []).append(point)
    if not points:
        raise FlexdpoError(f"{path}: nothing to draw, no line carries any of {', '.join(wanted)}")
    return {phase: {key: _sorted_curve(pairs) for key, pairs in curves.items()} for phase, curves in points.items()}


def draw_training_curves(metrics_jsonl: str | Path, path: str | Path) -> Path:
    """Draw loss, reward accuracy and reward margin over the steps of a run.

    Left the loss, one panel per phase side by side (a warm-up and the DPO after it have losses of different
    kinds and each count their own steps); right, where they were logged, the accuracy above the margin.
    Points are the logged values, lines their moving average, diamonds the evaluations.

    Args:
        metrics_jsonl: Logged dicts, one JSON object per line, under the names that transformers and TRL use.
        path: The picture to write; the ending chooses the format, ``.png`` for instance.

    Returns:
        ``path``.

    Raises:
        FlexdpoError: if the metrics cannot be read (see `read_curves`) or the picture cannot be written.
    """
    phases = read_curves(metrics_jsonl)
    with_loss = {phase: curves for phase, curves in phases.items() if _has(curves, "loss")}
    with_rewards = {
        phase: curves
        for phase, curves in phases.items()
        if _has(curves, "rewards/accuracies") or _has(curves, "rewards/margins")
    }
    columns = len(with_loss) + len(with_rewards)
    figure = new_figure(max(8.0, 3.6 * columns), 3.7, dpi=160)
    grid = figure.add_gridspec(2, columns)
    for column, (phase, curves) in enumerate(with_loss.items()):
        axes = figure.add_subplot(grid[:, column])
        _draw_curves(axes, curves, "loss")
        axes.set_title(_panel_title(phase, "loss"), fontsize=10, loc="left")
        axes.set_xlabel("optimizer step")
    for column, (phase, curves) in enumerate(with_rewards.items(), start=len(with_loss)):
        above = figure.add_subplot(grid[0, column])
        below = figure.add_subplot(grid[1, column], sharex=above)
        _draw_rewards(above, below, curves)
        above.set_title(_panel_title(phase, "rewards"), fontsize=10, loc="left")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return save_figure(figure, path)


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"{place}: not JSON ({error}); each line must be one logged dict") from error
    if not isinstance(entry, dict):
        raise FlexdpoError(f"{place}: expected a JSON object, got {type(entry).__name__}")
    return entry


def _point(entry: dict[str, Any], key: str, place: str) -> tuple[float, float]:
    step = _number(entry, "step", place)
    if not np.isfinite(step):
        raise FlexdpoError(f"{place}: 'step' must be finite, got {step}")
    return step, _number(entry, key, place)


def _number(entry: dict[str, Any], key: str, place: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FlexdpoError(f"{place}: {key!r} must be a number, got {value!r}")
    return float(value)


def _sorted_curve(pairs: list[tuple[float, float]]) -> Curve:
    # a resumed run appends steps that the file already has; the sort is stable, so the later entry comes
    # later
    steps, values = np.array(sorted(pairs, key=lambda pair: pair[0]), dtype=np.float64).T
    return Curve(steps, values)


def _has(curves: dict[str, Curve], key: str) -> bool:
    return key in curves or f"eval_{key}" in curves


def _panel_title(phase: str, quantity: str) -> str:
    return f"{phase.upper()} {quantity}" if phase else quantity.capitalize()


def _draw_curves(axes: Any, curves: dict[str, Curve], key: str) -> None:
    """Draw the logged ``key`` as faint points under their moving average, evaluations as diamonds."""
    if key in curves:
        steps, values = curves[key]
        window = max(1, values.size // 12) | 1
        axes.plot(steps, values, ".", color=TRAIN_COLOUR, alpha=0.3, markersize=4, markeredgewidth=0)
        axes.plot(steps, smooth(values, window), color=TRAIN_COLOUR, linewidth=1.6, label="training")
    if f"eval_{key}" in curves:
        steps, values = curves[f"eval_{key}"]
        axes.plot(steps, values, "D-", color=EVAL_COLOUR, markersize=4, linewidth=1.0, label="held out")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _draw_rewards(above: Any, below: Any, curves: dict[str, Curve]) -> None:
    """Draw the reward accuracy with its chance level in ``above``, the reward margin in ``below``."""
    _draw_curves(above, curves, "rewards/accuracies")
    above.axhline(0.5, color="#6b7280", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    above.annotate(
        "chance",
        (1.0, 0.5),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color="#6b7280",
    )
    above.set_ylim(-0.03, 1.03)
    above.set_ylabel("accuracy", fontsize=9)
    above.tick_params(labelbottom=False)
    _draw_curves(below, curves, "rewards/margins")
    if below.get_legend() is not None and above.get_legend() is not None:
        below.get_legend().remove()
    below.set_ylabel("margin", fontsize=9)
    below.set_xlabel("optimizer step")
