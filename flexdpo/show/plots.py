"""Training curves from what a run logged, and what every picture of flexdpo is made with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexdpo.errors import FlexdpoError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    # optimizer steps and the values logged at them, NaN where the run logged NaN: ``[2, N]`` by name
    Curves = dict[str, NDArray[np.float64]]

INK = "#1f2937"
_TRAIN_COLOUR, _EVAL_COLOUR = "#2b6cb0", "#c2410c"
_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"
_QUANTITIES = {"loss": ("loss",), "rewards": (_ACCURACY, _MARGIN)}


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
    """Average each value with its neighbours, ``window`` values in all, itself included.

    The window is centred, so the line does not lag behind the points; at both ends it shrinks to what is there.

    Args:
        values: ``[N]``; NaN and infinite values are left out of every average.
        window: Odd number of values, at most ``N``.

    Returns:
        ``[N]``, NaN only where a whole window has no finite value.
    """
    finite, neighbours = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), neighbours, mode="same")
    counts = np.convolve(finite, neighbours, mode="same")
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)


def curves_of(history: Iterable[Mapping[str, Any]]) -> dict[str, Curves]:
    """Loss, reward accuracy and reward margin of logged lines, each also with the prefix ``eval_``.

    Returns:
        By phase, in the order of first appearance; the phase is ``""`` where a line names none.
    """
    wanted = [f"{prefix}{key}" for keys in _QUANTITIES.values() for key in keys for prefix in ("", "eval_")]
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in history:
        for key in wanted:
            if key in line:
                phase = points.setdefault(line.get("phase", ""), {})
                phase.setdefault(key, []).append((line["step"], line[key]))
    return {
        phase: {key: np.array(pairs, dtype=np.float64).T for key, pairs in curves.items()}
        for phase, curves in points.items()
    }


def draw_training_curves(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path | None:
    """Draw loss, reward accuracy and reward margin over the steps of a run.

    Left the loss, one panel per phase side by side (a warm-up and the DPO after it have losses of different
    kinds and each count their own steps); right, where they were logged, the accuracy above the margin.
    Points are the logged values, lines their moving average, diamonds the evaluations.

    Args:
        history: Logged lines as in a trainer's ``state.log_history``, each with its ``step``; those of a run with
            several phases name theirs as ``phase``.
        path: The picture to write; the ending chooses the format, ``.png`` for instance.

    Returns:
        ``path``, or ``None`` if nothing of this was logged; then there is no picture.

    Raises:
        FlexdpoError: if the picture cannot be written.
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
    figure = new_figure(max(8.0, 3.6 * len(panels)), 3.7, dpi=160)
    grid = figure.add_gridspec(2, len(panels))
    for column, (title, curves, keys) in enumerate(panels):
        if len(keys) == 1:
            axes = [figure.add_subplot(grid[:, column])]
        else:
            axes = [figure.add_subplot(grid[0, column])]
            axes.append(figure.add_subplot(grid[1, column], sharex=axes[0]))
            _mark_chance(axes[0])
            axes[1].set_ylabel("margin", fontsize=9)
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
        window = max(1, values.size // 12) | 1
        axes.plot(steps, values, ".", color=_TRAIN_COLOUR, alpha=0.3, markersize=4, markeredgewidth=0)
        axes.plot(steps, smooth(values, window), color=_TRAIN_COLOUR, linewidth=1.6, label="training")
    if f"eval_{key}" in curves:
        axes.plot(*curves[f"eval_{key}"], "D-", color=_EVAL_COLOUR, markersize=4, linewidth=1.0, label="held out")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _mark_chance(axes: Any) -> None:
    """Prepare the axes of an accuracy."""
    axes.axhline(0.5, color="#6b7280", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        "chance", (1.0, 0.5), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
        ha="right", fontsize=7, color="#6b7280",
    )  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("accuracy", fontsize=9)
    axes.tick_params(labelbottom=False)
