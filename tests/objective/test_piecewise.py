"""A row that is longer than memory, run in pieces, against the same row whole: log-probabilities, loss, gradients."""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flexdpo import FlexdpoError, Group, UnsupportedModelError, disable_dropout, pack, prepare_model, prove
from flexdpo.attention.block_masks import build_block_mask
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import CAUSAL, MaskKind, mask_mod_for
from flexdpo.attention.path_keys import PathKeys
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.layout import pieces as layout_pieces
from flexdpo.objective.batch import BatchTotals
from flexdpo.objective.logps import response_logps
from flexdpo.objective.objective import Objective
from flexdpo.training.batch import PackedBatch
from flexdpo.training.step import Runner
from flexdpo.training.train_step import make_train_step
from tests.conftest import CONFIGS, TOLERANCE, build_model, odd_groups, random_ids
from tests.hf.architectures import build_model as build_zoo_model
from tests.objective import bench_pieces
from tests.test_equivalence import Outcome, gradients_of, packed, relative_error

MODELS = sorted(CONFIGS)


def deep_group(rng: np.random.Generator) -> Group:
    """A trie of depth three: stems under the prompt, twigs under a stem, a response that ends inside another."""
    prompt, stem, twig = random_ids(rng, 20), random_ids(rng, 9), random_ids(rng, 4)
    responses = [
        stem + twig + random_ids(rng, 5),
        stem + twig + random_ids(rng, 8),
        random_ids(rng, 13),
        random_ids(rng, 3),
        stem + random_ids(rng, 6),
        stem + twig,
        random_ids(rng, 10),
    ]
    return Group.from_lists(prompt, responses, edges=[(0, 1), (2, 3), (0, 3), (4, 5), (6, 0)], name="deep")


def given_groups() -> list[Group]:
    rng = np.random.default_rng(5)
    return [odd_groups(rng)[0], deep_group(rng), *odd_groups(rng)[1:]]


@cache
def case_of(name: str) -> tuple[Any, Any, list[Group], Outcome]:
    model = prepare_model(build_model(name, "flexdpo"))
    reference = prepare_model(build_model(name, "flexdpo", seed=1))
    groups = given_groups()
    return model, reference, groups, packed(model, reference, pack(groups), groups)


def in_pieces(name: str, budget: int, multiple: int = 1) -> float:
    model, reference, groups, want = case_of(name)
    rows = pack(groups, budget, pad_to_multiple_of=multiple)
    assert sum(bool(row.pieces) for row in rows) == 1
    return relative_error(packed(model, reference, rows, groups), want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("budget", "multiple"), [(41, 1), (60, 1), (64, 8)])
def test_pieces_equal_the_whole_row(name: str, budget: int, multiple: int) -> None:
    assert in_pieces(name, budget, multiple) < TOLERANCE[name]


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_with_checkpointing(name: str) -> None:
    _, reference, groups, want = case_of(name)
    model = prepare_model(build_model(name, "flexdpo")).train()
    enable_checkpointing(model)
    assert relative_error(packed(model, reference, pack(groups, 41), groups), want) < TOLERANCE[name]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama4_text"])
def test_softcaps_sinks_and_chunks(name: str) -> None:
    groups = given_groups()
    model = prepare_model(build_zoo_model(name))
    disable_dropout(model)
    outcomes = [packed(model, model, pack(groups, budget), groups) for budget in (None, 41)]
    assert relative_error(outcomes[1], outcomes[0]) < 1e-6


# --- bugs that must be caught ----------------------------------------------------------------------------------------


def _without_a_branchs_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, calls = PathKeys.gradients, [0]

    def one_less(self: PathKeys) -> Any:
        made, found = gradients(self)
        calls[0] += bool(made)
        # what came back to the prompt is gone
        return ([], []) if made else (made, found)

    monkeypatch.setattr(PathKeys, "gradients", one_less)


def _twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = PathKeys.gradients

    def doubled(self: PathKeys) -> Any:
        made, found = gradients(self)
        return made, [2 * each for each in found]

    monkeypatch.setattr(PathKeys, "gradients", doubled)


def _wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = layout_pieces._piece

    def shifted(*args: Any) -> Any:
        found = piece(*args)
        if found.parent >= 0:
            found.layout.position_ids += 1
        return found

    monkeypatch.setattr(layout_pieces, "_piece", shifted)


def _window_ignores_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = layout_pieces._behind

    def everywhere(path: Any, own: Any) -> Any:
        keys = behind(path, own)
        # as if the whole path stood next to the branch
        keys.position_ids[:, : keys.length - own.length] = keys.position_ids[:, keys.length - own.length - 1].item()
        return keys

    monkeypatch.setattr(layout_pieces, "_behind", everywhere)


BUGS = {
    "a branch's gradients are not added": _without_a_branchs_gradients,
    "the prompt's backward counts twice": _twice,
    "a wrong position": _wrong_positions,
    "the window ignores the prompt": _window_ignores_the_prompt,
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    assert in_pieces("mistral", 41) > 1e-3


# --- what runs, and where --------------------------------------------------------------------------------------------


def test_every_distinct_token_runs_once_and_the_last_pieces_need_no_second_pass() -> None:
    model, *_ = case_of("llama")
    (row,) = pack([deep_group(np.random.default_rng(1))], 41)
    seen: dict[bool, list[int]] = {True: [], False: []}
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen[torch.is_grad_enabled()].append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            response_logps(model, row)
        assert sum(seen[False]) == row.num_tokens
        seen[False].clear()
        response_logps(model, row).sums.sum().backward()
    finally:
        handle.remove()
        model.zero_grad()
    # with gradients each token once; without, those whose graphs found no room at the first pass
    assert sum(seen[True]) == row.num_tokens
    assert 0 < sum(seen[False]) < row.num_tokens - 20


def test_a_row_moves_with_its_pieces_and_no_path_is_longer_than_the_budget() -> None:
    rows = pack(given_groups(), 41)
    row = next(row for row in rows if row.pieces)
    lengths = {number: piece.layout.length for number, piece in enumerate(row.pieces)}
    for number, piece in enumerate(row.pieces):
        keys = piece.layout.keys
        assert (keys.length if keys else lengths[number]) <= 41
    moved = row._map(lambda part: part.to("meta") if isinstance(part, torch.Tensor) else part)
    assert {piece.tokens.device.type for piece in moved.pieces} == {"meta"}
    assert torch.cat([piece.tokens for piece in row.pieces]).sort().values.tolist() == list(range(row.num_tokens))
    assert torch.cat([piece.targets for piece in row.pieces]).sort().values.tolist() == list(range(len(row.labels)))


@pytest.mark.parametrize("kind", [CAUSAL, MaskKind("sliding", 7), MaskKind("chunked", 8)], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_tiles_of_pieces(kind: MaskKind, multiple: int) -> None:
    row = next(row for row in pack(given_groups(), 64, pad_to_multiple_of=multiple) if row.pieces)
    assert len(row.pieces) > 2
    for piece in row.pieces:
        queries, keys = piece.layout.length, (piece.layout.keys or piece.layout).length
        mask = build_block_mask(piece.layout, kind, block_size=16)
        positions = (piece.layout.keys or piece.layout).position_ids[0]
        # the definition: of what stands before it on its path, the near enough
        dense = torch.zeros(queries, keys, dtype=torch.bool)
        whole, places = mask_mod_for(row.layout, kind), {}
        number, path = row.pieces.index(piece), []
        while number >= 0:
            path.insert(0, row.pieces[number])
            number = row.pieces[number].parent
        before = 0
        for each in path:
            places |= {before + n: int(token) for n, token in enumerate(each.tokens)}
            before += each.layout.length
        for q in range(len(piece.tokens)):
            for kv in places:
                dense[q, kv] = whole(0, 0, piece.tokens[q], places[kv])
                assert positions[kv] == row.position_ids[0, places[kv]]
        found = mask.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None])
        real = slice(0, len(piece.tokens))
        assert torch.equal(found[real], dense[real])
        want = create_block_mask(mask.mask_mod, 1, 1, queries, keys, device="cpu", BLOCK_SIZE=16)
        assert mask.shape == want.shape
        kinds = [(m.to_dense(), _full_tiles(m)) for m in (mask, want)]
        assert bool((kinds[0][0] >= kinds[1][0]).all())
        assert bool((kinds[0][1] <= kinds[1][1]).all())


def _full_tiles(mask: Any) -> torch.Tensor:
    found = torch.zeros(mask.full_kv_indices.shape[-2:], dtype=torch.int64)
    for line, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        found[line, mask.full_kv_indices[0, 0, line, :count].long()] = 1
    return found


@pytest.mark.parametrize("loss_type", ["aot", "sft", "ipo"])
@pytest.mark.parametrize("no_sync", [False, True])
def test_every_loss_and_a_process_among_others(loss_type: str, no_sync: bool) -> None:
    model, reference, groups, _ = case_of("gpt2")
    held = []

    @contextlib.contextmanager
    def hold(model: Any):
        held.append(True)
        yield
        held.append(False)

    outcomes = []
    for rows in (pack(groups), pack(groups[1:2], 41) + pack([groups[0], *groups[2:]])):
        settings = {"no_sync": hold} if no_sync else {}
        totals = BatchTotals.of([group for row in rows for group in row.groups])
        run = Runner(
            model,
            Objective((loss_type,)),
            reference=lambda row: response_logps(reference, row),
            backward=torch.Tensor.backward,
            **settings,
        )
        result = run(PackedBatch(rows, totals))
        outcomes.append(Outcome(result.loss[None], result.loss, gradients_of(model)))
    assert relative_error(outcomes[1], outcomes[0]) < 1e-9
    if no_sync:
        # pieces send gradients back many times, so what is synchronised is a row behind them
        run = Runner(model, Objective(("sft",)), backward=torch.Tensor.backward, no_sync=hold)
        run(PackedBatch(pack(groups[1:2], 41), BatchTotals.of(groups[1:2])))
        assert held[-2:] == [True, False]
        model.zero_grad()


def test_adapters_the_step_and_the_proof() -> None:
    from peft import LoraConfig, get_peft_model

    groups = given_groups()
    steps = []
    for budget in (None, 41):
        torch.manual_seed(0)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(build_model("llama", "flexdpo"), config)
        if budget is not None:
            assert prove(model, groups[1:3], max_tokens_per_row=budget).gradient_error < 1e-6
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
        step = make_train_step(model, optimizer, beta=0.3, max_tokens_per_row=budget)
        results = [step(groups) for _ in range(2)]
        assert results[0].tokens_run == sum(row.num_tokens for row in pack(groups))
        steps.append(torch.stack([value for result in results for value in (result.loss, result.grad_norm)]))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-10)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    groups = [deep_group(np.random.default_rng(1))]
    (row,) = pack(groups, 41)
    batch = PackedBatch([row], BatchTotals.of(groups))
    model, *_ = case_of("llama")
    with pytest.raises(FlexdpoError, match=r"deep has \d+ distinct tokens, .* \d pieces, but processes that share"):
        Runner(model, Objective(("sft",)), agree=lambda number: number)(batch)
    with pytest.raises(FlexdpoError, match=r"load-balancing loss needs .* router_aux_loss_coef=0"):
        Runner(model, Objective(("sft",)), router=object())(batch)
    stateful = prepare_model(build_zoo_model("lfm2"))
    with pytest.raises(UnsupportedModelError, match=r"cannot run it in pieces: \d of its layers carry a state"):
        response_logps(stateful, row)
    piece = row.pieces[-1]
    mask, heads = row_mask_for(piece.layout, CAUSAL, "varlen"), torch.zeros(1, 2, piece.layout.length, 8)
    keys = torch.zeros(1, 2, piece.layout.keys.length, 8)
    with pytest.raises(FlexdpoError, match=r"attn_impl='varlen' plans whole rows.*use attn_impl='flex'"):
        packed_attention(heads, keys, keys, mask)
    logps = response_logps(model, row).sums.sum()
    logps.backward(retain_graph=True)
    with pytest.raises(FlexdpoError, match=r"ran backwards already"):
        logps.backward()
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_memory_is_that_of_the_longest_path(name: str) -> None:
    one, whole, parts = (bench_pieces.measure(name, what)["bytes"] for what in ("one", "whole", "pieces"))
    assert parts < 1.3 * one
    assert whole > 1.6 * one
