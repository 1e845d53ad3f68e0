"""Models with convolutions and scans: packed rows give the ordinary result, and every way to get it wrong shows."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flexdpo import Group, Row, UnsupportedModelError, disable_dropout, parity_probe, prepare_model
from flexdpo.hf import mixers, unfolding
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.hf.mixer_kernels import mixer_class, mixers_of
from flexdpo.hf.unwrap import backbone_of
from flexdpo.layout.row import RowLayout, stack_inputs
from flexdpo.layout.scan_plan import ScanCost, scan_plan
from flexdpo.layout.segments import Segments
from flexdpo.mixing import gather, kernels, tree_conv, tree_scan
from tests.hf.architectures import build_or_skip, draw_weights, needs_states, zoo
from tests.hf.equivalence import (
    Float64,
    Run,
    example_row,
    gradient_error,
    logit_error,
    packed_run,
    sequence_paths,
    unpacked_run,
)

pytestmark = needs_states

TOLERANCE = 1e-9
# a short convolution, a delta rule, Mamba 2 beside attention, Mamba 1; and what is run whole
SPREAD = ["lfm2", "qwen3_5_text", "falcon_h1", "jamba"]
WHOLE = ["minimax", "recurrent_gemma"]
# whose scans, if any, have no chunks, or so short ones that every row is longer than four
SHORT = {"lfm2", "lfm2_moe", "lfm3", "zaya", "recurrent_gemma", "minimax", "mamba", "falcon_mamba", "jamba"}
# of a prompt: states are handed on, and some runs padded; with shorter ones a scan runs what comes after them at once
LONG = 126
_CAUSES = ("hybrid: linear/SSM/conv token mixing", "recurrent/SSM token mixing")
EVERY = sorted(name for name, each in zoo().items() if each.exact and each.cause in _CAUSES)


def every(*default: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in default else pytest.mark.zoo) for name in EVERY]


def deep_row(prompt: int = 20, seed: int = 5, others: int = 20) -> Row:
    """Tries of three levels, one-token segments, a sequence that ends inside others, and padding.

    Prompts of many lengths, some of which a scan puts in one batch.
    """
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return generator.integers(8, 120, count).tolist()

    stem, twig = tokens(5), tokens(4)
    groups = [
        Group.from_lists(
            tokens(prompt),
            [[*stem, *twig, *tokens(prompt // 3)], [*stem, *twig, 9], stem, [*stem, *tokens(7)], [10], tokens(9)],
            [(0, 1)],
        ),
        Group.from_lists([11], [[12, 12, 13], [12, 14], [15]], [(0, 1)]),
        *(
            Group.from_lists(tokens(length), [[16, 17, 19, 20, 21], [18, 19, 20, 21]], [(0, 1)])
            for length in (*(part * others // 20 for part in (2, 4, 7, 8, 10)), others // 2 - 2)
        ),
    ]
    return Row.from_groups(groups, pad_to_multiple_of=16)


def built(name: str, **kwargs: Any) -> Any:
    """A tiny model of two layers of different kinds, without dropout, in train mode as in training."""
    model = build_or_skip(name, **kwargs)
    with Float64() if model.dtype == torch.float64 else contextlib.nullcontext():
        disable_dropout(model)
    return model.train()


def runs(name: str, row: Row, **kwargs: Any) -> tuple[Run, Run]:
    model = built(name, **kwargs)
    with Float64():
        want = unpacked_run(model, row)
        return packed_run(prepare_model(model), row), want


@functools.cache
def unpacked_once(name: str, **kwargs: Any) -> Run:
    """The unpacked run, which no seeded bug changes."""
    with Float64():
        return unpacked_run(built(name, **kwargs), deep_row(LONG, others=LONG))


def assert_same(got: Run, want: Run, tolerance: float = TOLERANCE) -> None:
    assert logit_error(got, want) < tolerance
    assert gradient_error(got, want) < tolerance


def test_how_many_there_are() -> None:
    assert set(EVERY) >= set(SPREAD)
    assert len(EVERY) >= 29


@pytest.mark.parametrize("name", every(*SPREAD, *WHOLE))
def test_deep_tries(name: str) -> None:
    assert_same(*runs(name, deep_row()))


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in EVERY if n not in SHORT and not n.startswith(("inkling", "qwen4"))])
def test_longer_than_four_chunks_of_the_scan(name: str) -> None:
    """And as they are, where norms and scans compute in float32: they lose what the stock model loses by itself."""
    got, exact = runs(name, deep_row(270))
    assert_same(got, exact)
    model = built(name)
    stock = unpacked_run(model, deep_row(270))
    lost = max(logit_error(stock, exact), gradient_error(stock, exact))
    assert lost < 2e-4
    assert_same(packed_run(prepare_model(model), deep_row(270)), exact, max(1e-4, 2 * lost))


@pytest.mark.parametrize("name", every("lfm2", "granitemoehybrid", "zamba2", "recurrent_gemma"))
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    """The layers run again in the backward pass, after the row's forward and in the middle of another's."""
    # whose routers compute in float32 and cannot take float64
    narrow = name.startswith("inkling2")
    dtype, tolerance = (torch.float32, 1e-5) if narrow else (torch.float64, TOLERANCE)
    model, row = prepare_model(built(name, dtype=dtype)), deep_row()
    want = packed_run(model, row)
    enable_checkpointing(model, use_reentrant=reentrant)
    other = model(**deep_row(seed=6).inputs()).logits
    assert_same(packed_run(model, row), want, tolerance)
    other.sum().backward()


@pytest.mark.parametrize("name", every("lfm2", "qwen3_5_text", "falcon_h1", "jamba"))
def test_several_rows_in_a_batch(name: str) -> None:
    model, rows = built(name), [deep_row(), example_row()]
    with Float64(), torch.no_grad():
        wants = [
            model(input_ids=torch.from_numpy(sequence)[None], use_cache=False).logits[0]
            for row in rows
            for group in row.groups
            for sequence in group.sequences
        ]
        logits = prepare_model(model)(**stack_inputs(rows)).logits
    gots = [logits[number, path] for number, row in enumerate(rows) for path in sequence_paths(row)]
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))


@pytest.mark.parametrize("name", SPREAD)
def test_every_distinct_token_runs_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in projections and in scans with chunks of one token; with longer ones, so many as the plan says.

    A scan that takes no state runs the path to each leaf.
    """
    row, model = deep_row(), prepare_model(built(name))
    places: list[int] = []
    scan = tree_scan.tree_scan

    def counting(run: Any, inputs: Any, plan: tree_scan.TreePlan) -> Any:
        def counted(batch: Any, *rest: Any) -> Any:
            places.append(int(next(iter(batch.values())).abs().flatten(2).sum(-1).ne(0).sum()))
            return run(batch, *rest)

        return scan(counted, inputs, plan)

    monkeypatch.setattr(kernels, "tree_scan", counting)
    projected = []
    for mixer in mixers_of(backbone_of(model)).values():
        projection = next(m for m in mixer.modules() if isinstance(m, torch.nn.Linear))
        projection.register_forward_hook(lambda module, args, output: projected.append(args[0].shape[:2].numel()))
    model(**row.inputs())
    assert set(projected) == {row.layout.length}
    shared = [kernels.SCANS[each] for each in mixer_class(type(mixer)).names & set(kernels.SCANS)]  # type: ignore[union-attr]
    if {each.way for each in shared} == {"shared"}:
        plan = scan_plan(Segments.of(row.layout), shared[0].costs)
        assert sum(places) == len(projected) * plan.tokens
        # less than a chunk for each segment more, and no more chunks than one by one
        assert row.num_tokens <= plan.tokens < row.num_tokens + plan.chunk * len(Segments.of(row.layout))
        layers = len(projected)
        places.clear()
        monkeypatch.setattr(kernels, "SCANS", {
            key: replace(each, costs=(ScanCost(1),)) for key, each in kernels.SCANS.items()})  # fmt: skip
        model(**deep_row().inputs())
        assert sum(places) == layers * row.num_tokens


@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_without_a_row_nothing_changes(name: str) -> None:
    model, ids = built(name).eval(), torch.randint(8, 100, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model(input_ids=ids, attention_mask=mask).logits
    said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    prepare_model(model)(**deep_row().inputs())
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, want, rtol=0, atol=0)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), said)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lfm2", r".*\.conv\.(in_proj|conv|out_proj)"),
        ("qwen3_5_text", r".*\.linear_attn\.(in_proj_qkv|conv1d|out_proj)"),
        # PEFT refuses the convolution and the output of Mamba
        ("falcon_h1", r".*\.mamba\.in_proj"),
        ("minimax", r".*\.self_attn\.(qkv_proj|out_proj)"),
    ],
)
def test_adapters_on_projections_and_on_the_convolution(name: str, parts: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=parts, r=128, lora_dropout=0.0, init_lora_weights=False)
    model, row = peft.get_peft_model(built(name), config).double(), deep_row()
    with Float64():
        want = unpacked_run(model, row)
        assert_same(packed_run(prepare_model(model), row), want)
    assert any("lora" in key for key in want.gradients)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_text_through_a_model_that_sees_images_too(name: str) -> None:
    import transformers

    text, sizes = zoo()[name].config, {"intermediate_size": 32, "hidden_size": 32, "patch_size": 4}
    if name == "lfm2":
        vision = {**sizes, "model_type": "siglip2_vision_model", "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = transformers.Lfm2VlConfig(text_config=text, vision_config=vision, image_token_id=127)
        model = transformers.Lfm2VlForConditionalGeneration._from_config(whole, dtype=torch.float64)
    else:
        vision = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
        whole = transformers.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=127)
        model = transformers.Qwen3_5ForConditionalGeneration._from_config(whole, dtype=torch.float64)
    draw_weights(model)
    with Float64():
        want = unpacked_run(model, deep_row())
        assert_same(packed_run(prepare_model(model), deep_row()), want)


def test_a_module_keeps_no_state_of_a_path() -> None:
    """RecurrentGemma's blocks hold theirs as attributes; with its graph it could not even be copied."""
    model = prepare_model(built("recurrent_gemma", dtype=torch.float32))
    model(**deep_row().inputs())
    copy.deepcopy(model)


# --- seeded bugs -----------------------------------------------------------------------------------------------------


def zero_child_state(patch: pytest.MonkeyPatch) -> None:
    scan = tree_scan.tree_scan
    patch.setattr(
        kernels, "tree_scan", lambda run, inputs, layout: scan(
            lambda batch, begin, final: run(batch, None if begin is None else begin * 0, final), inputs, layout)
    )  # fmt: skip


def wrong_parent(patch: pytest.MonkeyPatch) -> None:
    scan = tree_scan.tree_scan
    patch.setattr(
        kernels, "tree_scan", lambda run, inputs, layout: scan(
            lambda batch, begin, final: run(batch, None if begin is None else begin.roll(1, 0), final), inputs, layout)
    )  # fmt: skip


def convolution_in_row_order(patch: pytest.MonkeyPatch) -> None:
    def before(layout: RowLayout, count: int) -> torch.Tensor:
        places = torch.arange(layout.position_ids.numel())
        found = torch.stack([places - lag for lag in range(1, count + 1)])
        return torch.where(found < 0, len(places), found)

    patch.setattr(tree_conv, "_ancestors", before)


def padding_advances_the_state(patch: pytest.MonkeyPatch) -> None:
    """The last token stands for padding."""
    taken = gather._taken

    def advancing(values: torch.Tensor, take: Any) -> torch.Tensor:
        return taken(values, take).index_copy(0, take.empty, values[5:6].expand(len(take.empty), *values.shape[1:]))

    patch.setattr(gather, "_taken", advancing)


def lower_limit_on_padding(patch: pytest.MonkeyPatch) -> None:
    scan = kernels.SCANS["mamba_chunk_scan_combined"]
    changed = type(scan)(**{**vars(scan), "neutral": dict})
    patch.setitem(kernels.SCANS, "mamba_chunk_scan_combined", changed)


def row_in_place_of_the_paths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        mixers, "run_unfolded", lambda run, args, kwargs, layout, **_: run(*args, **{**kwargs, "attention_mask": None})
    )  # fmt: skip


def neighbours_on_the_paths(patch: pytest.MonkeyPatch) -> None:
    folded = unfolding.in_row_order
    patch.setattr(unfolding, "in_row_order", lambda parts, layout: folded([each.roll(1, 0) for each in parts], layout))


BUGS = [
    ("minimax", row_in_place_of_the_paths),
    ("minimax", neighbours_on_the_paths),
    ("qwen3_5_text", zero_child_state),
    ("granitemoehybrid", zero_child_state),
    ("qwen3_5_text", wrong_parent),
    ("lfm2", convolution_in_row_order),
    ("qwen3_5_text", convolution_in_row_order),
    ("qwen3_5_text", padding_advances_the_state),
    ("granitemoehybrid", padding_advances_the_state),
    ("nemotron_h", lower_limit_on_padding),
]


@pytest.mark.parametrize(("name", "bug"), BUGS)
def test_a_seeded_bug_shows(name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the comparison, and in the probe of a model in float32 as people have it."""
    bug(monkeypatch)
    # a lower limit, by which a step is made of nothing
    limits: Any = {"time_step_limit": (0.5, 4.0)} if bug is lower_limit_on_padding else {}
    want = unpacked_once(name, **limits)
    with Float64():
        got = packed_run(prepare_model(built(name, **limits)), deep_row(LONG, others=LONG))
    assert logit_error(got, want) > 1e-6
    assert gradient_error(got, want) > 1e-6
    assert parity_probe(built(name, dtype=torch.float32, **limits)).verdict == "wrong"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_loses_the_row(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a layer that is run again does not tell the row: an error, not a wrong gradient."""
    model = prepare_model(built("lfm2", dtype=torch.float32))
    enable_checkpointing(model, use_reentrant=reentrant)
    embedded = model.get_input_embeddings()(deep_row().input_ids).detach().requires_grad_()
    inputs = {**deep_row().inputs(), "input_ids": None, "inputs_embeds": embedded}
    loss = model(**inputs).logits.sum()
    found = mixers.layout_of_mask
    monkeypatch.setattr(
        mixers, "layout_of_mask", lambda mask: found(mask) if torch._C._current_graph_task_id() == -1 else None
    )
    with pytest.raises(UnsupportedModelError, match="runs again for a checkpoint with a copy of a packed row's mask"):
        loss.backward()
    if not reentrant:  # which cannot give the gradients that the probe asks for
        report = parity_probe(model)
        assert report.verdict == "refused"
        assert "a copy of a packed row's mask" in report.reason


def test_multiplicities_are_not_the_mask_of_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router's loss weighs by how often a token is repeated; layers that multiply by their mask must not."""
    row = deep_row()
    model = built("granitemoehybrid")
    with Float64():
        want = unpacked_run(model, row)
        prepare_model(model)
        assert_same(packed_run(model, row, output_router_logits=True), want)
    monkeypatch.setattr(mixers, "mask_of_row", lambda layout: layout.multiplicity)
    with pytest.raises(UnsupportedModelError, match="was not given the mask of the packed row"):
        model(**row.inputs(), output_router_logits=True)
    report = parity_probe(model)
    assert report.verdict == "refused"
    assert "was not given the mask of the packed row" in report.reason


def test_a_fused_kernel_in_place_of_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As use_kernels=True may put it there, for one call of a kernel and for a layer as a whole."""
    from transformers.models.lfm2 import modeling_lfm2

    model = prepare_model(built("lfm2"))
    with monkeypatch.context() as patch:
        patch.setattr(modeling_lfm2, "causal_conv1d_fn", modeling_lfm2.causal_conv1d_fn.__wrapped__)
        with pytest.raises(UnsupportedModelError, match="ran a packed row past causal_conv1d_fn"):
            model(**deep_row().inputs())
    layer = next(iter(mixers_of(backbone_of(model)).values()))
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"1 of the 2 layers .* that carry a state ran along the trie"):
        model(**deep_row().inputs())
    report = parity_probe(model)
    assert report.verdict == "refused"
    assert "that carry a state ran along the trie" in report.reason


def test_an_interrupted_mixer_leaves_nothing_behind() -> None:
    """Ctrl-C in the middle of a row; a plain run of the same size of another model must not inherit it."""
    model, other, row = prepare_model(built("lfm2")), built("lfm2"), deep_row()
    with torch.no_grad():
        want = other(input_ids=row.input_ids, use_cache=False).logits
        layer = next(iter(mixers_of(backbone_of(model)).values()))

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = layer.out_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**row.inputs())
        hook.remove()
        torch.testing.assert_close(other(input_ids=row.input_ids, use_cache=False).logits, want)
        torch.testing.assert_close(model(input_ids=row.input_ids, use_cache=False).logits, want)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("xlstm", "it carries a recurrent state"),
        ("deepseek_v32", "layers of type indexed_attention choose keys"),
    ],
)
def test_what_is_no_known_kernel_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        prepare_model(build_or_skip(name))
