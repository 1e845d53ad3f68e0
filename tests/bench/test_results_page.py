"""The results page says what the result files say, and README is held against it."""

import json
from pathlib import Path

import pytest

from flexdpo import FlexdpoError
from flexdpo.bench.bench import described
from flexdpo.bench.profiles import profile_data
from flexdpo.bench.results_page import (
    BEGIN,
    END,
    load_files,
    load_result,
    render_page,
    update_page,
)
from flexdpo.bench.settings import BenchSettings
from flexdpo.cli import main


def speedup(median: float, ideal: float) -> dict[str, dict[str, float]]:
    total = {
        "median": median,
        "low": median - 0.02,
        "high": median + 0.03,
        "ideal": ideal,
        "efficiency": median / ideal,
    }
    return {"total": total, "policy": total, "reference": total}


def result(**changes) -> dict:
    """What ``flexdpo bench --json`` writes, with figures of our own."""
    figures = {
        "variants": {
            name: {"pairs_per_second": 4.0, "tokens": 100, "peak_bytes": peak, "rounds": 1 if name == "padded" else 24}
            for name, peak in (("padded", 12_340_000_000), ("packed", 1_234_000_000), ("shared", None))
        },
        "speedups": {"padded": speedup(2.345, 2.5), "packed": speedup(1.25, 1.5)},
        "kernels": [],
    }
    found = described(BenchSettings(device="cpu", scale=0.25, profile="tldr"))
    found["environment"] |= {"device": "A Processor", "threads": 1, "date": "2026-11-23T10:11:12+00:00"}
    return {**found, "profiles": {"tldr": figures}, **changes}


def write(folder: Path, data: object, name: str = "bench-cpu-tiny.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "results", result()).parent


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    return path


def test_a_table_holds_the_figures_of_its_file_and_of_the_paper(folder: Path) -> None:
    page = render_page(load_files(folder))
    title, table, about, legend, _ = page.split("\n\n")
    assert title == "**A Processor, 1 thread: model `tiny`, float32**"
    header, _, line = table.splitlines()
    assert header.count("|") == line.count("|")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "tldr", "2.35", "2.50", "94%", "1.25 (1.23 to 1.28)", "1.50", "83%",
        "12.3 / 1.23 / unknown", "1.35", "1.85",
    ]  # fmt: skip
    assert "all lengths times 0.25" in about
    assert "2026-11-23; `bench-cpu-tiny.json`" in about
    assert "torch 2" in about
    assert "arXiv:2410.20305" in legend
    assert "October 2024" in legend


def test_what_others_published_is_labelled_so(folder: Path) -> None:
    after = render_page(load_files(folder)).split("Published by others, not measured here:")[1]
    assert after.strip() == (
        "open-instruct, DPO of Olmo2-7B, rows packed to 16k tokens, prompts not shared: 5,282 tokens/s per H100, "
        "22.5% MFU ([github.com/allenai/open-instruct/pull/1466](https://github.com/allenai/open-instruct/pull/1466), "
        "February 2026)."
    )


def test_the_papers_figures_are_the_published_ones() -> None:
    papers = profile_data()["profiles"]
    assert {name: paper["published"]["speedup_vs_flash3"] for name, paper in papers.items()} == {
        "capybara": 1.34, "hh_rlhf": 1.41, "metamath": 1.57, "tldr": 1.35, "helpsteer": 1.48, "ultrafeedback": 1.17
    }  # fmt: skip


def test_every_file_has_its_table_sorted_by_name(folder: Path) -> None:
    data = result()
    data["environment"] = {**data["environment"], "device": "A GPU"}
    data["settings"] = {**data["settings"], "device": "cuda", "scale": 1.0}
    # a profile that the paper does not know, and one baseline only
    data["profiles"] = {"my_own": {**data["profiles"]["tldr"], "speedups": {"packed": speedup(1.4, 1.5)}}}
    write(folder, data, "bench-a-gpu.json")
    page = render_page(load_files(folder))
    assert page.index("**A GPU: model") < page.index("**A Processor, 1 thread: model")
    assert "| my_own | 1.40 (1.38 to 1.43) | 1.50 | 93% | 1.23 / unknown |  |  |" in page
    assert "; `bench-a-gpu.json`" in page
    assert page.count("all lengths times") == 1


def test_the_command_writes_between_the_markers_and_checks(folder: Path, readme: Path, capsys) -> None:
    words = ["results", str(folder), "--readme", str(readme)]
    old = readme.read_text()
    assert main([*words, "--check"]) == 1
    assert readme.read_text() == old
    assert "out of date; run flexdpo results" in capsys.readouterr().out

    assert main(words) == 0
    assert "1 table from" in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n\n**A Processor")
    assert text.endswith(f"\n\n{END}\n\nafter\n")
    assert "old" not in text
    assert main([*words, "--check"]) == 0
    assert main(words) == 0
    assert readme.read_text() == text

    write(folder, {**result(), "dtype": "bfloat16"})
    assert main([*words, "--check"]) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "found a list instead of an object"),
        ({**result(), "settings": {}}, "of the kind 'flexdpo bench --json': 'device' is missing"),
        (result(profiles={}), "it holds no profile"),
        (result(profiles={"tldr": {"variants": {}}}), "'speedups' is missing"),
        (result(profiles={"tldr": 3}), "'int' object is not subscriptable; keep other files elsewhere"),
        (result(environment=None), "'environment' is missing"),
    ],
)
def test_another_file_among_the_results_is_named(tmp_path: Path, data: object, message: str) -> None:
    path = write(tmp_path / "results", data)
    with pytest.raises(FlexdpoError, match=message) as error:
        load_result(path)
    assert str(path) in str(error.value)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, folder: Path, readme: Path, capsys) -> None:
    with pytest.raises(FlexdpoError, match="no such folder"):
        load_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlexdpoError, match=r"has no \*\.json; make one with flexdpo bench"):
        load_files(tmp_path / "empty")
    (tmp_path / "empty" / "half.json").write_text('{"settings": ')
    with pytest.raises(FlexdpoError, match=r"half\.json is not JSON"):
        load_files(tmp_path / "empty")
    with pytest.raises(FlexdpoError, match="cannot be read"):
        load_result(tmp_path / "none.json")
    with pytest.raises(FlexdpoError, match="cannot be read"):
        update_page(tmp_path / "none.md", "page")
    assert main(["results", str(folder), "--readme", str(tmp_path / "none.md")]) == 2
    assert main(["results", "--chek"]) == 2
    assert "see flexdpo results --help" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{END}\n"])
def test_markers_are_needed_once_each_in_order(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(FlexdpoError, match="needs these two lines once each"):
        update_page(path, "page")
    assert path.read_text() == text


# --- computed, not timed ---------------------------------------------------------------------------------------------


def kernel(**changes) -> dict:
    figures = {
        "arch": "sm_90a", "tile": [128, 64], "warps": 8, "registers": 255, "spilled_bytes": 1024,
        "shared_bytes": 131_072, "shared_limit": 232_448,
    }  # fmt: skip
    return figures | changes


def compiled() -> dict:
    backward = kernel(tile=[64, 128, 128, 64], spilled_bytes=0)
    cards = {"H100": {"sliding": {"forward": kernel(), "backward": backward}}}
    versions = {"torch": "2.13.0", "triton": "3.7.1"}
    return {"kind": "compiled kernels", "versions": versions, "date": "2026-11-29", "dtype": "bfloat16", "cards": cards}


def test_compiled_kernels_have_a_table_that_says_so(folder: Path) -> None:
    write(folder, compiled(), "a-compiled.json")
    page = render_page(load_files(folder))
    # what was timed comes first, whatever the files are called
    assert page.index("A Processor") < page.index("Attention kernels as compiled, bfloat16, not timed")
    assert (
        "| H100 (sm_90a) | sliding | 128 x 64 | 255 | 1,024 B | 128 of 227 KB | 64 x 128, 128 x 64 | 255 | 0 B "
        "| 128 of 227 KB |" in page
    )
    assert [found.path.name for found in load_files(folder)] == ["bench-cpu-tiny.json", "a-compiled.json"]
    assert page.endswith("torch 2.13.0, triton 3.7.1; 2026-11-29; `a-compiled.json`.")


def test_the_heads_counted_work_has_a_table(tmp_path: Path) -> None:
    from flexdpo.bench.lm_head import HeadSize, result

    path = write(tmp_path / "results", result(HeadSize(targets=512, vocabulary=32_000, hidden=1024)), "head.json")
    page = render_page(load_files(path.parent))
    assert page.index("Published by others") < page.index(
        "**The head on an H100 SXM by arithmetic, not timed: 512 targets, 32000 words, hidden size"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"kind": "else"},
            "of the kind 'else'; known: flexdpo bench --json, completions timed, compiled kernels, head counted",
        ),
        (
            {**compiled(), "cards": {"H100": {"sliding": {"forward": kernel()}}}},
            "no complete result of the kind 'compiled kernels': 'backward' is missing",
        ),
        ({**compiled(), "versions": None}, "no complete result of the kind 'compiled kernels'"),
    ],
)
def test_a_computed_file_that_lacks_something_is_named(tmp_path: Path, data: dict, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        load_result(write(tmp_path / "results", data))


@pytest.mark.parametrize("of", ["the process", "the clock"])
def test_whose_seconds_those_of_completions_are(tmp_path: Path, of: str) -> None:
    file = Path(__file__).parents[2] / "notebooks" / "results" / "completions-cpu-tiny.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["environment"]["seconds_of"] = of
    page = render_page([load_result(write(tmp_path, data))])
    assert ("seconds of the process" in page) == (of == "the process")
