"""Several threads at once: packed rows, plain batches, shared batches and generation, on one model and on several."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import flexdpo
from flexdpo import Group, Row
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.attention.settings import KernelSettings, kernel_settings, kernel_settings_as
from flexdpo.dropin import hooks
from flexdpo.hf import forward_layout
from flexdpo.hf.checkpointing import enable_checkpointing
from tests.conftest import strengthen

Job = Callable[[], Any]
THREADS = 4


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Python goes from thread to thread far more often than it would by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def small(seed: int, layers: int = 1) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=41,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return strengthen(LlamaForCausalLM(config), seed).eval()


def row(seed: int) -> Row:
    """Two prompts with responses that begin alike; what one sees of the other shows in the logits."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 41) for _ in range(count)]

    stem = ids(2)
    return Row.from_groups([Group.from_lists(ids(6 + seed), [stem + ids(3), stem + ids(4)]) for _ in range(2)])


def padded(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 41, (4, 14 + seed), generator=draw)
    ids[:, :9] = ids[0, :9]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def jobs(layers: int = 1) -> dict[str, Job]:
    """Everything a thread may do, by name; two prepared models and one that shares its prefixes."""
    first, second, shared = (small(seed, layers) for seed in range(3))
    for model in (first, second):
        flexdpo.prepare_model(model)
    flexdpo.share_prefixes(shared, min_prefix=1)
    rows, batches = [row(0), row(1)], [padded(0), padded(1)]

    def gradient(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.enable_grad():
            logits = model(**{**inputs, "use_cache": False}).logits
            return torch.autograd.grad(logits.square().mean(), model.model.embed_tokens.weight)[0]

    def fresh(number: int) -> dict[str, torch.Tensor]:
        return {name: each.clone() for name, each in batches[number].items()}

    return {
        "packed, first": lambda: first(**rows[0].inputs()).logits,
        "packed, second": lambda: second(**rows[1].inputs()).logits,
        "packed, one row on both": lambda: second(**rows[0].inputs()).logits,
        "packed, gradient": lambda: gradient(first, rows[1].inputs()),
        "plain, first": lambda: first(**batches[0], use_cache=False).logits,
        "plain, second": lambda: second(**batches[1], use_cache=False).logits,
        "plain, gradient": lambda: gradient(second, batches[0]),
        "shared": lambda: shared(**batches[0], use_cache=False).logits,
        "shared, another batch": lambda: shared(**fresh(1), use_cache=False).logits,
        "shared, gradient": lambda: gradient(shared, batches[1]),
        "passed through": lambda: shared(**batches[0]).logits,
        "generated": lambda: first.generate(**padded(1), max_new_tokens=2, do_sample=False),
    }


def run_in_threads(work: dict[str, Job], times: int) -> None:
    """Let every thread do ``times`` jobs in an order of its own; each result must be what it is alone."""
    with torch.no_grad():
        want = {name: job() for name, job in work.items()}
    start = threading.Barrier(THREADS)

    def thread(number: int) -> list[str]:
        torch.set_num_threads(1)
        draw, wrong = random.Random(number), []
        start.wait()
        for _ in range(times):
            name = draw.choice(list(want))
            with torch.no_grad():
                got = work[name]()
            if not torch.allclose(got, want[name], rtol=1e-5, atol=1e-5):
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(thread, range(THREADS))) == [[]] * THREADS


def test_four_threads_of_everything() -> None:
    run_in_threads(jobs(), 50)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_four_threads_of_everything_for_longer(layers: int) -> None:
    for _ in range(3):
        run_in_threads(jobs(layers), 400)


def test_what_is_counted_in_four_threads() -> None:
    model, batch = small(0), padded(0)
    flexdpo.share_prefixes(model, min_prefix=1)
    with torch.no_grad():
        model(**batch, use_cache=False)
    alone = flexdpo.sharing_stats(model)

    def thread(_: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                model(**batch, use_cache=False)
                flexdpo.sharing_stats(model)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(thread, range(THREADS)))
    total = flexdpo.sharing_stats(model)
    assert total.batches_shared == THREADS * 20 + 1
    assert total.tokens_in == total.batches_shared * alone.tokens_in
    assert total.tokens_run == total.batches_shared * alone.tokens_run


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole model"])
def test_a_backward_pass_in_another_thread(use_reentrant: bool, whole: bool) -> None:
    """As on CUDA, where a thread of autograd's own runs the backward pass and what a checkpoint runs again."""
    model, batch = small(0, layers=2).train(), row(0)
    flexdpo.prepare_model(model)
    weights = list(model.parameters())

    def loss(*, again: bool) -> torch.Tensor:
        embeddings = model.get_input_embeddings()(batch.input_ids)
        inputs = {**batch.inputs(), "input_ids": None, "inputs_embeds": embeddings}

        def run(embeddings: torch.Tensor) -> torch.Tensor:
            return model(**{**inputs, "inputs_embeds": embeddings}).logits

        logits = checkpoint(run, embeddings, use_reentrant=use_reentrant) if again else run(embeddings)
        return logits.square().mean()

    loss(again=False).backward()
    want = [p.grad.clone() for p in weights]
    model.zero_grad()
    if not whole:
        enable_checkpointing(model, use_reentrant=use_reentrant)
    found = loss(again=whole)
    # in the meantime this thread runs another model without a row, and one with another row
    thread = threading.Thread(target=found.backward)
    other = small(1)
    flexdpo.prepare_model(other)
    thread.start()
    while thread.is_alive():
        with torch.no_grad():
            other(**row(1).inputs())
            other(**padded(0), use_cache=False)
    for got, wanted in zip(weights, want, strict=True):
        torch.testing.assert_close(got.grad, wanted, rtol=1e-5, atol=1e-6)


def test_a_forward_inside_of_another_ones_forward() -> None:
    """A thread that begins while another one holds a row finds nothing held, and leaves nothing behind."""
    model, other, inner = small(0), small(1), []
    for each in (model, other):
        flexdpo.prepare_model(each)
    with torch.no_grad():
        want = model(**row(0).inputs()).logits, other(**padded(0), use_cache=False).logits

    def look(*_: Any) -> None:
        def run() -> None:
            assert forward_layout.packed_forward() is None
            with torch.no_grad():
                inner.append(other(**padded(0), use_cache=False).logits)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert forward_layout.packed_forward().module is model

    model.model.layers[0].register_forward_pre_hook(look)
    with torch.no_grad():
        got = model(**row(0).inputs()).logits
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close(inner[0], want[1])
    assert forward_layout.packed_forward() is None


def test_an_interrupted_thread_leaves_the_others_alone() -> None:
    """Ctrl-C skips the hooks that let go of a row and of a batch; the next call of the model in that thread does."""
    model = small(0)
    flexdpo.share_prefixes(model, min_prefix=1, impl="sdpa")
    with torch.no_grad():
        want = model(**padded(0), use_cache=False).logits
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(**padded(0), use_cache=False)
    handle.remove()
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(model, **padded(0), use_cache=False).result()
        torch.testing.assert_close(elsewhere.logits.detach(), want)
        torch.testing.assert_close(model(**padded(0), use_cache=False).logits, want)
    assert not hooks._in_thread.running


def test_kernel_settings_are_a_threads_own() -> None:
    own = KernelSettings(lengths="dynamic", max_kernels=3)
    with kernel_settings_as(own), ThreadPoolExecutor(1) as pool:
        assert pool.submit(kernel_settings).result() == KernelSettings()
        assert kernel_settings() is own
    assert kernel_settings() == KernelSettings()


def test_what_is_run_again_in_another_thread_has_the_settings_of_the_first_run() -> None:
    layout, own, found = row(0).layout, KernelSettings(lengths="dynamic"), []
    kind = flexdpo.attention.mask_mods.CAUSAL

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            found.append(row_mask_for(layout, kind))
            return gradient

    with kernel_settings_as(own):
        first = row_mask_for(layout, kind)
        value = Again.apply(torch.ones(1, requires_grad=True))
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    assert found == [first]
    assert found[0].settings is own
    assert row_mask_for(layout, kind).settings == KernelSettings()
