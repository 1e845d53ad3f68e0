"""The built-in example's data: what a pair is made of, and that no rule without the prompt solves the task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from flexdpo.errors import FlexdpoError
from flexdpo.example.model import small_llama
from flexdpo.example.stdlib import SourceFunction, StandardLibrary, read_standard_library
from flexdpo.example.task import (
    HELD_OUT_PAIRS,
    BodyPair,
    BodyTask,
    build_task,
    longer_is_chosen,
    swap_prompts,
)
from tests.example.part import half_of_the_part, part_of_the_library

SAMPLE = '''\
"""A module."""
import math


class Shape:
    """A thing."""

    scale = 1

    @property
    def area(self):
        return self.scale

    @staticmethod
    def grow(size, *, by=2, **rest):
        """
        Grow a size.

        More words.
        """
        # enlarge
        larger = size * by

        def helper(x): return x
        if larger > 10:
            larger = math.floor(larger)
        return helper(larger)

async def top(a,
              b):
    await a
    return b
def only_docstring():
    """Nothing else."""
'''


def by_name(library: StandardLibrary) -> dict[str, SourceFunction]:
    return {function.name: function for function in library.functions}


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.slow)])
def extent(request: pytest.FixtureRequest) -> str:
    extent: str = request.param
    return extent


@pytest.fixture(scope="module")
def library(extent: str) -> StandardLibrary:
    return read_standard_library() if extent == "whole" else part_of_the_library()


@pytest.fixture(scope="module")
def task(library: StandardLibrary, extent: str) -> BodyTask:
    return build_task(library, seed=0, held_out_pairs=HELD_OUT_PAIRS if extent == "whole" else 80)


@pytest.fixture
def sample(tmp_path: Path) -> dict[str, SourceFunction]:
    (tmp_path / "shapes.py").write_text(SAMPLE)
    return by_name(read_standard_library(tmp_path))


def test_cuts_a_function_into_context_head_and_body(sample: dict[str, SourceFunction]) -> None:
    grow = sample["grow"]
    assert grow.head == '@staticmethod\ndef grow(size, *, by=2, **rest):\n    """Grow a size."""\n'
    assert grow.body == (
        "    # enlarge\n    larger = size * by\n\n    def helper(x): return x\n    if larger > 10:\n"
        "        larger = math.floor(larger)\n    return helper(larger)\n"
    )
    assert grow.context.endswith("scale = 1\n\n@property\ndef area(self):\n    return self.scale\n\n")
    assert grow.parameters == {"size", "by", "rest"}


def test_shifts_methods_to_the_margin(sample: dict[str, SourceFunction]) -> None:
    assert sample["area"].head == "@property\ndef area(self):\n"
    assert sample["area"].body == "    return self.scale\n"
    assert sample["area"].parameters == frozenset()


def test_keeps_a_signature_of_several_lines(sample: dict[str, SourceFunction]) -> None:
    assert sample["top"].head == "async def top(a,\n              b):\n"
    assert sample["top"].parameters == {"a", "b"}


def test_leaves_out_functions_without_a_body_of_their_own(sample: dict[str, SourceFunction]) -> None:
    assert set(sample) == {"area", "grow", "top"}  # not the one-liner, not the lone docstring


def test_counts_unreadable_files_and_skips_foreign_packages(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(SAMPLE)
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "bad_bytes.py").write_bytes(b"x = '\xff'\n")
    for folder in ("site-packages", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text(SAMPLE)
    library = read_standard_library(tmp_path)
    assert list(library.texts) == ["good.py"]
    assert library.unreadable == ("bad_bytes.py", "bad_syntax.py")


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_python_without_sources_is_a_clear_error(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FlexdpoError, match=r"no Python source found below .*--dataset_name"):
        read_standard_library(tmp_path / folder)


def test_a_library_too_small_is_a_clear_error() -> None:
    with pytest.raises(FlexdpoError, match=r"too few to hold 600 out"):
        build_task(half_of_the_part(), seed=0)


def test_holds_out_whole_modules(task: BodyTask, extent: str) -> None:
    least = {"part": (80, 1000, 5), "whole": (500, 4000, 30)}[extent]
    held_out = {pair.module for pair in task.held_out}
    assert (len(task.held_out) >= least[0], len(task.train) >= least[1], len(held_out) >= least[2]) == (True,) * 3
    assert held_out.isdisjoint({pair.module for pair in task.train})
    assert max(Counter(pair.module for pair in task.held_out).values()) <= 60


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_body_is_chosen_once_and_rejected_once(task: BodyTask, part: str) -> None:
    pairs: tuple[BodyPair, ...] = getattr(task, part)
    chosen = Counter(pair.chosen_ids for pair in pairs)
    rejected = Counter(pair.rejected_ids for pair in pairs)
    assert chosen == rejected
    assert max(chosen.values()) == 1


def test_the_two_pairs_that_reject_each_other_are_learned_from_together(task: BodyTask) -> None:
    for first, second in zip(task.train[::2], task.train[1::2], strict=True):
        assert (first.chosen_ids, first.rejected_ids) == (second.rejected_ids, second.chosen_ids)


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_the_rejected_body_is_as_long_and_from_another_module(task: BodyTask, part: str) -> None:
    pairs: tuple[BodyPair, ...] = getattr(task, part)
    assert all(pair.module != pair.rejected_module for pair in pairs)
    assert max(abs(len(pair.chosen_ids) - len(pair.rejected_ids)) for pair in pairs) <= 2
    assert 0.45 <= longer_is_chosen(pairs) <= 0.55


def test_a_rule_on_the_bodies_alone_is_right_on_half_of_the_pairs(task: BodyTask) -> None:
    for rule in (sum, hash, max, lambda ids: ids[0]):
        points = [
            (rule(pair.chosen_ids) > rule(pair.rejected_ids)) + 0.5 * (rule(pair.chosen_ids) == rule(pair.rejected_ids))
            for pair in task.held_out
        ]
        assert sum(points) == len(points) / 2


def test_no_body_comes_twice(task: BodyTask) -> None:
    bodies = Counter(pair.chosen_ids for pair in (*task.train, *task.held_out))
    assert max(bodies.values()) == 1


def test_prompts_keep_the_head_and_bodies_are_whole_lines(task: BodyTask, library: StandardLibrary) -> None:
    heads: dict[str, set[str]] = {}
    starts: dict[str, set[str]] = {}
    for function in library.functions:
        name = f"{function.module}:{function.name}"
        heads.setdefault(name, set()).add(function.head)
        starts.setdefault(name, set()).add(function.body)
    for pair in (*task.held_out, *task.train[:500]):
        assert len(pair.prompt_ids) <= 112
        assert 20 <= len(pair.chosen_ids) - 1 <= 48
        assert pair.prompt_ids[0] == task.tokenizer.bos_token_id
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == task.tokenizer.eos_token_id
        prompt = task.tokenizer.decode(pair.prompt_ids[1:])
        body = task.tokenizer.decode(pair.chosen_ids[:-1])
        assert any(prompt.endswith(head) for head in heads[pair.name]), pair.name
        assert body.endswith("\n")
        assert body.count("\n") >= 2
        assert any(whole.startswith(body) for whole in starts[pair.name]), pair.name


def test_a_stranger_s_prompt_comes_from_another_module(task: BodyTask) -> None:
    strangers = swap_prompts(task.held_out, seed=0)
    owner = {pair.prompt_ids: pair.module for pair in task.held_out}
    assert Counter(pair.prompt_ids for pair in strangers) == Counter(pair.prompt_ids for pair in task.held_out)
    for pair, stranger in zip(task.held_out, strangers, strict=True):
        assert owner[stranger.prompt_ids] != pair.module
        assert (stranger.chosen_ids, stranger.rejected_ids) == (pair.chosen_ids, pair.rejected_ids)


def test_strangers_need_two_modules(task: BodyTask) -> None:
    module = task.held_out[0].module
    alone = [pair for pair in task.held_out if pair.module == module]
    with pytest.raises(FlexdpoError, match="holds more than half of the"):
        swap_prompts(alone, seed=0)


def test_the_seed_decides_everything() -> None:
    first, again, other = (build_task(half_of_the_part(), seed, held_out_pairs=20) for seed in (3, 3, 4))
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert (first.train, first.held_out) == (again.train, again.held_out)
    assert {pair.module for pair in first.held_out} != {pair.module for pair in other.held_out}


def test_tokens_never_span_two_lines(task: BodyTask) -> None:
    for token in range(len(task.tokenizer)):
        assert "\n" not in task.tokenizer.decode([token])[:-1]
    text = "def f(x):\n\n    return  x\n"
    ids = task.tokenizer(text).input_ids
    assert ids[0] == task.tokenizer.bos_token_id
    assert task.tokenizer.decode(ids[1:]) == text


def test_the_model_is_small_and_drawn_from_the_seed(task: BodyTask) -> None:
    first, again, other = (small_llama(task.tokenizer, seed, "eager") for seed in (0, 0, 1))
    assert 0.4e6 < first.num_parameters() < 0.6e6
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, again, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
