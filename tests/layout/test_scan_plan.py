from __future__ import annotations

import itertools

import numpy as np
import pytest

from flexdpo import Row, RowLayout
from flexdpo.layout.scan_plan import ScanCost, ScanPlan, path_plan, scan_plan
from flexdpo.layout.segments import Segments
from tests.layout.test_segments import parents_by_definition, random_layouts


def lines_of(plan: ScanPlan) -> dict[int, list[int]]:
    """The tokens of each run."""
    buckets = [bucket for level in plan.levels for bucket in level]
    return {
        int(member): line[line >= 0].tolist()
        for bucket in buckets
        for member, line in zip(bucket.members, bucket.tokens, strict=True)
    }


def chunks_of(plan: ScanPlan, chunk: int) -> int:
    return sum(-(-len(line) // chunk) for line in lines_of(plan).values())


@pytest.mark.parametrize("layout", random_layouts())
@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_every_run_goes_on_where_an_earlier_level_ended(layout: RowLayout, chunk: int) -> None:
    """Its first token's parent is the last token of the run that it continues, and so on along the run."""
    parents, plan = parents_by_definition(layout), scan_plan(Segments.of(layout), [ScanCost(chunk)])
    lines, before = lines_of(plan), set[int]()
    for level in plan.levels:
        for bucket in level:
            assert bucket.needs_final_state == any(member in plan.parents for member in bucket.members)
        here = {int(member) for bucket in level for member in bucket.members}
        for member in here:
            above, line = int(plan.parents[member]), lines[member]
            assert above == -1 or above in before
            assert [parents[token] for token in line] == [lines[above][-1] if above >= 0 else -1, *line[:-1]]
        before |= here
    assert set(itertools.chain(*lines.values())) == set(Segments.of(layout).tokens().tolist())


@pytest.mark.parametrize("layout", random_layouts())
def test_no_token_runs_twice_where_chunks_are_tokens(layout: RowLayout) -> None:
    plan = scan_plan(Segments.of(layout), [ScanCost(1)])
    assert plan.tokens == sum(layout.num_tokens)


@pytest.mark.parametrize("layout", random_layouts())
@pytest.mark.parametrize("chunk", [2, 3, 8, 64])
def test_no_more_chunks_than_segments_or_paths_need(layout: RowLayout, chunk: int) -> None:
    segments, cost = Segments.of(layout), ScanCost(chunk, call=0.0)
    found = chunks_of(scan_plan(segments, [cost]), chunk)
    assert found <= int((-(-segments.lengths // chunk)).sum())
    assert found <= chunks_of(path_plan(segments, cost), chunk)


def test_a_rest_of_a_chunk_runs_with_what_comes_after_it() -> None:
    """Prompts of 70, 6 and 60 tokens: six tokens more leave room in a chunk of 64, 60 do not."""
    tokens = iter(range(1000))
    for prompt, runs in ((70, [64, 16, 16]), (6, [16, 16]), (60, [10, 10, 60])):
        begin = [next(tokens) for _ in range(prompt)]
        row = Row.from_sequences([[*begin, *(next(tokens) for _ in range(10))] for _ in range(2)])
        plan = scan_plan(Segments.of(row.layout), [ScanCost(64)])
        assert sorted(map(len, lines_of(plan).values())) == sorted(runs)
        assert plan.tokens == sum(runs)


def test_the_cheapest_length_of_a_chunk() -> None:
    segments = Segments.of(Row.from_lengths([20, 20, 20]).layout)
    costs = [ScanCost(16, 2.0), ScanCost(32, 1.0), ScanCost(64, 1.0)]
    assert scan_plan(segments, costs).chunk == 32
    assert scan_plan(segments, costs[::2]).chunk == 16 or costs[0].place * 32 > 64
    assert scan_plan(segments, [*costs, ScanCost(4, 1.0, step=0.0)]).chunk == 4
    assert scan_plan(segments, [*costs, ScanCost(4, 1.0, step=100.0)]).chunk == 32


@pytest.mark.parametrize("layout", random_layouts())
def test_the_plan_of_paths_holds_every_leaf_with_all_its_ancestors(layout: RowLayout) -> None:
    parents = parents_by_definition(layout)
    lines = list(lines_of(path_plan(Segments.of(layout), ScanCost())).values())
    assert sorted(line[-1] for line in lines) == [t for t in Segments.of(layout).tokens().tolist() if t not in parents]
    for line in lines:
        assert [parents[token] for token in line] == [-1, *line[:-1]]


@pytest.mark.parametrize("call", [0.0, 7.0, 40.0, 1e6])
def test_no_other_batches_cost_less(call: float) -> None:
    lengths = np.asarray([3, 3, 50, 51, 52, 7, 200, 8, 199])
    cost = ScanCost(chunk=2, place=1.5, step=3.0, call=call)
    plan = scan_plan(Segments.of(Row.from_lengths(lengths.tolist()).layout), [cost])
    ordered = np.sort(lengths)

    def spent(cuts: tuple[int, ...]) -> float:
        parts = [part for part in np.split(ordered, cuts) if part.size]
        chunks = [-(-int(part.max()) // 2) for part in parts]
        return sum(call + 3 * n + len(part) * n * 2 * 1.5 for n, part in zip(chunks, parts, strict=True))

    everything = itertools.chain.from_iterable(itertools.combinations(range(1, 9), n) for n in range(9))
    assert plan.cost == pytest.approx(min(map(spent, everything)))
    (level,) = plan.levels
    assert plan.cost == pytest.approx(spent(tuple(np.cumsum([len(bucket.members) for bucket in level])[:-1])))
