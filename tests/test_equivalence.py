"""A packed, shared batch against one sequence at a time: log-probabilities, loss and every gradient, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flexdpo import Group, Row, RowLayout, pack, prepare_model
from flexdpo.layout.packing import MIN_SHARED
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.logps import response_logps
from flexdpo.objective.objective import Objective
from flexdpo.training.batch import PackedBatch
from flexdpo.training.step import Runner
from tests.conftest import CONFIGS, TOLERANCE, build_model, odd_groups, random_ids

OBJECTIVE = Objective(("sigmoid", "sft"), (1.0, 0.3), beta=0.2, label_smoothing=0.1)


class Outcome(NamedTuple):
    logps: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def unpacked(model: Any, reference: Any, groups: list[Group]) -> Outcome:
    """The ordinary computation, written out: every response behind its own prompt, one at a time."""

    def logps(of: Any) -> list[list[torch.Tensor]]:
        return [[sequence_logp(of, group, response) for response in group.response_ids] for group in groups]

    policy = logps(model)
    with torch.no_grad():
        ref = logps(reference)
    dpo, nll, pairs, tokens = 0.0, 0.0, 0, 0
    for i, group in enumerate(groups):
        for chosen, rejected in group.edges:
            margin = 0.2 * (policy[i][chosen] - ref[i][chosen] - policy[i][rejected] + ref[i][rejected])
            dpo = dpo - 0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin)
            nll = nll - policy[i][chosen]
            pairs, tokens = pairs + 1, tokens + len(group.response_ids[chosen])
    loss = dpo / pairs + 0.3 * nll / tokens
    loss.backward()
    flat = torch.stack([value for values in policy for value in values]).detach()
    return Outcome(flat, loss.detach(), gradients_of(model))


def sequence_logp(model: Any, group: Group, response: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    first = len(group.prompt_ids)
    return sum(logps[i - 1, ids[0, i]] for i in range(first, ids.shape[1]))


def packed(model: Any, reference: Any, rows: list[Row], groups: list[Group]) -> Outcome:
    batch = PackedBatch(rows, BatchTotals.of(groups))
    with torch.no_grad():
        of_group = {}
        for row in rows:
            sums = response_logps(model, row).sums
            for group in row.groups:
                of_group[id(group)], sums = sums[: len(group.response_ids)], sums[len(group.response_ids) :]
    run = Runner(model, OBJECTIVE, lambda row: response_logps(reference, row), torch.Tensor.backward)
    result = run(batch)
    return Outcome(torch.cat([of_group[id(g)] for g in groups]), result.loss, gradients_of(model))


def relative_error(got: Outcome, want: Outcome) -> float:
    """Largest error of any log-probability, the loss or any gradient, each against its own largest value."""
    assert got.gradients.keys() == want.gradients.keys()
    # a parameter that the loss does not move (a bias that softmax cancels) is judged against the largest gradient
    scale = max(float(g.abs().max()) for g in want.gradients.values())
    errors = [_relative(got.logps, want.logps), _relative(got.loss, want.loss)]
    for name, gradient in want.gradients.items():
        size = max(float(gradient.abs().max()), 1e-3 * scale)
        errors.append(float((got.gradients[name] - gradient).abs().max()) / size)
    return max(errors)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(params=sorted(CONFIGS))
def case(request: pytest.FixtureRequest):
    return case_of(request.param)


@cache
def case_of(name: str):
    """No run changes a weight, so models and the unpacked outcome serve every layout and every bug."""
    groups = odd_groups(np.random.default_rng(20241))
    stock, stock_reference = build_model(name), build_model(name, seed=1)
    model = prepare_model(build_model(name, "flexdpo"))
    reference = prepare_model(build_model(name, "flexdpo", seed=1))
    return name, groups, model, reference, unpacked(stock, stock_reference, groups)


@pytest.mark.parametrize("layout", ["one row", "padded", "several rows"])
def test_packed_equals_unpacked(case, layout: str) -> None:
    name, groups, model, reference, want = case
    rows = {
        "one row": lambda: [Row.from_groups(groups)],
        "padded": lambda: [Row.from_groups(groups, pad_to_multiple_of=128)],
        "several rows": lambda: [Row.from_groups(groups[:1], pad_to_multiple_of=16), Row.from_groups(groups[1:])],
    }[layout]()
    got = packed(model, reference, rows, groups)
    assert len(got.gradients) == len(list(model.parameters()))
    assert relative_error(got, want) < TOLERANCE[name]


def with_a_system_prompt(rng: np.random.Generator) -> list[Group]:
    """The odd groups, two of them and a stranger behind the same long beginning; one prompt begins another."""
    beginning = random_ids(rng, MIN_SHARED + 3)
    pair, deep, short, triple = odd_groups(rng)

    def behind(group: Group) -> Group:
        return dataclasses.replace(group, prompt_ids=np.concatenate([beginning, group.prompt_ids]))

    whole = Group.from_lists(beginning, [pair.prompt_ids[:4].tolist(), random_ids(rng, 3)], name="prompt alone")
    return [behind(pair), short, behind(deep), triple, whole]


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sharing_across_the_groups_of_a_step_equals_unpacked(rng, name: str, budget: int | None) -> None:
    groups = with_a_system_prompt(rng)
    model, reference = (prepare_model(build_model(name, "flexdpo", seed=seed)) for seed in (0, 1))
    want = unpacked(build_model(name), build_model(name, seed=1), groups)
    rows = pack(groups, budget, sharing="step")
    assert any(len(row.documents) < len(row.groups) for row in rows)
    assert (len(rows) > 1) is (budget is not None)
    assert relative_error(packed(model, reference, rows, groups), want) < TOLERANCE[name]
    if budget is None:
        bug = packed(model, reference, [leaking_mask(row) for row in rows], groups)
        assert relative_error(bug, want) > 1e-3


# --- seeded bugs: each has been made by somebody, and each must fail the check above ---------------------------------


def leaking_mask(row: Row) -> Row:
    """The rejected response sees the chosen one."""
    layout = row.layout
    end = layout.subtree_end.clone()
    for start, stop in row.documents:
        end[0, start:stop] = stop
    return dataclasses.replace(row, layout=RowLayout(layout.position_ids, end, layout.num_tokens))


def positions_off_by_the_chosen_length(row: Row) -> Row:
    """Positions count row indices inside a document, so everything after the first response is shifted."""
    layout = row.layout
    positions = layout.position_ids.clone()
    for start, stop in row.documents:
        positions[0, start:stop] = torch.arange(stop - start)
    return dataclasses.replace(row, layout=RowLayout(positions, layout.subtree_end, layout.num_tokens))


def first_response_token_dropped(row: Row) -> Row:
    """The token that the prompt's last position predicts is not counted."""
    counted = row.member_responses == torch.roll(row.member_responses, 1)
    return dataclasses.replace(
        row, member_targets=row.member_targets[counted], member_responses=row.member_responses[counted]
    )


def window_on_row_indices(row: Row) -> Row:
    layout = row.layout
    indices = torch.arange(layout.length)[None]
    wrong = RowLayout(indices, layout.subtree_end, layout.num_tokens)
    changed = dataclasses.replace(row, layout=wrong)
    right = layout.position_ids
    changed.inputs = lambda: Row.inputs(changed) | {"position_ids": right}  # type: ignore[method-assign]
    return changed


BUGS = [leaking_mask, positions_off_by_the_chosen_length, first_response_token_dropped, window_on_row_indices]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_seeded_bugs_fail_the_check(case, bug: Callable[[Row], Row]) -> None:
    name, groups, model, reference, want = case
    got = packed(model, reference, [bug(Row.from_groups(groups))], groups)
    error = relative_error(got, want)
    if bug is window_on_row_indices and name != "mistral":
        # no window, so nothing is wrong: the mutation must not be what makes the others fail
        assert error < TOLERANCE[name]
    else:
        assert error > 1e-3


def test_a_leak_can_leave_every_chosen_value_exact(rng: np.random.Generator) -> None:
    """Why the check looks at rejected responses too."""
    groups = odd_groups(rng)[:1]
    model = prepare_model(build_model("gpt2", "flexdpo"))
    right, wrong = (
        response_logps(model, row).sums for row in (Row.from_groups(groups), leaking_mask(Row.from_groups(groups)))
    )
    torch.testing.assert_close(right[0], wrong[0])
    assert (right[1] - wrong[1]).abs() > 1e-2
