"""A model that shares prefixes in padded batches against the same model without: values, gradients, refusals."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint

import flexdpo
from flexdpo.dropin import gather, hooks, plan
from flexdpo.dropin.batch_trie import BatchTrie
from flexdpo.dropin.rules import REASONS, Positions
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.hf.draws import being_asked
from flexdpo.hf.row_dependence import LengthLimits
from flexdpo.hf.unwrap import backbone_of
from flexdpo.hf.versions import CHUNKS_BEGIN_ANEW
from tests.conftest import VOCABULARY
from tests.hf.architectures import build_model, build_or_skip, needs_states, zoo
from tests.hf.equivalence import Float64, Run, example_row, gradient_error, logit_error, packed_run, unpacked_run

# learned positions; none of it special; softcaps and a window; sinks and experts; experts; chunks; a window
MODELS = ["gpt2", "llama", "gemma2", "gpt_oss", "mixtral", "llama4", "mistral"]
EXPERTS = ("gpt_oss", "mixtral")
TOLERANCE = 1e-10
ALL = {"min_gain": 1.0, "min_prefix": 1}


class Batch(dict[str, torch.Tensor]):
    """``input_ids`` and ``attention_mask`` of a padded batch."""

    @property
    def real(self) -> torch.Tensor:
        return self["attention_mask"] != 0


def padded_batch(side: str = "right", *, seed: int = 0, filler: int = 0, repeat: bool = True) -> Batch:
    """Three prompts longer than any window: three responses with a trie of depth two, two responses, one; repeats."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        # token ids below 8 are special in some configurations
        return torch.randint(8, 100, (count,), generator=generator)

    first, second, stem = tokens(14), tokens(9), tokens(4)
    rows = [
        torch.cat([first, stem, tokens(5)]),
        torch.cat([second, tokens(6)]),
        torch.cat([first, stem, tokens(9)]),
        torch.cat([first, tokens(7)]),
        tokens(12),
        torch.cat([second, tokens(11)]),
    ]
    if repeat:
        # one row again, and the beginning of another as a row of its own
        rows += [rows[0], rows[2][:-3]]
    return pad(rows, side, filler)


def pad(rows: list[torch.Tensor], side: str, filler: int = 0) -> Batch:
    columns = max(map(len, rows)) + (2 if side == "both" else 0)
    ids, mask = torch.full((len(rows), columns), filler), torch.zeros(len(rows), columns, dtype=torch.int64)
    for number, row in enumerate(rows):
        room = columns - len(row)
        start = {"right": 0, "left": room, "both": number % (room + 1)}[side]
        ids[number, start : start + len(row)], mask[number, start : start + len(row)] = row, 1
    return Batch(input_ids=ids, attention_mask=mask)


def score(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weigh every logit of every real token at random."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    return (weights * logits)[batch.real].sum() / logits.shape[-1]


def run(model: Any, batch: Batch, call: Callable[..., Any] | None = None, **kwargs: Any) -> Run:
    """Logits at the real tokens and the gradient of every parameter, the auxiliary loss included where there is one."""
    model.zero_grad()
    output = (model if call is None else call)(**batch, **{"use_cache": False, **kwargs})
    loss = score(output.logits, batch)
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + 3 * output.aux_loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Run([output.logits[batch.real].detach()], gradients)


def assert_same(got: Run, want: Run, tolerance: float = TOLERANCE) -> None:
    assert logit_error(got, want) < tolerance
    assert gradient_error(got, want) < tolerance


def assert_identical(got: Run, want: Run) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got.logits, want.logits, strict=True))
    assert got.gradients.keys() == want.gradients.keys()
    assert all(torch.equal(got.gradients[name], want.gradients[name]) for name in want.gradients)


def router(name: str) -> dict[str, bool]:
    return {"output_router_logits": True} if name in EXPERTS else {}


# --- the same result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_padded_batch(name: str, side: str) -> None:
    model, batch = build_model(name), padded_batch(side)
    with Float64():
        want = run(model, batch, **router(name))
        sharing = flexdpo.share_prefixes(model, **ALL)
        got = run(model, batch, **router(name))
    assert_same(got, want)
    if name == "llama4" and side != "right":
        # it may look at absolute positions further on, which a few tokens do not tell
        assert sharing.stats.passed_through == {"left_padding": 1}
        assert_identical(got, want)
    else:
        assert sharing.stats.batches_shared == 1
        assert sharing.stats.tokens_in == batch["input_ids"].numel()
        tokens = 14 + 4 + 5 + 9 + 7 + 9 + 6 + 11 + 12
        # positions of GPT-2 are columns, and equal tokens of rows that begin elsewhere stand at different ones
        apart = name == "gpt2" and side != "right"
        assert tokens < sharing.stats.tokens_run <= batch.real.sum() if apart else sharing.stats.tokens_run == tokens


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "mixtral"])
def test_completions_of_left_padded_prompts(name: str) -> None:
    """As sampled: prompts padded on the left, their completions on the right.

    GPT-2 counts columns, which completions of one prompt agree in; OPT counts tokens.
    """
    generator = torch.Generator().manual_seed(3)
    rows, masks = [], []
    for length in (12, 8):
        prompt = torch.randint(8, 100, (length,), generator=generator)
        for answer in (6, 3, 5):
            completion = torch.randint(8, 100, (6,), generator=generator)
            rows.append(torch.cat([torch.zeros(12 - length, dtype=torch.int64), prompt, completion]))
            masks.append(torch.tensor([0] * (12 - length) + [1] * (length + answer) + [0] * (6 - answer)))
    batch = Batch(input_ids=torch.stack(rows), attention_mask=torch.stack(masks))
    model = build_model(name)
    with Float64():
        want = run(model, batch)
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            assert_same(run(model, batch), want)
            assert sharing.stats.batches_shared == 1
            assert sharing.stats.tokens_run == 12 + 8 + 2 * (6 + 3 + 5)


@pytest.mark.parametrize("counted", ["tokens", "columns", "far away"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_positions_of_the_callers_own(name: str, counted: str) -> None:
    """Tokens are merged where their positions agree too."""
    model, batch = build_model(name), padded_batch("left")
    columns = torch.arange(batch["input_ids"].shape[1])[None]
    positions = {
        # as where one samples: what the mask tells, and something at padding
        "tokens": batch["attention_mask"].cumsum(1).sub(1).masked_fill(~batch.real, 1),
        "columns": columns,
        "far away": columns + torch.arange(len(batch["input_ids"]))[:, None] % 2 * 20,
    }[counted]
    with Float64():
        want = run(model, batch, position_ids=positions)
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            assert_same(run(model, batch, position_ids=positions), want)
            assert sharing.stats.batches_shared == 1
            assert (sharing.stats.tokens_run == 77) == (counted == "tokens")


def packed_rows(rows: int) -> dict[str, torch.Tensor]:
    """The sequences of a batch one behind the other, told apart by positions that begin again; padding at the end."""
    batch = padded_batch()
    sequences = [ids[real] for ids, real in zip(batch["input_ids"], batch.real, strict=True)]
    each = [torch.cat(sequences[number::rows]) for number in range(rows)]
    places = [torch.cat([torch.arange(len(one)) for one in sequences[number::rows]]) for number in range(rows)]
    ids, positions = (torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in (each, places))
    return {"input_ids": ids, "position_ids": positions}


def run_packed(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Run:
    real = torch.ones_like(inputs["input_ids"])
    return run(model, Batch(input_ids=inputs["input_ids"], attention_mask=real), lambda **given: model(
        **{**given, **inputs, "attention_mask": None}), **kwargs)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_others_packed(name: str, rows: int) -> None:
    """Sequences one behind the other in a row, as verl and OpenRLHF pass them, share what they begin with."""
    model, inputs = build_model(name), packed_rows(rows)
    with Float64():
        want = run_packed(model, inputs)
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            assert_same(run_packed(model, inputs), want)
            if name == "llama4" and not CHUNKS_BEGIN_ANEW:
                assert sharing.stats.passed_through == {"position_ids": 1}
                return
            if name == "gpt_oss":
                # transformers' own lets the sequences of a row see each other
                assert sharing.stats.passed_through == ({"one_row": 1} if rows == 1 else {})
                assert sharing.stats.tokens_run == inputs["input_ids"].numel()
                return
            assert sharing.stats.batches_shared == 1
            # of tokens at the end of a row that fill it up one is run
            assert 77 <= sharing.stats.tokens_run <= 78


def test_positions_that_no_model_keeps_sequences_apart_by() -> None:
    """With a cache transformers lets the sequences of a row see each other, and so does the shared batch."""
    model, inputs = build_model("llama").train(), packed_rows(2)
    with Float64():
        apart, want = (run_packed(model, inputs, use_cache=use_cache) for use_cache in (False, None))
        assert logit_error(want, apart) > 1e-3
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            assert_same(run_packed(model, inputs, use_cache=None), want)
            assert sharing.stats.batches_shared == 1


@pytest.mark.parametrize("name", [pytest.param("lfm2", marks=needs_states), "llama"])
def test_packed_rows_that_pass_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions run over the ends of sequences; and to compare thousands of them would take longer than it saves."""
    monkeypatch.setattr(plan, "_MOST_SEQUENCES", 3)
    model, inputs = build_model(name), packed_rows(1)
    want = run_packed(model, inputs)
    sharing = flexdpo.share_prefixes(model, **ALL)
    assert_identical(run_packed(model, inputs), want)
    assert sharing.stats.passed_through == {"position_ids": 1}


def test_merging_tokens_at_different_positions_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build_model("gpt2"), padded_batch("left")
    want = run(model, batch)
    sort_batch = plan.sort_batch
    tokens_only = lambda keys, *args, **more: sort_batch(keys & 0xFFFFFFFF, *args, **more)  # noqa: E731
    monkeypatch.setattr(plan, "sort_batch", tokens_only)
    with flexdpo.share_prefixes(model, **ALL) as sharing:
        assert logit_error(run(model, batch), want) > 1e-2
        assert sharing.stats.batches_shared == 1


def test_a_batch_without_a_mask_has_no_padding() -> None:
    model, batch = build_model("llama"), padded_batch()
    ids = batch["input_ids"][[0, 2, 3, 6]][:, :20]
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids))
    with Float64():
        want = run(model, batch)
        sharing = flexdpo.share_prefixes(model, **ALL)
        got = run(model, batch, call=lambda input_ids, attention_mask, **more: model(input_ids, **more))
    assert_same(got, want)
    assert sharing.stats.batches_shared == 1


def test_hidden_states_and_router_logits_come_back_in_their_places() -> None:
    model, batch = build_model("mixtral"), padded_batch("left")
    backbone = model.model
    asked = {**batch, "use_cache": False, "output_hidden_states": True, "output_router_logits": True}
    with Float64(), torch.no_grad():
        want = backbone(**asked)
        flexdpo.share_prefixes(model, **ALL)
        got = backbone(**asked)
        as_tuple = backbone(**asked, return_dict=False)
    assert got.keys() == want.keys()
    pairs = [(got.last_hidden_state, want.last_hidden_state)]
    pairs += zip(got.hidden_states, want.hidden_states, strict=True)
    assert got.hidden_states[-1] is got.last_hidden_state
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine[batch.real], theirs[batch.real], rtol=0, atol=1e-10)
        assert not mine[~batch.real].any()
    for mine, theirs in zip(got.router_logits, want.router_logits, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine[batch.real.reshape(-1)], theirs[batch.real.reshape(-1)], rtol=0, atol=1e-10)
    torch.testing.assert_close(as_tuple[0], got.last_hidden_state, rtol=0, atol=0)


def test_a_tensor_that_has_no_place() -> None:
    model = build_model("llama")
    model.model.register_forward_hook(lambda *_: {"last_hidden_state": torch.zeros(3, 5)})
    flexdpo.share_prefixes(model, **ALL)
    with pytest.raises(
        UnsupportedModelError, match=r"returned a tensor of shape \[3, 5\] for a packed row of 77 tokens"
    ):
        model.model(**padded_batch(), use_cache=False)


def test_what_arrives_at_padding_reaches_no_parameter() -> None:
    """Not even when it is not a number, as from a loss that divides by what stands there."""
    model, batch = build_model("llama"), padded_batch()
    flexdpo.share_prefixes(model, **ALL)
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    hidden.register_hook(lambda gradient: gradient.masked_fill(~batch.real[..., None], float("nan")))
    hidden.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters())


def test_copies_are_added_up_in_float32() -> None:
    """In bfloat16 256 + 1 is 256: adding copies one by one would lose those that come late."""
    nodes = torch.zeros(1, 512, dtype=torch.int64)
    values = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    gather._Gather.apply(values, nodes).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[512.0] * 4]


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_autocast_bfloat16(name: str) -> None:
    """No further from float64 than the padded run under the same autocast, with a band for other sums."""
    batch, truth_model = padded_batch(), build_model(name)
    with Float64():
        truth = run(truth_model, batch)
    model = build_model(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(model, batch)
        flexdpo.share_prefixes(model, **ALL)
        got = run(model, batch)
    assert logit_error(got, truth) < 1.25 * logit_error(plain, truth) + 1e-3
    assert gradient_error(got, truth) < 1.25 * gradient_error(plain, truth) + 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_gradient_checkpointing_of_the_layers(name: str, use_reentrant: bool) -> None:
    model, batch = build_model(name), padded_batch()
    want = run(model, batch)
    sharing = flexdpo.share_prefixes(model, **ALL)
    without = run(model, batch)
    model.train()
    enable_checkpointing(model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    got = run(model, batch)
    assert_same(got, without)
    # without Float64, which does not reach what the backward computes again
    assert_same(got, want, 1e-6)
    assert sharing.stats.batches_shared == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_gradient_checkpointing_around_the_whole_model(name: str, use_reentrant: bool) -> None:
    """The backward runs the whole model again, with another batch's forward in between; it counts once."""
    model, batch, other = build_model(name), padded_batch(), padded_batch(seed=5)
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)  # what reentrant checkpoints hang on

    def call(**inputs: Any) -> Any:
        logits = checkpoint(lambda _: model(**inputs).logits, start, use_reentrant=use_reentrant)
        with torch.no_grad():
            model(**other, use_cache=False)
        return type("Output", (), {"logits": logits})

    want = run(model, batch)
    sharing = flexdpo.share_prefixes(model, **ALL)
    without = run(model, batch)
    got = run(model, batch, call=call)
    assert_same(got, without)
    assert_same(got, want, 1e-6)
    assert sharing.stats.batches_shared == 3


@pytest.mark.parametrize("share_first", [True, False])
def test_lora(share_first: bool) -> None:
    peft = pytest.importorskip("peft")
    plain, batch = build_model("mistral"), padded_batch()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)

    def wrap(model: Any) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    with Float64():
        want = run(wrap(copy.deepcopy(plain)), batch)
        if share_first:
            flexdpo.share_prefixes(plain, **ALL)
        model = wrap(plain)
        if not share_first:
            flexdpo.share_prefixes(model, **ALL)
        assert_same(run(model, batch), want)
    assert flexdpo.sharing_stats(model).batches_shared == 1
    assert all("lora_" in name for name in want.gradients)


def test_a_classifier() -> None:
    """A reward model reads the last token of each row, and learns what it learned before."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    settings = {**zoo()["llama"].config, "num_labels": 1, "pad_token_id": 0}
    config = LlamaConfig(**settings)
    torch.manual_seed(0)
    model, batch = LlamaForSequenceClassification(config).double().eval(), padded_batch()
    margin = torch.ones(batch["input_ids"].shape[0] // 2)  # TRL's RewardTrainer hands it to the model as well

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        rewards = model(**batch, margin=margin, use_cache=False).logits
        return rewards.detach(), list(torch.autograd.grad(rewards.square().sum(), list(model.parameters())))

    with Float64():
        want = gradients()
        with flexdpo.share_prefixes(model, **ALL) as sharing:
            got = gradients()
            assert sharing.stats.batches_shared == 1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_compiled_model_pauses_for_the_plan() -> None:
    torch._dynamo.reset()
    model = build_model("llama", num_hidden_layers=1)
    batches = [padded_batch(seed=seed) for seed in range(3)]
    with Float64():
        wants = [run(model, batch) for batch in batches]
    sharing = flexdpo.share_prefixes(model, **ALL)
    compiled = torch.compile(model, backend="eager")
    for batch, want in zip(batches, wants, strict=True):
        assert_same(run(model, batch, call=compiled), want, 1e-6)
    assert sharing.stats.batches_shared == 3


def test_an_explicit_row_runs_on_a_shared_model() -> None:
    model, row = build_model("mistral"), example_row()
    with Float64():
        want = unpacked_run(model, row)
        sharing = flexdpo.share_prefixes(model, **ALL)
        got = packed_run(model, row)
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE
    assert sharing.stats == type(sharing.stats)()


def test_a_model_that_was_prepared_before() -> None:
    model, row, batch = flexdpo.prepare_model(build_model("mistral"), impl="sdpa"), example_row(), padded_batch()
    want, want_row = run(model, batch), packed_run(model, row)
    with flexdpo.share_prefixes(model, **ALL) as sharing:
        assert_same(run(model, batch), want, 1e-6)
        assert sharing.stats.batches_shared == 1
    assert model.config._attn_implementation == "flexdpo"
    assert model._flexdpo_impl == "sdpa"
    assert_identical(run(model, batch), want)
    assert_identical(packed_run(model, row), want_row)


@pytest.mark.parametrize("of", ["input_ids", "attention_mask"])
def test_a_loader_that_fills_its_memory_again_gives_another_batch(of: str) -> None:
    model, batch = build_model("llama"), padded_batch()
    memory = {name: value.numpy().copy() for name, value in batch.items()}
    reused = Batch({name: torch.from_numpy(value) for name, value in memory.items()})
    others = padded_batch(seed=1)
    with flexdpo.share_prefixes(model, **ALL), Float64():
        run(model, reused)
        # behind torch's back
        if of == "input_ids":
            memory[of][...] = others[of].numpy()
        else:
            memory[of][1, batch[of][1].sum() - 1] = 0
        got = run(model, reused)
    now = Batch({name: torch.from_numpy(value.copy()) for name, value in memory.items()})
    with Float64():
        assert_same(got, run(model, now))


def test_a_plan_of_inference_is_not_used_in_training() -> None:
    model, batch = build_model("llama"), padded_batch()
    with flexdpo.share_prefixes(model, **ALL), Float64():
        with torch.inference_mode():
            model(**batch, use_cache=False)
        got = run(model, batch)
    with Float64():
        assert_same(got, run(model, batch))


def test_policy_and_reference_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan_batch = hooks.plan_batch
    hooks._in_thread.recent.clear()
    monkeypatch.setattr(hooks, "plan_batch", lambda *args: planned.append(args) or plan_batch(*args))
    policy, reference, batch = build_model("mistral"), build_model("mistral", seed=3), padded_batch()
    with Float64():
        wants = [run(policy, batch), run(reference, batch)]
        for model in (policy, reference):
            flexdpo.share_prefixes(model, **ALL)
        gots = [run(policy, batch), run(reference, batch)]
        assert len(planned) == 1
        # a batch that was changed in place is another one
        batch["input_ids"][0, 3] = 77
        flexdpo.unshare(reference)
        assert_same(run(policy, batch), run(Unshared(policy), batch))
    assert len(planned) == 2
    for got, want in zip(gots, wants, strict=True):
        assert_same(got, want)
    del batch, planned[:]
    import gc

    gc.collect()
    assert not hooks._in_thread.recent


def Unshared(model: Any) -> Any:  # noqa: N802
    """A copy of a shared model that is not shared."""
    other = copy.deepcopy(model)
    flexdpo.unshare(other)
    return other


def test_a_copy_of_a_shared_model_is_shared_and_counts_for_itself() -> None:
    model, batch = build_model("llama"), padded_batch()
    want = run(model, batch)
    flexdpo.share_prefixes(model, **ALL)
    other = copy.deepcopy(model)
    flexdpo.unshare(model)
    assert_same(run(other, batch), want, 1e-6)
    assert flexdpo.sharing_stats(other).batches_shared == 1
    flexdpo.unshare(other)
    assert_identical(run(other, batch), want)


# --- bugs that must not go unnoticed ---------------------------------------------------------------------------------


def _changed(trie: BatchTrie, **changes: torch.Tensor) -> BatchTrie:
    return BatchTrie(**{**vars(trie), **changes})


def _leak(trie: BatchTrie) -> BatchTrie:
    return _changed(trie, subtree_end=torch.full_like(trie.subtree_end, len(trie)))


def _subtrees_one_short(trie: BatchTrie) -> BatchTrie:
    own = torch.arange(1, len(trie) + 1)
    return _changed(trie, subtree_end=torch.maximum(own, trie.subtree_end - 1))


def _row_indices_as_positions(trie: BatchTrie) -> BatchTrie:
    return _changed(trie, depths=torch.arange(len(trie)))


def _another_rows_place(trie: BatchTrie) -> BatchTrie:
    nodes = trie.nodes.clone()
    nodes[[0, 2], 19] = nodes[[2, 0], 19]
    return _changed(trie, nodes=nodes)


def _another_token(trie: BatchTrie) -> BatchTrie:
    return _changed(trie, sources=trie.sources.roll(1))


@pytest.mark.parametrize(
    "bug", [_leak, _subtrees_one_short, _row_indices_as_positions, _another_rows_place, _another_token]
)
def test_a_wrong_trie_does_not_pass(bug: Callable[[BatchTrie], BatchTrie], monkeypatch: pytest.MonkeyPatch) -> None:
    # its positions are those of the trie; those of GPT-2 are told to it
    model, batch = build_model("mistral"), padded_batch()
    want = run(model, batch)
    trie_of = plan.trie_of
    monkeypatch.setattr(plan, "trie_of", lambda *args: bug(trie_of(*args)))
    flexdpo.share_prefixes(model, **ALL)
    got = run(model, batch)
    assert gradient_error(got, want) > 1e-3
    assert logit_error(got, want) > 1e-3


def test_losing_the_gradients_of_copies_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values stay exact; only the gradients show it."""

    class FirstCopyOnly(gather._Gather):
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            (nodes,) = ctx.saved_tensors
            total = gradient.new_zeros((ctx.length, *gradient.shape[2:]))
            return total.index_put((nodes[nodes >= 0],), gradient[nodes >= 0]), None

    model, batch = build_model("gpt2"), padded_batch()
    want = run(model, batch)
    flexdpo.share_prefixes(model, **ALL)
    monkeypatch.setattr(gather, "_Gather", FirstCopyOnly)
    got = run(model, batch)
    assert logit_error(got, want) < 1e-10
    assert gradient_error(got, want) > 1e-3


def test_ignoring_absolute_positions_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 on left-padded rows, if one took its positions for relative ones."""
    model, batch = build_model("gpt2"), padded_batch("left")
    want = run(model, batch)
    monkeypatch.setattr(Positions, "of", classmethod(lambda cls, _: cls(relative=True, limits=LengthLimits())))
    flexdpo.share_prefixes(model, **ALL)
    assert logit_error(run(model, batch), want) > 1e-2


def test_counting_shared_tokens_once_in_the_auxiliary_loss_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Router logits that are not gathered belong to other tokens."""
    model, batch = build_model("mixtral"), padded_batch()
    want = run(model, batch, output_router_logits=True)
    place = gather.SharedBatch._placed_tensor

    def misplaced(self: Any, values: torch.Tensor) -> torch.Tensor:
        return place(self, values.roll(1, 0) if values.shape[0] == self.layout.length else values)

    monkeypatch.setattr(gather.SharedBatch, "_placed_tensor", misplaced)
    flexdpo.share_prefixes(model, **ALL)
    got = run(model, batch, output_router_logits=True)
    assert logit_error(got, want) < 1e-6
    assert gradient_error(got, want) > 1e-4


# --- what passes through ---------------------------------------------------------------------------------------------


def _with_gap(batch: Batch) -> dict[str, Any]:
    mask = batch["attention_mask"].clone()
    mask[0, 4] = 0
    return {**batch, "attention_mask": mask}


def _with_embeddings(model: Any, batch: Batch) -> dict[str, Any]:
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    return {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}


def _returned_cache(output: Any) -> bool:
    """Whether a call returned a cache, under its name of 5.24 or the older one."""
    return any(output.get(name) is not None for name in ("cache", "past_key_values"))


def _dense_mask(batch: Batch) -> torch.Tensor:
    columns = batch["input_ids"].shape[1]
    return torch.ones(columns, columns, dtype=torch.bool).tril() & batch.real[:, None, None, :]


def _empty_cache(model: Any) -> dict[str, Any]:
    """A cache to be filled, under the name that the installed transformers gives it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: transformers.DynamicCache(config=model.config)}


CALLS: dict[str, tuple[str, Callable[[Any, Batch], dict[str, Any]]]] = {
    "one row": ("one_row", lambda _, batch: {name: each[:1] for name, each in batch.items()}),
    "a cache asked for": ("generation", lambda _, batch: {**batch, "use_cache": True}),
    "a cache by default": ("use_cache", lambda _, batch: {**batch, "use_cache": None}),
    "a cache handed over": ("generation", lambda model, batch: {**batch, **_empty_cache(model)}),
    "positions that are no whole numbers": (
        "position_ids",
        lambda _, batch: {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None] + 0.5},
    ),
    "embeddings": ("inputs_embeds", _with_embeddings),
    "attention weights": ("output_attentions", lambda _, batch: {**batch, "output_attentions": True}),
    "a dense mask": ("attention_mask", lambda _, batch: {**batch, "attention_mask": _dense_mask(batch)}),
    "a gap": ("gaps", lambda _, batch: _with_gap(batch)),
    "an unknown tensor": ("other_inputs", lambda _, batch: {**batch, "cu_seq_lens_q": torch.zeros(1)}),
    "nothing to share": ("little_gain", lambda _, batch: {name: each[3:5, :12] for name, each in batch.items()}),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CALLS)
def test_what_cannot_be_shared_runs_as_before(case: str, attention: str) -> None:
    """Bit for bit, in the model's own attention, and counted by its reason."""
    model, batch = build_model("llama"), padded_batch()
    model.set_attn_implementation(attention)
    reason, make = CALLS[case]
    assert reason in REASONS
    if case == "attention weights" and attention == "sdpa":
        pytest.skip("transformers has no attention weights with sdpa")
    with torch.no_grad():
        inputs = {"use_cache": False, **make(model, batch)}
        want = model(**copy.deepcopy(inputs))  # a cache is filled in place
        sharing = flexdpo.share_prefixes(model, min_gain=1.3, min_prefix=1)
        got = model(**inputs)
    assert sharing.stats.passed_through == {reason: 1}
    assert sharing.stats.batches_shared == 0
    tokens = 0 if reason == "generation" else want.logits.shape[:2].numel()
    assert sharing.stats.tokens_run == sharing.stats.tokens_in == tokens
    assert torch.equal(got.logits, want.logits)
    assert _returned_cache(got) == _returned_cache(want)
    assert (got.attentions is None) == (want.attentions is None)
    for mine, theirs in zip(got.attentions or (), want.attentions or (), strict=True):
        assert torch.equal(mine, theirs)


def test_a_margin_that_the_model_reads_is_not_shared() -> None:
    from transformers import LlamaModel

    class Reader(LlamaModel):
        def forward(self, position_ids: Any = None, margin: Any = None, **kwargs: Any) -> Any:
            output = super().forward(position_ids=position_ids, **kwargs)
            output.last_hidden_state = output.last_hidden_state + (0 if margin is None else margin[:, None, None])
            return output

    batch = padded_batch()
    torch.manual_seed(0)
    model, margin = Reader(build_model("llama").config).eval(), torch.arange(float(batch["input_ids"].shape[0]))
    want = model(**batch, margin=margin, use_cache=False)[0]
    sharing = flexdpo.share_prefixes(model, **ALL)
    assert torch.equal(model(**batch, margin=margin, use_cache=False)[0], want)
    assert sharing.stats.passed_through == {"other_inputs": 1}


def test_stats_say_why() -> None:
    model, batch = build_model("llama"), padded_batch()
    sharing = flexdpo.share_prefixes(model, **ALL)
    model(**batch, use_cache=False)
    model(**batch, use_cache=True)
    assert str(sharing.stats).splitlines() == [
        "77 of 216 tokens run (64% saved), 1 batches shared",
        "1 passed through: the call makes or reads a key-value cache, as those of generate() do",
    ]


def test_five_batches_in_a_row_are_no_accident(recwarn: pytest.WarningsRecorder) -> None:
    """One warning that names the reason; a batch that is shared, or generation, in between says otherwise."""
    model, batch = build_model("llama").train(), padded_batch()
    lone = {name: each[:1] for name, each in batch.items()}
    flexdpo.share_prefixes(model, **ALL)
    for _ in range(4):
        model(**lone)
    model(**batch)
    for _ in range(4):
        model(**lone)
        model(**lone, use_cache=True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="5 batches in a row ran through LlamaModel without sharing.* has one row"):
        model(**lone)
    for _ in range(9):
        model(**lone)
    assert len(recwarn.list) == 0


def test_training_mode_needs_no_word_about_the_cache() -> None:
    model, batch = build_model("llama").train(), padded_batch()
    sharing = flexdpo.share_prefixes(model, **ALL)
    output = model(**batch)
    assert not _returned_cache(output)
    assert sharing.stats.batches_shared == 1


def test_positions_that_depend_on_the_padded_length() -> None:
    """Frequencies that follow the longest position, and stay there, are the padded run's own; short batches share."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    plain, model = (build_model("llama", rope_parameters=rope, max_position_embeddings=24) for _ in range(2))
    fits = padded_batch()
    longer = Batch({name: torch.nn.functional.pad(each, (0, 5)) for name, each in fits.items()})
    sharing = flexdpo.share_prefixes(model, **ALL)
    with Float64():
        wants, gots = ([run(each, batch) for batch in (fits, longer)] for each in (plain, model))
    assert logit_error(wants[1], wants[0]) > 1e-3
    for got, want in zip(gots, wants, strict=True):
        assert_identical(got, want)
    assert sharing.stats.passed_through == {"rope_scaling": 2}


@pytest.mark.parametrize("longest", [0, 5])
def test_one_set_of_frequencies_for_long_batches(longest: int) -> None:
    """The padded length chooses the set, even where every row is shorter than the limit."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 0}
    fits = padded_batch()
    batch = Batch({name: torch.nn.functional.pad(each, (0, longest)) for name, each in fits.items()})
    rope["original_max_position_embeddings"] = fits["input_ids"].shape[1]
    half = build_model("llama").model.rotary_emb.inv_freq.numel()
    rope |= {"short_factor": [1.0] * half, "long_factor": [3.0] * half}
    plain, model = (build_model("llama", rope_parameters=rope, max_position_embeddings=512) for _ in range(2))
    sharing = flexdpo.share_prefixes(model, **ALL)
    with Float64():
        assert_same(run(model, batch), run(plain, batch))
    assert sharing.stats.batches_shared == 1


def _dropout_module(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.1), mlp.down_proj)


def _attention_dropout(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1


def _lora_dropout(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05)).train()


def _embedding_noise(model: Any) -> None:
    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.rand_like(output) if module.training else output

    model.get_input_embeddings().register_forward_hook(add)


@pytest.mark.parametrize("switch_on", [_dropout_module, _attention_dropout, _lora_dropout, _embedding_noise])
def test_dropout_in_training_keeps_batches_from_being_shared(switch_on: Callable[[Any], None]) -> None:
    model, batch = build_model("llama").train(), padded_batch()
    sharing = flexdpo.share_prefixes(model, **ALL)
    model(**batch)
    assert sharing.stats.batches_shared == 1
    switch_on(model)
    with pytest.warns(UserWarning, match="LlamaModel uses dropout or noise in training, so its batches run without"):
        model(**batch)
    assert sharing.stats.passed_through == {"random": 1}
    # once is enough, and evaluation drops nothing
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
        model.eval()
        model(**batch, use_cache=False)
    assert sharing.stats.batches_shared == 2


def test_rounds_of_experts_with_noise_are_not_shared() -> None:
    model, batch = build_model("mixtral", router_jitter_noise=0.1).train(), padded_batch()
    sharing = flexdpo.share_prefixes(model, **ALL)
    with pytest.warns(UserWarning, match="dropout or noise"):
        model(**batch)
    assert sharing.stats.passed_through == {"random": 1}


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "llama4"])
def test_generation_between_shared_forwards(name: str) -> None:
    model, batch = build_model(name), padded_batch("left")

    def generate() -> Any:
        return model.generate(
            **batch, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip

    training = padded_batch("right")
    with Float64():
        wanted, want = generate(), run(model, training)
        sharing = flexdpo.share_prefixes(model, **ALL)
        before, first, between = generate(), run(model, training), generate()
    assert_same(first, want)
    for got in (before, between):
        assert torch.equal(got.sequences, wanted.sequences)
        assert torch.equal(torch.stack(got.scores), torch.stack(wanted.scores))
    assert sharing.stats.batches_shared == 1
    assert sharing.stats.passed_through.keys() == {"generation"}


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, batch = build_model("llama"), padded_batch()
    want = run(model, batch)
    flexdpo.share_prefixes(model, **ALL)
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch, use_cache=False)
    handle.remove()
    assert_same(run(model, batch), want, 1e-6)
    with torch.no_grad():
        lone = Batch({name: each[:1] for name, each in batch.items()})
        assert model(**lone, use_cache=False).logits.shape[0] == 1


# --- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "mixtral"])
def test_unshare_restores_the_model(name: str, attention: str) -> None:
    model, batch = build_model(name, dtype=torch.float32), padded_batch()
    model.set_attn_implementation(attention)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [m.__dict__.keys() for m in model.modules()]
    want = run(model, batch)
    with flexdpo.share_prefixes(model, **ALL) as sharing:
        run(model, batch)
        assert sharing.stats.batches_shared == 1
    assert model.config._attn_implementation == attention
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [m.__dict__.keys() for m in model.modules()] == attributes
    assert_identical(run(model, batch), want)
    with pytest.raises(FlexdpoError, match=r"shares no prefixes; call flexdpo\.share_prefixes"):
        flexdpo.unshare(model)
    with pytest.raises(FlexdpoError, match=r"shares no prefixes; call flexdpo\.share_prefixes"):
        flexdpo.sharing_stats(model)


def test_nothing_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batch = build_model("mistral", dtype=torch.float32), padded_batch()
    want = run(model, batch)
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    flexdpo.share_prefixes(model, **ALL)
    run(model, batch)
    model.save_pretrained(tmp_path / "shared")
    assert list(model.state_dict()) == names
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == files
    for name in files:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    assert loaded.config._attn_implementation == "sdpa"
    assert_identical(run(loaded, batch), want)


def test_a_second_time() -> None:
    model = build_model("llama")
    flexdpo.share_prefixes(model)
    with pytest.raises(FlexdpoError, match=r"this LlamaForCausalLM shares prefixes already; call flexdpo\.unshare"):
        flexdpo.share_prefixes(model)


@pytest.mark.parametrize(
    ("name", "cause"), [("bloom", "interface"), ("xlstm", "row order"), ("roberta", "padding_idx")]
)
def test_an_unsupported_model(name: str, cause: str) -> None:
    model = build_or_skip(name)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=cause):
        flexdpo.share_prefixes(model)
    assert model.config._attn_implementation == before


def test_what_is_no_model() -> None:
    with pytest.raises(
        FlexdpoError, match="expected a transformers PreTrainedModel or a PeftModel around one, got Lin"
    ):
        flexdpo.share_prefixes(torch.nn.Linear(2, 2))


def test_a_compiled_model() -> None:
    compiled = torch.compile(build_model("llama"))
    with pytest.raises(FlexdpoError, match=r"this LlamaForCausalLM is compiled already; call flexdpo\.share_prefixes"):
        flexdpo.share_prefixes(compiled)
    in_place = build_model("llama")
    in_place.compile()
    with pytest.raises(FlexdpoError, match=r"this LlamaForCausalLM is compiled already; call flexdpo\.share_prefixes"):
        flexdpo.share_prefixes(in_place)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("wrap", "wrapper"),
    [
        (torch.nn.parallel.DistributedDataParallel, "DistributedDataParallel"),
        (torch.nn.DataParallel, "DataParallel"),
        (_fsdp2, r"FSDP2 \(fully_shard\)"),
    ],
)
def test_a_wrapped_model(wrap: Callable[[Any], Any], wrapper: str, one_process: None) -> None:
    with pytest.raises(FlexdpoError, match=f"the model is wrapped by {wrapper} already; call flexdpo.share_prefixes"):
        flexdpo.share_prefixes(wrap(build_model("llama")))


def test_stats_and_unshare_reach_through_wrappers(one_process: None) -> None:
    model, batch = build_model("llama"), padded_batch()
    flexdpo.share_prefixes(model, **ALL)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(**batch, use_cache=False).logits.sum().backward()
    assert flexdpo.sharing_stats(wrapped).batches_shared == 1
    flexdpo.unshare(wrapped)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"min_gain": 0.5}, "min_gain must be at least 1, got 0.5"),
        *(({"min_gain": value}, "min_gain must be at least 1, got") for value in (float("nan"), "x", None, True)),
        ({"min_prefix": 0}, "min_prefix must be at least 1 token, got 0"),
        *(({"min_prefix": value}, "min_prefix must be at least 1 token, got") for value in (2.5, "x", None, True)),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_arguments_out_of_range(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        flexdpo.share_prefixes(build_model("llama"), **argument)


def test_an_attention_that_has_no_mask() -> None:
    from transformers import AttentionInterface

    model = build_model("llama")
    AttentionInterface.register("attention_without_a_mask", lambda *args, **kwargs: None)
    model.config._attn_implementation = "attention_without_a_mask"
    with pytest.raises(FlexdpoError, match="'attention_without_a_mask' has no attention or no mask function"):
        flexdpo.share_prefixes(model)


def test_the_threshold_on_the_gain() -> None:
    model, batch = build_model("llama"), padded_batch()
    gain = batch["input_ids"].numel() / 77
    for min_gain, shared in ((gain + 1e-6, 0), (gain, 1)):
        with flexdpo.share_prefixes(model, min_gain=min_gain, min_prefix=1) as sharing:
            model(**batch, use_cache=False)
            assert sharing.stats.batches_shared == shared
            assert sharing.stats.saved == pytest.approx(shared * (1 - 1 / gain))


def test_kernels_for_any_length_while_a_shared_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch has another number of tokens, and a kernel for each would take minutes to compile."""
    model, seen = build_model("llama"), []
    flexdpo.share_prefixes(model, impl="flex", **ALL)
    settings = hooks.kernel_settings()

    def look_and_stop(module: Any, args: Any) -> None:
        if not being_asked():
            seen.append((args[0].shape[1], hooks.kernel_settings().lengths))
            raise ZeroDivisionError

    model.model.layers[0].register_forward_pre_hook(look_and_stop)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(**padded_batch(), use_cache=False)
        assert hooks.kernel_settings() is settings
    assert seen == [(128, "dynamic")] * 2


# --- K completions ---------------------------------------------------------------------------------------------------


def completions(prompts: int, completions_each: int, prompt: int, completion: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(8, VOCABULARY, count))

    rows = []
    for _ in range(prompts):
        beginning = tokens(prompt)
        rows += [torch.cat([beginning, tokens(completion)]) for _ in range(completions_each)]
    return pad(rows, "right")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eight_completions_of_prompts_four_times_as_long(name: str) -> None:
    model, batch = build_model(name), completions(2, 8, prompt=48, completion=12)
    with Float64():
        want = run(model, batch)
        sharing = flexdpo.share_prefixes(model)
        assert_same(run(model, batch), want)
    assert sharing.stats.tokens_in >= 3 * sharing.stats.tokens_run


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """No further from float64 than the padded run, and no kernel for every number of tokens."""
    from flexdpo.attention.flex import _kernels
    from tests.conftest import build_model as build_with_heads_of_16

    batches = [completions(2, 4, prompt=100 + 9 * number, completion=40, seed=number) for number in range(6)]
    truth = run(build_with_heads_of_16("mistral"), batches[0])
    model = build_with_heads_of_16("mistral", "sdpa").to("cuda", torch.bfloat16)
    on_device = [Batch({name: each.cuda() for name, each in batch.items()}) for batch in batches]

    def moved(found: Run) -> Run:
        gradients = {name: each.double().cpu() for name, each in found.gradients.items()}
        return Run([each.double().cpu() for each in found.logits], gradients)

    plain = moved(run(model, on_device[0]))
    sharing = flexdpo.share_prefixes(model, **ALL)
    got = moved(run(model, on_device[0]))
    assert logit_error(got, truth) < 1.25 * logit_error(plain, truth) + 1e-2
    assert gradient_error(got, truth) < 1.25 * gradient_error(plain, truth) + 1e-2
    kernels = len(_kernels)
    for batch in on_device[1:]:
        run(model, batch)
    assert len(_kernels) == kernels
    assert sharing.stats.batches_shared == len(batches)


@needs_states
def test_a_state_that_padding_advances() -> None:
    """RecurrentGemma multiplies nothing by its mask: what stands in the padding on the left moves its results."""
    model, batch = build_or_skip("recurrent_gemma", dtype=torch.float32), padded_batch("left")
    want = run(model, batch)
    sharing = flexdpo.share_prefixes(model, **ALL)
    assert_identical(run(model, batch), want)
    assert sharing.stats.passed_through == {"left_padding": 1}


# --- every architecture ----------------------------------------------------------------------------------------------

EXACT = [name for name, architecture in zoo().items() if architecture.exact]


@pytest.mark.zoo
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EXACT)
def test_every_exact_architecture(name: str, side: str) -> None:
    model, batch = build_or_skip(name), padded_batch(side)
    with Float64():
        want = run(model, batch)
        sharing = flexdpo.share_prefixes(model, **ALL)
        if name == "doge" and side == "right":
            with pytest.raises(UnsupportedModelError, match="a mask that is not the packed row's own"):
                run(model, batch)
            return
        got = run(model, batch)
    assert_same(got, want, 1e-7)
    reasons = {"moss_transcribe_diarize": "inputs_embeds"}  # its head makes the embeddings
    with Float64():
        positions = Positions.of(backbone_of(model)).asked(backbone_of(model), of_sequences=False)
    if side == "left" and not positions.relative and positions.behind_padding == "unknown":
        reasons.setdefault(name, "left_padding")
    assert sharing.stats.batches_shared == (name not in reasons)
    assert sharing.stats.passed_through == ({reasons[name]: 1} if name in reasons else {})
    with Float64(), sharing:
        pass
    with Float64():
        assert_identical(run(model, batch), want)


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXACT)
def test_positions_said_to_be_relative_are(name: str) -> None:
    """Far beyond the scales at which models begin to look at absolute positions."""
    model = build_or_skip(name)
    if not Positions.of(backbone_of(model)).relative:
        pytest.skip("its positions are absolute, or not known to be relative")
    ids = padded_batch()["input_ids"][:1]
    position_ids = torch.arange(ids.shape[1])[None]
    with Float64(), torch.no_grad():
        want, got = (
            model(input_ids=ids, position_ids=position_ids + shift, use_cache=False).logits for shift in (0, 40_000)
        )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * float(want.abs().max()))


def test_reasons_are_counted_over_models_and_between_logs() -> None:
    one = hooks.SharingStats(8, 4, 1, passed_through=Counter(generation=3, gaps=1))
    both = one + hooks.SharingStats(2, 2, 0, passed_through=Counter(generation=2))
    assert both == hooks.SharingStats(10, 6, 1, passed_through=Counter(generation=5, gaps=1))
    assert (both - one).passed_through["generation"] == 2
