"""Training curves from what a run logged, and what every picture of flexdpo is made with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# optimizer steps and the values logged at them, NaN where the run logged NaN: ``[2, N]`` by name
Curves = dict[str, NDArray[np.float64]]

INK = "#1f2937"
_TRAIN_COLOUR, _EVAL_COLOUR = "#2b6cb0", "#c2410c"
_QUANTITIES = {"loss": ("loss",), "rewards": ("rewards/accuracies", "rewards/margins")}


def new_figure(width: float, height: float) -> Figure:
    """A figure of ``width x height`` inches that pyplot knows nothing of: a notebook's backend and figures stay."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path``, whose ending chooses the format; ``FlexdpoError`` if that cannot be."""
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


def style_axes(axes: Any, label: str, *, lanes: bool = False) -> None:
    """Give axes of tokens their label and ink; those of ``lanes`` have a scale of whole numbers below and no other."""
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.spines[:].set(color="#9ca3af", linewidth=0.8)
    if lanes:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)


def ink_on(colour: Any) -> str:
    """What can be read on a colour."""
    return "white" if np.mean(colour) < 0.6 else INK


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Average ``[N]`` values with their neighbours, an odd ``window`` of at most ``N`` in all, fewer at both ends.

    What is not finite is left out; NaN stands where a whole window has no finite value.
    """
    finite, neighbours = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), neighbours, mode="same")
    counts = np.convolve(finite, neighbours, mode="same")
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)


def curves_of(history: Iterable[Mapping[str, Any]]) -> dict[str, Curves]:
    """Loss, reward accuracy and margin of logged lines, and their ``eval_`` twins, by phase, ``""`` where none is."""
    wanted = {key for keys in _QUANTITIES.values() for key in keys}
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in history:
        for key in line:
            if key.removeprefix("eval_") in wanted:
                points[line.get("phase", "")][key].append((line["step"], line[key]))
    return {
        phase: {key: np.array(pairs, dtype=np.float64).T for key, pairs in curves.items()}
        for phase, curves in points.items()
    }


def draw_training_curves(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draw loss, reward accuracy and reward margin over the steps of a run.

    Left the loss, one panel per phase side by side (a warm-up and the DPO after it have losses of different
    kinds and each count their own steps); right, where they were logged, the accuracy above the margin.
    Points are the logged values, lines their moving average, diamonds the evaluations.

    ``history`` are logged lines as in a trainer's ``state.log_history``, each with its ``step``; those of a run with
    several phases name theirs as ``phase``. Returns ``path``, whose ending chooses the format, or ``None`` if nothing
    of this was logged; then there is no picture.
    """
    phases = curves_of(history)
    panels = [
        (f"{phase.upper()} {name}" if phase else name.capitalize(), curves, keys)
        for name, keys in _QUANTITIES.items()
        for phase, curves in phases.items()
        if any(key.removeprefix("eval_") in keys for key in curves)
    ]
    if not panels:
        return None
    figure = new_figure(max(8.0, 3.6 * len(panels)), 3.7)
    grid = figure.add_gridspec(2, len(panels))
    for column, (title, curves, keys) in enumerate(panels):
        axes = [figure.add_subplot(grid[:, column] if len(keys) == 1 else grid[0, column])]
        if len(keys) == 2:
            axes.append(figure.add_subplot(grid[1, column], sharex=axes[0]))
            axes[0].axhline(0.5, color="#6b7280", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes[0].annotate(
                "chance", (1.0, 0.5), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                ha="right", fontsize=7, color="#6b7280",
            )  # fmt: skip
            axes[0].set_ylim(-0.03, 1.03)
            axes[0].tick_params(labelbottom=False)
            for place, label in zip(axes, ("accuracy", "margin"), strict=True):
                place.set_ylabel(label, fontsize=9)
        for place, key in zip(axes, keys, strict=True):
            _draw_curves(place, curves, key)
        next(place for place in axes if place.get_legend_handles_labels()[0]).legend(fontsize=8, frameon=False)
        axes[0].set_title(title, fontsize=10, loc="left")
        axes[-1].set_xlabel("optimizer step")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return save_figure(figure, path)


def _draw_curves(axes: Any, curves: Curves, key: str) -> None:
    """Draw the logged ``key`` as faint points under their moving average, evaluations as diamonds."""
    if key in curves:
        steps, values = curves[key]
        axes.plot(steps, values, ".", color=_TRAIN_COLOUR, alpha=0.3, markersize=4, markeredgewidth=0)
        averages = smooth(values, max(1, values.size // 12) | 1)
        axes.plot(steps, averages, color=_TRAIN_COLOUR, linewidth=1.6, label="training")
    if f"eval_{key}" in curves:
        axes.plot(*curves[f"eval_{key}"], "D-", color=_EVAL_COLOUR, markersize=4, linewidth=1.0, label="held out")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
