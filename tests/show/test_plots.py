"""Training curves: what is taken from a run's history, and what is drawn."""

import math

import numpy as np
import pytest

from flexdpo.errors import FlexdpoError
from flexdpo.show import plots
from flexdpo.show.plots import curves_of, draw_training_curves, new_figure, save_figure, smooth


def dpo_entries(**extra):
    entries = []
    for step in range(1, 41):
        entries.append(
            {"step": step, "loss": math.log(2) - step / 100, "rewards/accuracies": 0.5 + step / 100,
             "rewards/margins": step / 50, "learning_rate": 1e-4, **extra}
        )  # fmt: skip
        if step % 20 == 0:
            entries.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7, **extra})
    return [*entries, {"step": 40, "train_runtime": 3.0, "train_loss": 0.5, **extra}]


def drawn_figure(monkeypatch, history, path):
    """Draw, and return the figure as it was handed to the writer."""
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, to: drawn.append(figure) or save_figure(figure, to))
    draw_training_curves(history, path)
    return drawn[0]


def test_curves_hold_the_logged_values():
    history = [
        {"step": 10, "loss": 3.0, "phase": "sft"},
        {"step": 20, "loss": 2.0, "phase": "sft"},
        {"step": 5, "eval_rewards/accuracies": 0.75, "phase": "dpo", "grad_norm": "not drawn"},
    ]
    curves = curves_of(history)
    assert list(curves) == ["sft", "dpo"]
    assert curves["sft"]["loss"].tolist() == [[10, 20], [3, 2]]
    assert list(curves["dpo"]) == ["eval_rewards/accuracies"]
    assert curves["dpo"]["eval_rewards/accuracies"].tolist() == [[5], [0.75]]


def test_phases_without_a_name_are_one_phase():
    assert list(curves_of(dpo_entries())) == [""]


def test_picture_is_written_and_large_enough(tmp_path):
    from matplotlib.image import imread

    history = dpo_entries()
    path = draw_training_curves(history, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    pixels = imread(path)
    assert pixels.shape[1] >= 1200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10  # not a blank page


def test_panels_are_loss_left_and_rewards_right(monkeypatch, tmp_path):
    history = dpo_entries()
    loss, accuracy, margin = drawn_figure(monkeypatch, history, tmp_path / "curves.png").axes
    assert loss.get_title(loc="left") == "Loss"
    assert (accuracy.get_ylabel(), margin.get_ylabel()) == ("accuracy", "margin")
    assert loss.get_position().x1 < accuracy.get_position().x0
    points, line, evaluations = loss.get_lines()
    np.testing.assert_allclose(points.get_ydata(), [math.log(2) - step / 100 for step in range(1, 41)])
    np.testing.assert_allclose(line.get_ydata()[5:-5], points.get_ydata()[5:-5])  # a straight line stays straight
    assert evaluations.get_xdata().tolist() == [20, 40]
    assert evaluations.get_ydata().tolist() == [0.6, 0.6]
    assert margin.get_lines()[0].get_ydata()[-1] == 0.8


def test_phases_stand_side_by_side(monkeypatch, tmp_path):
    warm_up = [{"step": step, "loss": 5 - step / 10, "phase": "sft"} for step in range(1, 21)]
    history = [*warm_up, *dpo_entries(phase="dpo")]
    panels = drawn_figure(monkeypatch, history, tmp_path / "curves.png").axes
    assert [panel.get_title(loc="left") for panel in panels] == ["SFT loss", "DPO loss", "DPO rewards", ""]
    assert panels[0].get_lines()[0].get_ydata()[0] == pytest.approx(4.9)
    assert panels[1].get_lines()[0].get_ydata()[0] == pytest.approx(math.log(2) - 0.01)


def test_supervised_run_without_rewards_gets_the_loss_alone(monkeypatch, tmp_path):
    history = [{"step": 1, "loss": 1.0}]
    assert len(drawn_figure(monkeypatch, history, tmp_path / "curves.png").axes) == 1


def test_logged_nan_leaves_a_gap_and_no_error(tmp_path):
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}]
    assert np.isnan(curves_of(history)[""]["loss"][1]).tolist() == [True, False]
    assert draw_training_curves(history, tmp_path / "curves.png").is_file()


def test_smooth_is_a_centred_average_by_hand():
    values = np.array([0.0, 3.0, 6.0, np.nan, 1.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3.0, 4.5, 3.5, 1.0])
    np.testing.assert_allclose(smooth(values, 1), values)


def test_smooth_is_nan_only_where_nothing_is_finite():
    smoothed = smooth(np.array([1.0, np.nan, np.inf, np.nan, 5.0]), 3)
    assert np.isnan(smoothed).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("history", [[], [{"step": 1, "learning_rate": 0.1, "train_loss": 0.7}]])
def test_a_run_that_logged_no_curve_gets_no_picture(history, tmp_path):
    assert draw_training_curves(history, tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FlexdpoError, match=r"the folder .*absent does not exist; create it first"):
        save_figure(new_figure(1, 1), tmp_path / "absent" / "curves.png")


def test_unknown_ending_lists_the_known_ones(tmp_path):
    with pytest.raises(FlexdpoError, match=r"the ending '.pngg'; did you mean 'png'\?; use one of .*pdf, .*png"):
        save_figure(new_figure(1, 1), tmp_path / "curves.pngg")
