"""Pictures of a packed row say what the mask's definition says."""

import sys

import numpy as np
import pytest
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.insight import show
from flexdpo.insight.show import (
    EMPTY,
    FIRST_RESPONSE,
    FULL,
    HIDDEN,
    PADDING,
    PARTIAL,
    PROMPT,
    SHARED,
    draw_row_mask,
    mask_categories,
    render_row_text,
    row_mask_figure,
    tile_kinds,
    token_kinds,
)
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row

# row:      0  1  2 | 3  4   5     6  7    8 | 9  10   11   12 13 | 14 15
# token:   p0 p1 p2 | s  s   r0   r1 r1   r2 | p0 p1   r0   r1 r1 | padding
DEPTH_TWO = [
    PROMPT, PROMPT, PROMPT, SHARED, SHARED, FIRST_RESPONSE, FIRST_RESPONSE + 1, FIRST_RESPONSE + 1,
    FIRST_RESPONSE + 2, PROMPT, PROMPT, FIRST_RESPONSE, FIRST_RESPONSE + 1, FIRST_RESPONSE + 1,
    PADDING, PADDING,
]  # fmt: skip


def depth_two_row() -> Row:
    return Row.from_groups(
        [
            Group.from_lists([1, 2, 3], [[7, 8, 20], [7, 8, 30, 31], [40]], edges=[(0, 1), (0, 2)]),
            Group.from_lists([1, 2], [[50], [60, 61]]),
        ],
        pad_to_multiple_of=16,
    )


def long_row(num_groups: int, *, pad_to_multiple_of: int = 1, seed: int = 0) -> Row:
    """Groups of a prompt of 20 to 400 tokens and two responses of 5 to 150 that share nothing."""
    rng = np.random.default_rng(seed)
    groups = [
        Group.from_lists(list(range(rng.integers(20, 400))), [[1_000 + k] * rng.integers(5, 150) for k in range(2)])
        for _ in range(num_groups)
    ]
    return Row.from_groups(groups, pad_to_multiple_of=pad_to_multiple_of)


def dense_mask(row: Row) -> np.ndarray:
    end = row.subtree_end[0].tolist()
    return np.array([[kv <= q < end[kv] for kv in range(len(end))] for q in range(len(end))])


def test_token_kinds_of_a_trie_of_depth_two():
    kinds, documents, num_responses = token_kinds(depth_two_row())
    assert kinds.tolist() == DEPTH_TWO
    assert documents.tolist() == [0] * 9 + [1] * 5 + [-1] * 2
    assert num_responses == 3


def test_categories_equal_a_loop_over_the_definition():
    row = depth_two_row()
    end = row.subtree_end[0].tolist()
    want = np.full((16, 16), HIDDEN)
    for q in range(16):
        for kv in range(16):
            if kv <= q < end[kv]:
                want[q, kv] = DEPTH_TWO[kv]
    np.testing.assert_array_equal(mask_categories(row), want)


def test_categories_keep_branches_apart_and_show_each_its_ancestors():
    # written out by hand, so that a row with wrong subtree ends fails too
    seen_by = {q: np.flatnonzero(line != HIDDEN).tolist() for q, line in enumerate(mask_categories(depth_two_row()))}
    assert seen_by[5] == [0, 1, 2, 3, 4, 5]
    assert seen_by[7] == [0, 1, 2, 3, 4, 6, 7]
    assert seen_by[8] == [0, 1, 2, 8]
    assert seen_by[13] == [9, 10, 12, 13]
    assert seen_by[15] == [15]


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("pad_to_multiple_of", [1, 128])
def test_tiles_equal_brute_force(block_size, pad_to_multiple_of):
    row = long_row(3, pad_to_multiple_of=pad_to_multiple_of)
    mask = dense_mask(row)
    tiles = tile_kinds(row.subtree_end[0].numpy(), block_size)
    side = -(-len(mask) // block_size)
    padded = np.zeros((side * block_size, side * block_size), dtype=bool)
    padded[: len(mask), : len(mask)] = mask
    assert tiles.shape == (side, side)
    for i in range(side):
        for j in range(side):
            tile = padded[i * block_size :, j * block_size :][:block_size, :block_size]
            want = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            assert tiles[i, j] == want, f"tile ({i}, {j})"
    assert set(np.unique(tiles)) == {EMPTY, PARTIAL, FULL}


def test_one_hidden_cell_makes_a_full_tile_partial():
    chain = np.full(8, 8)
    assert tile_kinds(chain, 4).tolist() == [[PARTIAL, EMPTY], [FULL, PARTIAL]]
    one_hidden = np.array([8, 8, 8, 7, 8, 8, 8, 8])  # query 7 may not attend to key 3
    assert tile_kinds(one_hidden, 4)[1, 0] == PARTIAL
    assert tile_kinds(np.full(7, 7), 4)[1, 0] == PARTIAL  # reaches past the end of the row


def test_every_second_document_is_paler_and_padding_is_not():
    from matplotlib.colors import to_rgb

    colours = show._token_colours(token_kinds(depth_two_row()))
    np.testing.assert_allclose(colours[0], to_rgb(show._KIND_COLOURS[PROMPT]), atol=1e-6)
    np.testing.assert_allclose(colours[15], to_rgb(show._KIND_COLOURS[PADDING]), atol=1e-6)
    assert (colours[9] > colours[0]).all()


def test_picture_of_a_long_row_is_the_average_of_the_picture_of_its_cells():
    row = long_row(2)
    colours = show._token_colours(token_kinds(row))
    length, step = len(colours), 9
    assert length % step != 0  # the last square is a smaller one
    exact = np.where(dense_mask(row)[:, :, None], colours[None], 1.0)
    got = show._averaged_cells(row.subtree_end[0].numpy(), colours, step)
    for i in range(0, length, step):
        for j in range(0, length, step):
            want = exact[i : i + step, j : j + step].mean(axis=(0, 1))
            np.testing.assert_allclose(got[i // step, j // step], want, atol=1e-5)


def read_png(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def pixel_at(figure, pixels: np.ndarray, query: int, key: int) -> np.ndarray:
    x, y = figure.axes[0].transData.transform((key + 0.5, query + 0.5))
    return pixels[len(pixels) - 1 - int(y), int(x)]


def test_every_visible_cell_has_its_key_tokens_colour_in_the_file(tmp_path):
    row = depth_two_row()
    pixels = read_png(draw_row_mask(row, tmp_path / "mask.png"))
    figure = row_mask_figure(row)
    colours = show._token_colours(token_kinds(row))
    # every kind and both tints differ, or the comparison below says nothing
    assert len(np.unique(colours, axis=0)) == 9
    for query in range(16):
        for key in range(query + 1):  # the legend stands above the diagonal
            want = colours[key] if dense_mask(row)[query, key] else np.ones(3)
            got = pixel_at(figure, pixels, query, key)
            np.testing.assert_allclose(got, want, atol=2 / 255, err_msg=f"query {query}, key {key}")


@pytest.mark.parametrize(
    "row",
    [depth_two_row(), long_row(2), long_row(12, pad_to_multiple_of=128)],
    ids=["small", "with tiles", "averaged"],
)
def test_picture_is_written_and_large_enough(row, tmp_path):
    path = draw_row_mask(row, tmp_path / "mask.png", title="a title")
    assert path == tmp_path / "mask.png"
    height, width, _ = read_png(path).shape
    assert width >= 1200
    assert height >= 1000


def test_the_averaged_row_is_longer_than_what_is_drawn_singly():
    # guards the parametrisation above
    assert long_row(12).num_tokens > show.TOKENS_DRAWN_SINGLY
    assert 256 <= long_row(2).num_tokens <= show.TOKENS_DRAWN_SINGLY


def legend_labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_legend_names_what_the_row_has_and_no_more():
    responses = ["response 0", "response 1", "response 2"]
    assert legend_labels(row_mask_figure(depth_two_row())) == [
        "prompt",
        "shared by responses",
        *responses,
        "padding (sees only itself)",
    ]
    single = Row.from_groups([Group.from_lists([1], [[2]], edges=[])])
    assert legend_labels(row_mask_figure(single)) == ["prompt", "response 0"]


def test_legend_counts_the_tiles():
    row = long_row(2)
    tiles = tile_kinds(row.subtree_end[0].numpy(), 128)
    assert legend_labels(row_mask_figure(row))[-3:] == [
        f"{(tiles == EMPTY).sum()} empty tiles (128 x 128), skipped",
        f"{(tiles == PARTIAL).sum()} partial tiles, masked",
        f"{(tiles == FULL).sum()} full tiles, no mask needed",
    ]


def test_many_responses_get_colours_of_their_own():
    row = Row.from_groups([Group.from_lists([1, 2], [[10 + k] for k in range(20)], edges=[])])
    colours = show._token_colours(token_kinds(row))
    assert len(np.unique(colours[2:], axis=0)) == 20
    assert legend_labels(row_mask_figure(row)) == ["prompt", "response 0", "... to response 19"]


def test_default_title_counts_tokens():
    title = row_mask_figure(depth_two_row()).texts[-1].get_text()
    assert title == "One packed row: 2 documents, 14 tokens run instead of 24, 2 padding"


def test_drawing_leaves_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw_row_mask(depth_two_row(), tmp_path / "mask.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_text_view_has_one_mark_per_visible_cell():
    lines = render_row_text(depth_two_row()).splitlines()
    assert lines[7] == "███▚▚ 11"
    assert lines[8] == "███     2"
    assert lines[13] == " " * 9 + "██ 11"
    assert lines[15] == " " * 15 + "·"


def test_text_view_refuses_a_row_that_does_not_fit():
    with pytest.raises(FlexdpoError, match="16 tokens does not fit 15 characters; raise width or use draw_row_mask"):
        render_row_text(depth_two_row(), width=15)


def test_more_than_one_row_is_refused(tmp_path):
    row = depth_two_row()
    row.layout.subtree_end = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(FlexdpoError, match=r"\[1, S\] with S >= 1, got \(2, 16\)"):
        draw_row_mask(row, tmp_path / "mask.png")


def test_block_size_must_be_positive(tmp_path):
    with pytest.raises(FlexdpoError, match="block_size must be at least 1 token, got 0"):
        draw_row_mask(depth_two_row(), tmp_path / "mask.png", block_size=0)
