"""Images whose tokens see each other both ways: mask, tiles, query blocks and kernels against the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from flexdpo import Group, Row, RowLayout
from flexdpo.attention.block_masks import build_block_mask, classify_tiles
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.kernels import packed_attention
from flexdpo.attention.mask_mods import MaskKind, mask_mod_for
from flexdpo.attention.query_blocks import plan_query_blocks
from flexdpo.attention.row_mask import row_mask_for
from flexdpo.attention.varlen import require_varlen
from flexdpo.errors import UnsupportedModelError
from flexdpo.layout.groups import PromptImage
from tests.attention.test_block_masks import FIELDS, assert_same_layout, tiles_of
from tests.oracle import dense_attention, dense_mask

FULL = MaskKind("causal", blocks=True)
IMAGE = 999


def windowed(size: int) -> MaskKind:
    return MaskKind("sliding", size, blocks=True)


def picture(name: str, tokens: int) -> PromptImage:
    return PromptImage(name, tokens, {"pixel_values": torch.zeros(1, 1)})


def random_row(seed: int, longest: int, pad: int = 1) -> Row:
    """Prompts of text and images in turn, images next to each other, at the beginning and at the end of a prompt."""
    rng = np.random.default_rng(seed)

    def text(least: int = 0) -> list[int]:
        return rng.integers(0, 3, rng.integers(least, longest // 2 + 2)).tolist()

    groups = []
    for _ in range(3):
        images = [picture(f"{n}", 2 + 7 * n % longest + longest // 3) for n in rng.integers(0, 3, rng.integers(0, 4))]
        prompt = text(0 if images else 1)
        for image in images:
            prompt += [IMAGE] * image.tokens + text()
        responses = tuple(np.asarray(text(1)) for _ in range(rng.integers(1, 4)))
        groups.append(Group(np.asarray(prompt), responses, (), "group", tuple(images), IMAGE))
    return Row.from_groups(groups, pad_to_multiple_of=pad)


def by_definition(layout: RowLayout, window: int | None) -> torch.Tensor:
    """Walk: a query sees its ancestors, and all of the unbroken run of image tokens on its path that it stands in."""
    length, ends = layout.length, layout.subtree_end[0].tolist()
    image = [] if layout.images is None else (layout.images.features[0] >= 0).tolist()
    positions = layout.position_ids[0].tolist()
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        ancestors = [key for key in range(query + 1) if query < ends[key]]
        run, place = [], query
        while image and image[place]:
            run.append(place)
            # the next token is its child, or begins something else
            if place + 1 == length or ends[place] <= place + 1 or not image[place + 1]:
                break
            place += 1
        for key in ancestors + run:
            mask[query, key] = window is None or positions[query] - positions[key] < window
    return mask


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), longest=st.sampled_from([6, 20]), window=st.sampled_from([None, 3, 9]))
def test_the_mask_is_its_definition(seed: int, longest: int, window: int | None) -> None:
    layout = random_row(seed, longest, 16).layout
    kind = FULL if window is None else windowed(window)
    torch.testing.assert_close(
        dense_mask(mask_mod_for(layout, kind), 1, layout.length)[0], by_definition(layout, window)
    )


def require_tiles(row: Row, kind: MaskKind, block: int | tuple[int, int]) -> None:
    layout, (queries, keys) = row.layout, (block, block) if isinstance(block, int) else block
    tiles, got = classify_tiles(layout, kind, block), build_block_mask(layout, kind, block_size=block)
    length = layout.length
    want = create_block_mask(got.mask_mod, 1, 1, length, length, device="cpu", BLOCK_SIZE=block)
    if queries == keys:
        assert_same_layout(got, want)
    mask = dense_mask(got.mask_mod, 1, length)[0]
    padded = torch.nn.functional.pad(mask, (0, -length % keys, 0, -length % queries))
    cells = padded.view(len(padded) // queries, queries, -1, keys).transpose(1, 2)
    some, every = cells.any(-1).any(-1), cells.all(-1).all(-1)
    torch.testing.assert_close(tiles.full[0], every)
    if kind.name == "causal":
        torch.testing.assert_close(tiles.non_empty[0], some)
    if kind.name == "causal" and queries == keys:
        for field in FIELDS:
            torch.testing.assert_close(getattr(got, field), getattr(want, field), msg=field)
    assert not (some & ~tiles.non_empty[0]).any()
    for name in ("", "full_"):
        of_keys = tiles_of(getattr(got, f"{name}kv_num_blocks"), getattr(got, f"{name}kv_indices"))
        of_queries = tiles_of(getattr(got, f"{name}q_num_blocks"), getattr(got, f"{name}q_indices"))
        torch.testing.assert_close(of_keys, of_queries.transpose(-1, -2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    longest=st.sampled_from([6, 40, 150]),
    pad=st.sampled_from([1, 16, 128]),
    kind=st.sampled_from([FULL, windowed(5), windowed(40)]),
    block=st.sampled_from([16, (32, 16), (16, 48), 128]),
)
def test_tiles(seed: int, longest: int, pad: int, kind: MaskKind, block: Any) -> None:
    require_tiles(random_row(seed, longest, pad), kind, block)


def test_tiles_lie_above_the_diagonal() -> None:
    group = Group(
        np.asarray([1] * 10 + [IMAGE] * 300 + [2] * 9), (np.asarray([3]),), (), "g", (picture("a", 300),), IMAGE
    )
    row = Row.from_groups([group], pad_to_multiple_of=128)
    tiles = classify_tiles(row.layout, FULL, 128)
    assert tiles.non_empty[0].tolist() == [[True, True, True], [True, True, True], [True, True, True]]
    # the middle tile of the image lies within it
    assert tiles.full[0].tolist() == [[False, False, False], [True, True, False], [False, False, False]]
    require_tiles(row, FULL, 128)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    longest=st.sampled_from([6, 40, 150]),
    max_queries=st.sampled_from([1, 7, 64, 512]),
    kind=st.sampled_from([FULL, windowed(4), windowed(30)]),
)
def test_query_blocks_reach_every_key(seed: int, longest: int, max_queries: int, kind: MaskKind) -> None:
    layout = random_row(seed, longest).layout
    blocks = plan_query_blocks(layout, kind, max_queries=max_queries)
    assert [query for block in blocks for query in range(block.start, block.stop)] == list(range(layout.length))
    mask = dense_mask(mask_mod_for(layout, kind), 1, layout.length)[0]
    for block in blocks:
        given_keys = torch.zeros(layout.length, dtype=torch.bool)
        for start, stop in block.key_runs:
            assert not given_keys[start:stop].any()
            given_keys[start:stop] = True
        assert not mask[block.start : block.stop, ~given_keys].any()
        assert block.key_runs[-1][1] >= block.stop


@pytest.mark.parametrize("kind", [FULL, windowed(9)], ids=["full", "window"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
def test_attention_and_its_gradients(kind: MaskKind, softcap: float | None) -> None:
    layout = RowLayout.stack([random_row(seed, 40).layout for seed in (5, 6)])
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, layout.length, 16) for heads in (4, 2, 2)]
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weights = torch.randn(*shapes[0], generator=generator, dtype=torch.float64)
    row_mask = row_mask_for(layout, kind, "sdpa")
    got = packed_attention(*leaves, row_mask, softcap=softcap)
    mask = dense_mask(mask_mod_for(layout, kind), 2, layout.length)
    want = dense_attention(*leaves, mask, softcap=softcap)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((want * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_flash_attention_refuses_them() -> None:
    layout = random_row(1, 20).layout
    inputs = AttentionInputs(*(torch.zeros(1, 2, layout.length, 16) for _ in range(3)))
    with pytest.raises(UnsupportedModelError, match="see each other both ways"):
        require_varlen(inputs, row_mask_for(layout, FULL, "varlen"))


def test_rows_without_images_have_no_blocks() -> None:
    layout = Row.from_groups([Group.from_lists([1] * 30, [[2] * 9, [3] * 7])]).layout
    torch.testing.assert_close(
        dense_mask(mask_mod_for(layout, FULL), 1, layout.length),
        dense_mask(mask_mod_for(layout, MaskKind("causal")), 1, layout.length),
    )
