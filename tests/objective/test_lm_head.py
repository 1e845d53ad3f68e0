"""The head is asked at every step, in every thread, wherever its weights are."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexdpo import FlexdpoError, prepare_model, response_logps
from flexdpo.objective import lm_head as heads
from flexdpo.objective.linear_logps import LogitTransform, logits_logps
from tests.conftest import build_model
from tests.objective.test_logps import a_row, assert_as_by_logits, by_the_models_own_logits, small


def set_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = 2.0


def drop_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def set_attribute(model: Any) -> None:
    model.logit_scale = 0.9


def set_scaling(model: Any) -> None:
    model.config.logits_scaling = 0.5


def set_both(model: Any) -> None:
    model.config.update({"final_logit_softcapping": 5.0, "hidden_act": "silu"})


def replace_forward(model: Any) -> None:
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward


def add_hook(model: Any) -> None:
    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits * 0.5
        return output

    model.register_forward_hook(scale)


@pytest.mark.parametrize(
    ("name", "change", "want"),
    [
        ("gemma2", set_softcap, LogitTransform(1.0, 2.0)),
        ("gemma2", drop_softcap, LogitTransform()),
        ("gemma2", set_both, LogitTransform(1.0, 5.0)),
        ("cohere", set_attribute, LogitTransform(0.9)),
        ("granite", set_scaling, LogitTransform(2.0)),
        ("tied", replace_forward, LogitTransform(1.5)),
        ("tied", add_hook, LogitTransform(0.5)),
    ],
)
def test_what_follows_the_head_may_change_between_steps(name: str, change: Any, want: LogitTransform) -> None:
    model, row = small(name), a_row()
    before = response_logps(model, row).sums
    change(model)
    got = heads.head_plan(model)
    assert got.transform.softcap == want.softcap
    assert got.transform.scale == pytest.approx(want.scale, rel=1e-9)
    assert_as_by_logits(model, row)
    assert (response_logps(model, row).sums - before).abs().max() > 1e-2


def test_a_model_is_measured_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = small("gemma2"), a_row()
    response_logps(model, row)
    monkeypatch.setattr(heads, "_measure", lambda *_: pytest.fail("measured again"))
    response_logps(model.train(), row).sums.sum().backward()
    model.config.final_logit_softcapping += 0.0
    response_logps(model.eval(), row)


class Learned(nn.Module):
    """Stands for code after the head that reads a tensor."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=trained)


def with_factor(trained: bool) -> Any:
    model = small("tied")
    model.learned = Learned(trained)
    plain = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            output = plain(self, *args, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits * self.learned.factor
            return output

    model.__class__ = Scaled
    return model


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_trained_factor_behind_the_head_gets_its_gradient(mode: Any) -> None:
    model = with_factor(trained=True)
    # a model that is scored before it is trained is measured for both
    with mode():
        response_logps(model, a_row())
    assert heads.head_plan(model).obstacle == "a trained weight takes part in what it does to its logits"
    assert_as_by_logits(model, a_row())
    response_logps(model, a_row()).sums.sum().backward()
    assert model.learned.factor.grad.abs() > 0


def test_a_tensor_that_changes_behind_the_head_is_noticed() -> None:
    model, row = with_factor(trained=False), a_row()
    assert_as_by_logits(model, row)
    model.learned.factor.data.fill_(0.8)
    with pytest.raises(FlexdpoError, match="does something else to its logits than when it was measured"):
        response_logps(model, row)


def test_threads_do_not_disturb_each_other() -> None:
    """One model: three threads take log-probabilities, two of which are of other labels, and two run it plainly."""
    model = build_model("llama", "sdpa")
    tokens = torch.arange(3, 15)[None]
    predictors = torch.tensor([2, 5, 9])
    plan = heads.head_plan(model)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    wrong: list[Any] = []

    def take(labels: torch.Tensor) -> None:
        want = logits_logps(logits[0, predictors], labels).logps
        for _ in range(30):
            got = heads.head_logps(model, {"input_ids": tokens}, predictors, labels, plan).logps
            wrong.extend([] if torch.allclose(got, want, rtol=1e-9) else [got])

    def run() -> None:
        for _ in range(30):
            with torch.no_grad():
                got = model(input_ids=tokens).logits
            wrong.extend([] if got.shape == logits.shape and torch.allclose(got, logits) else [got])

    def watched(work: Any, *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            wrong.append(error)

    jobs = [(take, torch.tensor(labels)) for labels in ([4, 5, 6], [7, 8, 9], [1, 2, 3])] + [(run,), (run,)]
    threads = [threading.Thread(target=watched, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert "forward" not in vars(model.lm_head)
    assert not heads._replacements


def test_a_forward_of_the_heads_own_is_given_back() -> None:
    model = build_model("llama", "sdpa")
    plain = model.lm_head.forward

    def own(hidden: torch.Tensor) -> torch.Tensor:
        return plain(hidden)

    model.lm_head.forward = own
    heads.head_plan(model)
    assert model.lm_head.forward is own


@pytest.mark.parametrize("how", ["cpu", "disk", "spread"])
def test_weights_that_are_offloaded(how: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    model, row, device = small("untied"), a_row(), torch.device("cpu")
    want = by_the_models_own_logits(model, row)
    model = small("untied")
    if how == "cpu":
        cpu_offload(model, device)
    elif how == "disk":
        disk_offload(model, str(tmp_path), device)
    else:
        # as device_map="auto" does where memory is short
        places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
        places = {f"model.{name}": place for name, place in places.items()}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(response_logps(prepare_model(model), row).sums, want)
