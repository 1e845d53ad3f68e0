import pytest

from tests.codegen.versions import TRIED, refusal


@pytest.mark.parametrize("build", ["", "+cpu"])
def test_the_pairs_that_were_tried_are_taken(build: str) -> None:
    for torch_version, triton_version in TRIED.items():
        assert refusal(torch_version + build, triton_version) is None


@pytest.mark.parametrize(
    ("torch_version", "triton_version"), [("2.99.0+cpu", "3.7.1"), ("2.13.0+cpu", "9.9.9"), ("2.13.0+cu130", "3.7.1")]
)
def test_other_versions_are_refused_in_one_line(torch_version: str, triton_version: str) -> None:
    said = refusal(torch_version, triton_version)
    assert said is not None
    assert "\n" not in said
    assert f"not on torch {torch_version} with triton {triton_version}; install that pair" in said
