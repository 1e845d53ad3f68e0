"""Verdicts belong to versions of transformers: what a newer one made exact is reported, what is wrong fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexdpo import UnsupportedModelError
from tests.hf import test_architectures as architectures

# transformers replaces its own module object once a model is imported: this is the one whose version is read
from tests.hf.architectures import BECAME_EXACT, NOT_IN_THE_ZOO, RECORDED_UP_TO, newer_than_recorded, transformers, zoo

pytest_plugins = ["pytester"]

NEWER = f"{RECORDED_UP_TO.major}.{RECORDED_UP_TO.minor + 1}.0"


class Recorded:
    def __init__(self) -> None:
        self.properties: list[tuple[str, str]] = []

    def __call__(self, name: str, value: str) -> None:
        self.properties.append((name, value))


def test_a_verdict_holds_from_its_version_on(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {}
    for version in ("5.23.0", "5.24.0", NEWER):
        monkeypatch.setattr(transformers, "__version__", version)
        exact[version] = {name for name in ("llama", "gptj", "codegen", "bloom") if zoo()[name].exact}
    assert exact == {"5.23.0": {"llama"}, "5.24.0": {"llama", "gptj", "codegen"}, NEWER: {"llama", "gptj", "codegen"}}
    assert newer_than_recorded()


@pytest.mark.parametrize("check", ["comparison", "probe"])
def test_a_newer_version_with_one_more_exact_architecture_is_reported(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama stands for an architecture that the records call refused."""
    monkeypatch.setattr(transformers, "__version__", NEWER)
    monkeypatch.setattr(architectures, "EXACT", [])
    report = Recorded()
    if check == "comparison":
        architectures.test_what_is_not_exact_is_refused("llama", report)
    else:
        architectures.test_the_probe_makes_no_mistake("llama", report)
    assert report.properties == [(BECAME_EXACT, "llama")]


def test_the_same_in_a_recorded_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", f"{RECORDED_UP_TO}.1")
    monkeypatch.setattr(architectures, "EXACT", [])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        architectures.test_what_is_not_exact_is_refused("llama", Recorded())
    with pytest.raises(AssertionError, match="'exact' == 'refused'"):
        architectures.test_the_probe_makes_no_mistake("llama", Recorded())


def test_accepted_and_wrong_fails_in_a_newer_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the rule accepts though it mixes neighbours in row order."""
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def of_neighbours(self: Any, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = forward(self, x) + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return mixed

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", of_neighbours)
    monkeypatch.setattr(transformers, "__version__", NEWER)
    report = Recorded()
    with pytest.raises(AssertionError, match="logit_error"):
        architectures.test_what_is_not_exact_is_refused("llama", report)
    assert report.properties == []


def test_what_a_newer_version_still_refuses_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", NEWER)
    report = Recorded()
    architectures.test_what_is_not_exact_is_refused("bloom", report)
    assert report.properties == []
    monkeypatch.setattr(architectures, "prepare_model", lambda model: (_ for _ in ()).throw(UnsupportedModelError("?")))
    with pytest.raises(AssertionError, match="Regex pattern did not match"):
        architectures.test_what_is_not_exact_is_refused("bloom", report)


def test_an_architecture_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {**architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "made_up": "MadeUpForCausalLM"}
    monkeypatch.setattr(architectures, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", made_up)
    monkeypatch.setattr(transformers, "__version__", f"{RECORDED_UP_TO}.0")
    with pytest.raises(AssertionError, match="made_up"):
        architectures.test_the_zoo_is_complete(Recorded())
    monkeypatch.setattr(transformers, "__version__", NEWER)
    report = Recorded()
    architectures.test_the_zoo_is_complete(report)
    # an older version has some that were taken out since
    assert (NOT_IN_THE_ZOO, "made_up") in report.properties


def test_the_terminal_summary_names_what_changed(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import pytest_terminal_summary")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("name", ["one", "two"])
        def test_reports(record_property, name):
            record_property("became exact", name)
            record_property("something else", "three")

        def test_fails(record_property):
            record_property("became exact", "four")
            assert False
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*is newer than the records of the zoo*", "became exact: one, two"])
    result.stdout.no_fnmatch_line("*three*")
