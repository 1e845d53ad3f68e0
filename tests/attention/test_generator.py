"""The generator's public names against attention by the formula, and a plain torch model trained on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import flexdpo
from flexdpo import FlexdpoError, Group, Row, RowLayout

PACKED = [list(range(3, 12)), [3, 4, 5], [7], [3, 4, 5, 9, 9, 9]]
SHARED = [Group.from_lists(range(3, 12), [range(20, 25), range(30, 38)]), Group.from_lists([5], [[6, 7], [8]])]
# branches under branches, one sequence that ends inside another, and a document beside them
DEEP = [[3, 4, 5, 6, 7, 7], [3, 4, 5, 6, 8, 9, 9], [3, 4, 5, 1, 2], [3, 4], [9, 9, 9, 9]]
ROWS: dict[str, Callable[[], Row]] = {
    "packed": lambda: Row.from_documents(PACKED),
    "shared": lambda: Row.from_groups(SHARED, pad_to_multiple_of=8),
    "depth two": lambda: Row.from_sequences(DEEP),
    "of lengths": lambda: Row.from_lengths([7, (40, [(3, [5, 60]), (1, [2, 2]), 9]), 1], pad_to_multiple_of=16),
}
HEADS, KEY_HEADS = 4, 2
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64)


def even_distance(batch: Any, head: Any, q: Any, kv: Any) -> Tensor:
    return (q - kv) % 2 == 0


def by_head(batch: Any, head: Any, q: Any, kv: Any) -> Tensor:
    return q - kv <= head


def itself_hidden(batch: Any, head: Any, q: Any, kv: Any) -> Tensor:
    return q - kv >= 2


MASKS: dict[str, dict[str, Any]] = {
    "tree": {},
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "own": {"mask_function": even_distance},
    "own by head": {"mask_function": by_head},
    "own that hides all": {"mask_function": itself_hidden},
}


def ancestors(row: Row) -> Tensor:
    """``[S, S]``: each token and those above it, found by walking up from parent to parent."""
    ends, length = row.subtree_end[0].tolist(), row.layout.length
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        key: int | None = query
        while key is not None:
            mask[query, key] = True
            key = max((i for i in range(key) if ends[i] > key), default=None)
    return mask


def wanted_mask(row: Row, options: dict[str, Any]) -> Tensor:
    """``[H, S, S]`` by the definitions, on logical positions."""
    position, mask = row.position_ids[0], ancestors(row)
    q, kv = position[:, None], position[None, :]
    head = torch.arange(HEADS)[:, None, None]
    if "window" in options:
        mask = mask & (q - kv < options["window"])
    if "chunk" in options:
        mask = mask & (q // options["chunk"] == kv // options["chunk"])
    if "mask_function" in options:
        mask = mask & options["mask_function"](0, head, q, kv)
    return mask.expand(HEADS, -1, -1)


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    position: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (position[:, None] - position[None, :])
    weights = scores.exp().masked_fill(~mask, 0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    # a query that sees nothing gets nothing
    return weights / total.masked_fill(total == 0, 1) @ value


def inputs(row: Row, value_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, 8), (KEY_HEADS, 8), (KEY_HEADS, value_dim)]
    return [
        torch.randn(1, h, row.layout.length, d, generator=generator, dtype=torch.float64).requires_grad_()
        for h, d in shapes
    ]


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]()


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_the_definitions(row: Row, mask: str) -> None:
    length = row.layout.length
    want = wanted_mask(row, MASKS[mask])
    got = flexdpo.mask_mod(row, **MASKS[mask])
    torch.testing.assert_close(create_mask(got, 1, HEADS, length, length, device="cpu")[0], want)
    for size in (128, np.int64(16), (8, 32)):
        made = flexdpo.block_mask(row, block_size=size, **MASKS[mask])
        theirs = create_block_mask(made.mask_mod, 1, HEADS, length, length, device="cpu", BLOCK_SIZE=made.BLOCK_SIZE)
        ours, allowed = made.to_dense().bool(), theirs.to_dense().bool()
        assert not (allowed & ~ours).any(), "a tile with something to see is missing"
        torch.testing.assert_close(create_mask(made.mask_mod, 1, HEADS, length, length, device="cpu")[0], want)


@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "alibi", "all"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_every_gradient(row: Row, mask: str, extras: str) -> None:
    softcap = np.int64(2) if extras in ("softcap", "all") else None
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64).requires_grad_() if extras in ("sinks", "all") else None
    slopes = SLOPES.clone().requires_grad_() if extras in ("alibi", "all") else None
    heads = inputs(row, value_dim=5 if extras == "all" else 8)
    leaves = [x for x in (*heads, sinks, slopes) if x is not None]
    score_mod = None if slopes is None else flexdpo.alibi_score_mod(slopes, row)
    got = flexdpo.attend(*heads, row, scale=0.4, softcap=softcap, sinks=sinks, score_mod=score_mod, **MASKS[mask])
    position = row.position_ids[0]
    want = formula(
        *heads, wanted_mask(row, MASKS[mask]), position, scale=0.4, softcap=softcap, slopes=slopes, sinks=sinks
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = (torch.autograd.grad((x * direction).sum(), leaves) for x in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", ["tree", "window", "chunk", "own"])
def test_torch_s_own_flex_attention_takes_them(row: Row, mask: str) -> None:
    heads = [x.detach().float() for x in inputs(row)]
    alibi = flexdpo.alibi_score_mod(SLOPES.float(), row)
    made = flexdpo.block_mask(row, **MASKS[mask])
    # traced below, for every row; what it computes is the same untraced
    with torch.compiler.set_stance("force_eager"):
        theirs = flex_attention(*heads, block_mask=made, score_mod=alibi, scale=0.4, enable_gqa=True)
    want = formula(*heads, wanted_mask(row, MASKS[mask]), row.position_ids[0], scale=0.4, slopes=SLOPES.float())
    torch.testing.assert_close(theirs, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_lines_of_readme(row: Row) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- generator -->\n```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    made = next(line for line in code.splitlines() if line.startswith("row = "))
    for lines in (code, code.replace(made, "")):
        names: dict[str, Any] = {"row": row}
        exec(lines, names)
        position = names["row"].position_ids[0]
        near = ancestors(names["row"]) & (position[:, None] - position[None, :] < 4)
        heads = [x.double() for x in (names["query"], names["key"], names["value"])]
        want = formula(*heads, near, position, scale=64**-0.5, slopes=(0.5 ** torch.arange(1, 9)).double())
        for got in (names["theirs"], names["ours"]):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_score_function_for_one_sequence_is_read_at_logical_positions() -> None:
    row = ROWS["depth two"]()
    table = torch.randn(HEADS, 16, dtype=torch.float64, requires_grad=True)

    def relative(score: Tensor, batch: Any, head: Any, q: Any, kv: Any) -> Tensor:
        return score + table[head, (q - kv).clamp(min=0)]

    heads = inputs(row)
    got = flexdpo.attend(*heads, row, scale=0.4, score_mod=flexdpo.logical_score_mod(row, relative))
    distance = (row.position_ids[0][:, None] - row.position_ids[0][None, :]).clamp(min=0)
    groups = HEADS // KEY_HEADS
    scores = heads[0] @ heads[1].repeat_interleave(groups, 1).transpose(-1, -2) * 0.4 + table[:, distance]
    want = scores.masked_fill(~ancestors(row), -math.inf).softmax(-1) @ heads[2].repeat_interleave(groups, 1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    found, expected = (torch.autograd.grad(x.square().sum(), [*heads, table]) for x in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_score_mod_may_be_anything_where_the_mask_hides(rng: np.random.Generator) -> None:
    row = ROWS["shared"]()

    def logarithm(score: Tensor, batch: Any, head: Any, q: Any, kv: Any) -> Tensor:
        # of what lies ahead it is NaN
        return score - torch.log((q - kv + 1).double())

    heads = inputs(row)
    got = flexdpo.attend(*heads, row, score_mod=flexdpo.logical_score_mod(row, logarithm))
    assert torch.isfinite(got).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), heads))


def test_a_batch_of_rows() -> None:
    rows = [ROWS["shared"](), ROWS["depth two"]()]
    layout = RowLayout.stack([row.layout for row in rows])
    length = layout.length
    heads = [torch.randn(2, h, length, 8, dtype=torch.float64) for h in (HEADS, KEY_HEADS, KEY_HEADS)]
    alibi = flexdpo.alibi_score_mod(SLOPES, layout)
    both = flexdpo.attend(*heads, layout, window=3, score_mod=alibi)
    for number, row in enumerate(rows):
        size = row.layout.length
        alone = [x[number : number + 1, :, :size] for x in heads]
        want = flexdpo.attend(*alone, row, window=3, score_mod=flexdpo.alibi_score_mod(SLOPES, row))
        torch.testing.assert_close(both[number : number + 1, :, :size], want)


# --- a model that is not from transformers ---------------------------------------------------------------------------


class PlainModel(nn.Module):
    """Two layers with one slope per head that is trained too; attention is what the caller says."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}) for _ in range(2)
        )
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.1, 0.02]))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            heads = layer["qkv"](hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            attended = attention(*heads.unbind(0), self.slopes)
            hidden = hidden + layer["out"](attended.transpose(1, 2).flatten(2)).tanh()
        return self.head(hidden)


@pytest.mark.parametrize("name", ["packed", "shared", "depth two"])
def test_a_plain_model_trains_ten_steps_as_unpacked(name: str) -> None:
    torch.manual_seed(0)
    packed = PlainModel().double()
    unpacked = copy.deepcopy(packed)
    row = ROWS[name]()
    every = {"packed": PACKED, "depth two": DEEP, "shared": [s.tolist() for g in SHARED for s in g.sequences]}[name]
    sequences = [torch.tensor([ids]) for ids in every]
    prompts = [p for g in SHARED for p in [g.prompt_ids.size] * 2] if name == "shared" else [1] * len(every)

    def on_row(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return flexdpo.attend(query, key, value, row, window=4, score_mod=flexdpo.alibi_score_mod(slopes, row))

    def alone(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position[None, :]
        near = (distance >= 0) & (distance < 4)
        return formula(query, key, value, near, position, scale=query.shape[-1] ** -0.5, slopes=slopes)

    def row_loss() -> Tensor:
        logits = packed(row.input_ids, on_row)[0, row.predictors]
        return F.cross_entropy(logits, row.labels, reduction="none")[row.member_targets].sum()

    def unpacked_loss() -> Tensor:
        losses = [
            F.cross_entropy(unpacked(ids, alone)[0, prompt - 1 : -1], ids[0, prompt:], reduction="sum")
            for ids, prompt in zip(sequences, prompts, strict=True)
        ]
        return torch.stack(losses).sum()

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (packed, unpacked)]
    first = None
    for _ in range(10):
        losses = row_loss(), unpacked_loss()
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
        first = first or losses[0].item()
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0].item() < 0.9 * first
    torch.testing.assert_close(packed.state_dict(), unpacked.state_dict(), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_attend_inside_a_compiled_model() -> None:
    torch.manual_seed(0)
    model, row = PlainModel(), ROWS["depth two"]()

    def on_row(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return flexdpo.attend(query, key, value, row, window=4, score_mod=flexdpo.alibi_score_mod(slopes, row))

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(row.input_ids, on_row).square().sum(), list(model.parameters()))

    torch.testing.assert_close(
        gradients(torch.compile(model, backend="aot_eager")), gradients(model), rtol=1e-4, atol=1e-4
    )


# --- bad input -------------------------------------------------------------------------------------------------------


NAN = math.nan


def heads_of(query: Any) -> list[Any]:
    return [query, torch.zeros(1, 4, 32, 8), torch.zeros(1, 4, 32, 8)]


def call(row: Any = None, heads: Any = None, **options: Any) -> Any:
    row = ROWS["shared"]() if row is None else row
    return lambda: flexdpo.attend(*(inputs(row) if heads is None else heads), row, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call(window=0), "window must be a number of tokens, at least 1, got 0"),
        (call(window=True), "window must be a number of tokens, at least 1, got True"),
        (call(chunk=2.5), r"chunk must be a number of tokens, at least 1, got 2\.5"),
        (call(window=3, chunk=4), "give one of window, chunk and mask_function, got window and chunk"),
        (call(mask_function=5), r"mask_function must be a function, got int \(5\)"),
        (call(mask_function=lambda b, h, q, kv: q - kv), "mask_function must return a bool tensor"),
        (call(mask_function=lambda q, kv: q >= kv), "mask_function cannot be evaluated at one pair of tokens"),
        (call(mask_function=lambda b, h, q, kv: q if q > kv else kv), r"torch\.where instead of Python's if"),
        (call(score_mod=lambda s, b, h, q, kv: q > kv), "score_mod must return a score, a 0-d float tensor"),
        (call(score_mod=lambda s: s), "score_mod cannot be evaluated at one pair of tokens"),
        (call(score_mod=flexdpo.softcap_score_mod(2.0), impl="flex"), "impl='flex' has no backward on a CPU; use impl"),
        (call(score_mod=flexdpo.softcap_score_mod(2.0), impl="varlen"), "it changes its attention scores"),
        *((call(softcap=value), "softcap must be above 0 and finite, got") for value in (0.0, -1, math.inf, NAN, "2")),
        *((lambda v=v: flexdpo.softcap_score_mod(v), "softcap must be above 0") for v in (0, math.inf, NAN, None, [2])),
        *((call(scale=value), "scale must be a finite number, got") for value in (NAN, math.inf, "1", torch.ones(1))),
        *((call(sinks=value), f"sinks must be a tensor, got {type(value).__name__}") for value in (1.0, [0.0] * 4)),
        *((call(heads=heads_of(q)), "query must be a tensor, got") for q in (np.zeros((1, 4, 32, 8)), None, "q")),
        *((call(heads=heads_of(torch.zeros(1, 4, 32, 8).to(dtype))), f"query must be one of .*, got {dtype}")
          for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
        (call(heads=heads_of(torch.zeros(1, 4, 32, 8, dtype=torch.float16))), "must have one dtype, got torch.float16"),
        *((call(heads=[torch.zeros(shape)] * 3), "no size 0 and Hkv a divisor of Hq")
          for shape in ((1, 0, 32, 8), (1, 4, 32, 0))),
        *((call(score_mod=flexdpo.alibi_score_mod(torch.ones(n), ROWS["shared"]())), f"slopes for {n} query heads, and")
          for n in (3, 5)),
        *((call(score_mod=flexdpo.alibi_score_mod(SLOPES.float(), Row.from_lengths([n]))), "positions of another row")
          for n in (3, 32, 64)),
        (lambda: flexdpo.alibi_score_mod([0.5], ROWS["shared"]()), r"slopes must be a float tensor \[Hq\]"),  # type: ignore
        *((lambda p=p: flexdpo.alibi_score_mod(SLOPES, p), "positions must be") for p in (None, 3, torch.zeros(3))),
        (call(sinks=torch.zeros(3)), "sinks must hold one logit for each of 4 query heads"),
        (call(impl="felx"), "did you mean 'flex'"),
        (call(heads=[torch.zeros(1, 4, 9, 8)] * 3), "the layout is for 1 rows of 32 tokens, but attention received 1 "),
        (
            call(heads=[torch.zeros(4, 32, 8)] * 3),
            r"query must be \[rows, heads, tokens, head size\], got \[4, 32, 8\]",
        ),
        (call(heads=[torch.zeros(1, 4, 32, 8, device="meta")] * 3), r"query is on meta and the row on cpu; move the"),
        (lambda: flexdpo.attend(*inputs(ROWS["shared"]()), "row"), r"a row must be a flexdpo\.Row"),  # type: ignore
        (lambda: flexdpo.mask_mod(None), r"a row must be a flexdpo\.Row"),  # type: ignore[arg-type]
        *((lambda size=size: flexdpo.block_mask(ROWS["shared"](), block_size=size), "block_size must be at least 1 tok")
          for size in (0, "x", 2.5, None, (), (8, 8, 8), (8, 0), True)),
        (lambda: flexdpo.draw([1, 2]), r"draw takes one flexdpo\.Row, got list"),  # type: ignore[arg-type]
        (lambda: flexdpo.draw(Row.from_lengths([3000]), window=4), "at most 2048 tokens, got 3000"),
        (lambda: Row.from_sequences([]), "a row needs at least one group, document or sequence, got none"),
        (lambda: Row.from_documents([[1], []]), "document 1 has no tokens; leave it out"),
        (lambda: Row.from_documents([[1.7]]), "document 0 must be one list of token ids"),  # type: ignore[list-item]
        (lambda: Row.from_sequences([[[1, 2]]]), "sequence 0 must be one list"),  # type: ignore[list-item]
        (lambda: Row.from_sequences([[3, -1]]), "whole numbers from 0 on"),
        (lambda: Row.from_sequences([[1]], pad_to_multiple_of=0), "pad_to_multiple_of must be at least 1, got 0"),
        (lambda: Row.from_lengths([3, 0]), r"a length must be a whole number above 0, .* got int \(0\)"),
        (lambda: Row.from_lengths([(3, 4)]), "the branches behind 3 tokens must be a list of lengths, got int"),
        (lambda: Row.from_lengths([(3, [2.5])]), r"got float \(2\.5\)"),
    ],
)  # fmt: skip
def test_one_clear_error(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        wrong()
