"""Running layers again in the backward pass goes by one name, and asks transformers by the name that it knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from flexdpo import DPOConfig
from flexdpo.hf.checkpointing import checkpointing_name, enable_checkpointing


@pytest.fixture
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_no_warning")
def test_layers_are_told_without_a_warning(small_model: Any) -> None:
    model = small_model()
    enable_checkpointing(model, use_reentrant=True)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}


@pytest.mark.parametrize(
    ("known", "used"),
    [
        (["gradient"], "gradient"),
        (["activation"], "activation"),
        (["gradient", "activation"], "activation"),
    ],
)
def test_the_name_is_the_newest_that_a_model_knows(known: list[str], used: str) -> None:
    told: dict[str, Any] = {}
    methods = {
        f"{name}_checkpointing_enable": lambda _name=name, **settings: told.update({_name: settings}) for name in known
    }
    enable_checkpointing(SimpleNamespace(**methods))
    assert told == {used: {f"{used}_checkpointing_kwargs": {"use_reentrant": False}}}


def test_a_model_without_any_is_named() -> None:
    with pytest.raises(AttributeError, match=r"object .* has none of activation_checkpointing_enable, gradient_"):
        enable_checkpointing(object())


@pytest.mark.usefixtures("_no_warning")
@pytest.mark.parametrize(
    "settings", [{}, {"use_reentrant": True}, '{"use_reentrant": true}', {"preserve_rng_state": False}], ids=str
)
def test_the_setting_has_one_name_on_every_transformers(settings: Any, tmp_path: Path) -> None:
    args = DPOConfig(
        str(tmp_path), use_cpu=True, activation_checkpointing=True, activation_checkpointing_kwargs=settings
    )
    known = checkpointing_name(TrainingArguments)
    assert getattr(args, known) is args.activation_checkpointing is True
    wanted = {"use_reentrant": True} if isinstance(settings, str) else settings
    assert getattr(args, f"{known}_kwargs") == args.activation_checkpointing_kwargs == wanted


@pytest.mark.usefixtures("_no_warning")
def test_off_unless_asked(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), use_cpu=True)
    assert args.activation_checkpointing is args.gradient_checkpointing is False


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_older_name_means_the_same(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert args.activation_checkpointing is True
