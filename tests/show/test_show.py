"""Pictures of a packed row say what the mask's definition says."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexdpo.errors import FlexdpoError
from flexdpo.example.task import BodyPair
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import pack
from flexdpo.layout.row import Row
from flexdpo.show import mask_image
from flexdpo.show.draw import draw, overview_figure
from flexdpo.show.mask_image import (
    EMPTY,
    FIRST_RESPONSE,
    FULL,
    HIDDEN,
    PADDING,
    PARTIAL,
    PROMPT,
    SHARED,
    mask_categories,
    picture_block_size,
    tile_kinds,
    token_kinds,
)
from flexdpo.show.packing import batch_layouts
from flexdpo.show.plots import save_figure
from flexdpo.show.sources import example_groups, read_lengths
from flexdpo.show.text import mask_text, overview_text
from flexdpo.show.trie import trie_runs
from tests.oracle import ancestor_mask

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
    kinds, documents = token_kinds(depth_two_row())
    assert kinds.tolist() == DEPTH_TWO
    assert documents.tolist() == [0] * 9 + [1] * 5 + [-1] * 2
    assert kinds.max() == FIRST_RESPONSE + 3 - 1


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
    tiles = tile_kinds(row, block_size)
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
    (chain,) = pack([Group.from_lists([1] * 4, [[2] * 4], [])])
    assert tile_kinds(chain, 4).tolist() == [[PARTIAL, EMPTY], [FULL, PARTIAL]]
    # query 7 may not attend to key 3
    one_hidden = dense_mask(chain)
    one_hidden[7, 3] = False
    assert tile_kinds(chain, 4, one_hidden)[1, 0] == PARTIAL
    (branch,) = pack([Group.from_lists([1] * 3, [[2], [3] * 4])])
    assert tile_kinds(branch, 4)[1, 0] == PARTIAL
    (short,) = pack([Group.from_lists([1] * 4, [[2] * 3], [])])
    assert tile_kinds(short, 4)[1, 0] == PARTIAL  # reaches past the end of the row


def test_every_second_document_is_paler_and_padding_is_not():
    from matplotlib.colors import to_rgb

    colours = mask_image.token_colours(token_kinds(depth_two_row()))
    np.testing.assert_allclose(colours[0], to_rgb(mask_image._KIND_COLOURS[PROMPT]), atol=1e-6)
    np.testing.assert_allclose(colours[15], to_rgb(mask_image._KIND_COLOURS[PADDING]), atol=1e-6)
    assert (colours[9] > colours[0]).all()


def test_picture_of_a_long_row_is_the_average_of_the_picture_of_its_cells():
    row = long_row(2)
    colours = mask_image.token_colours(token_kinds(row))
    length, step = len(colours), 9
    assert length % step != 0  # the last square is a smaller one
    exact = np.where(dense_mask(row)[:, :, None], colours[None], 1.0)
    got = mask_image.averaged_cells(row, colours, step)
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
    figure = draw(row, path=tmp_path / "mask.png", block_size=128)
    pixels = read_png(tmp_path / "mask.png")
    colours = mask_image.token_colours(token_kinds(row))
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
    path = tmp_path / "mask.png"
    draw(row, path=path, title="a title")
    height, width, _ = read_png(path).shape
    assert width >= 1200
    assert height >= 1000


def test_the_averaged_row_is_longer_than_what_is_drawn_singly():
    # guards the parametrisation above
    assert long_row(12).num_tokens > mask_image.TOKENS_DRAWN_SINGLY
    assert 256 <= long_row(2).num_tokens <= mask_image.TOKENS_DRAWN_SINGLY


def legend_labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_legend_names_what_the_row_has_and_no_more():
    responses = ["response 0", "response 1", "response 2"]
    assert legend_labels(draw(depth_two_row(), block_size=128)) == [
        "prompt",
        "shared by responses",
        *responses,
        "padding (sees only itself)",
    ]
    single = Row.from_groups([Group.from_lists([1], [[2]], edges=[])])
    assert legend_labels(draw(single, block_size=128)) == ["prompt", "response 0"]


def test_legend_counts_the_tiles():
    row = long_row(2)
    tiles = tile_kinds(row, 128)
    assert legend_labels(draw(row, block_size=128))[-3:] == [
        f"{(tiles == EMPTY).sum()} empty tiles (128 x 128), skipped",
        f"{(tiles == PARTIAL).sum()} partial tiles, masked",
        f"{(tiles == FULL).sum()} full tiles, no mask needed",
    ]


def test_many_responses_get_colours_of_their_own():
    row = Row.from_groups([Group.from_lists([1, 2], [[10 + k] for k in range(20)], edges=[])])
    colours = mask_image.token_colours(token_kinds(row))
    assert len(np.unique(colours[2:], axis=0)) == 20
    assert legend_labels(draw(row, block_size=128)) == ["prompt", "response 0", "... to response 19"]


def test_default_title_counts_tokens():
    title = draw(depth_two_row()).texts[-1].get_text()
    assert title == "One packed row: 2 documents, 14 tokens run instead of 24, 2 padding"


def test_drawing_leaves_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw(depth_two_row(), path=tmp_path / "mask.png", block_size=4)
    assert "matplotlib.pyplot" not in sys.modules


def test_text_view_has_one_mark_per_visible_cell():
    lines = mask_text(depth_two_row()).splitlines()
    assert lines[7] == "███▚▚ 11"
    assert lines[8] == "███     2"
    assert lines[13] == " " * 9 + "██ 11"
    assert lines[15] == " " * 15 + "·"


def test_block_size_must_be_positive():
    with pytest.raises(FlexdpoError, match="block_size must be at least 1 token, got 0"):
        draw(depth_two_row(), block_size=0)


# --- tries, batches and the whole picture ----------------------------------------------------------------------------

DEPTH_TWO_LENGTHS = [{"prompt": 11, "responses": [[4, [5, 3]], 6]}, {"prompt": 8, "responses": [5, 4]}]


def write_lengths(folder, value):
    path = folder / "lengths.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def parents_of(row: Row) -> torch.Tensor:
    """Each token's parent, from the groups' own sequences and not from the row's layout."""
    parents, place = [], 0
    for group in row.groups:
        seen: dict[tuple[int, ...], int] = {}
        for ids in group.sequences:
            for depth in range(1, len(ids) + 1):
                seen.setdefault(tuple(ids[:depth].tolist()), -1)
        # depth first, siblings in order of appearance
        order = sorted(
            seen, key=lambda prefix: [list(seen).index(prefix[:depth]) for depth in range(1, len(prefix) + 1)]
        )
        index = {prefix: place + number for number, prefix in enumerate(order)}
        parents += [index.get(prefix[:-1], -1) for prefix in order]
        place += len(order)
    return torch.tensor(parents)


def test_lengths_make_a_trie_of_depth_two(tmp_path):
    groups = read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS))
    assert [len(ids) for ids in groups[0].response_ids] == [9, 7, 6]
    assert groups[0].edges == ((0, 1), (0, 2))
    assert groups[0].response_ids[0][:4].tolist() == groups[0].response_ids[1][:4].tolist()
    row = Row.from_groups(groups)
    assert (row.num_tokens, row.unshared_tokens) == (11 + 4 + 5 + 3 + 6 + 17, 80)


def test_the_drawn_mask_of_a_trie_of_depth_two_is_the_dense_mask(tmp_path):
    groups = read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS))
    row = pack(groups)[0]
    dense = ancestor_mask(parents_of(row)).numpy()
    # wrong subtree ends would make both wrong alike, so the definition walks up the groups' own sequences
    np.testing.assert_array_equal(mask_categories(row) != HIDDEN, dense)
    figure = overview_figure(row, batch_layouts(groups), view="mask", block_size=64)
    pixels = read_png(save_figure(figure, tmp_path / "mask.png"))
    for query in range(len(dense)):
        # the legend stands in the upper right
        for key in range(query + 1):
            drawn = not np.allclose(pixel_at(figure, pixels, query, key), 1, atol=2 / 255)
            assert drawn == dense[query, key], f"query {query}, key {key}"


def test_runs_of_a_trie_of_depth_two(tmp_path):
    row = pack(read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS)))[0]
    runs = trie_runs(row)
    names = {PROMPT: "prompt", SHARED: "shared", **{FIRST_RESPONSE + k: k for k in range(3)}}
    assert [(run.start, run.stop, run.position, names[run.kind], run.document, run.parent) for run in runs] == [
        (0, 11, 0, "prompt", 0, -1),
        (11, 15, 11, "shared", 0, 0),
        (15, 20, 15, 0, 0, 1),
        (20, 23, 15, 1, 0, 1),
        (23, 29, 11, 2, 0, 0),
        (29, 37, 0, "prompt", 1, -1),
        (37, 42, 8, 0, 1, 5),
        (42, 46, 8, 1, 1, 5),
    ]
    leaves = [run.lane for run in runs if run.kind >= FIRST_RESPONSE]
    assert leaves == pytest.approx([0, 1, 2, 3.6, 4.6])
    assert runs[1].lane == pytest.approx(0.5)  # between its two responses
    assert runs[5].lane == pytest.approx(4.1)


@pytest.mark.parametrize("row", [depth_two_row(), long_row(3, pad_to_multiple_of=128)], ids=["small", "padded"])
def test_runs_cover_every_real_token_once(row):
    runs = trie_runs(row)
    assert [token for run in runs for token in range(run.start, run.stop)] == list(range(row.num_tokens))
    positions = row.position_ids[0].tolist()
    for run in runs:
        assert positions[run.start : run.stop] == list(range(run.position, run.position + len(run)))
        above = runs[run.parent] if run.parent >= 0 else None
        assert run.position == (0 if above is None else above.position + len(above))


def test_layouts_of_a_batch_hold_its_tokens(tmp_path):
    groups = read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS))
    padded, packed, shared = batch_layouts(groups, 60)
    assert [lane.kinds.size for lane in padded.lanes] == [20] * 5
    assert (padded.slots, padded.num_tokens) == (100, 80)
    assert packed.slots == packed.num_tokens == 80
    assert max(lane.kinds.size for lane in packed.lanes) <= 60
    assert (shared.slots, len(shared.lanes)) == (46, 1)
    kinds = shared.lanes[0].kinds
    np.testing.assert_array_equal(kinds, token_kinds(pack(groups)[0]).kinds)
    assert padded.title() == "padded: 5 sequences, 100 tokens run, 20% of them padding"
    assert shared.title() == "packed and shared: 1 row, 46 tokens run"


def test_groups_that_share_a_trie_have_the_responses_of_all(tmp_path):
    groups = [Group.from_lists(list(range(200)), [[300 + 2 * n], [301 + 2 * n]]) for n in range(4)]
    padded, _, shared = batch_layouts(groups, 3_000, sharing="step")
    assert shared.lanes[0].kinds.max() == FIRST_RESPONSE + 8 - 1
    save_figure(overview_figure(pack(groups, sharing="step")[0], [padded, shared]), tmp_path / "view.png")


def test_groups_that_do_not_fit_the_rows_are_refused(tmp_path):
    groups = read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS))
    with pytest.raises(FlexdpoError, match="group 0 has a sequence of 20 tokens or more but max_tokens_per_row=19"):
        batch_layouts(groups, 19)


@pytest.mark.parametrize("view", ["all", "trie", "mask", "packing"])
def test_views_are_1200_pixels_wide(view, tmp_path):
    row = long_row(3)
    figure = overview_figure(row, batch_layouts(list(row.groups)), view=view)
    height, width, _ = read_png(save_figure(figure, tmp_path / "view.png")).shape
    assert width == 1200
    assert height > 150


@pytest.mark.parametrize(("length", "size"), [(2048, 128), (1024, 128), (800, 64), (46, 4), (10, 2)])
def test_tiles_of_short_rows_are_drawn_smaller(length, size):
    assert picture_block_size(length) == size


def test_the_terminal_shows_tries_mask_and_batch(tmp_path):
    groups = read_lengths(write_lengths(tmp_path, DEPTH_TWO_LENGTHS))
    text = overview_text(pack(groups)[0], batch_layouts(groups), width=60)
    assert "document 0: prompt, 11 tokens (row 0 to 10, from position 0)" in text
    assert "   │  └─ response 1, 3 tokens (row 20 to 22, from position 15)" in text
    assert "███████████▚▚▚▚     111\n" in text
    assert "████████00000·······\n" in text  # padded to the longest
    narrow = overview_text(pack(groups)[0], batch_layouts(groups), width=40, block_size=8)
    assert "tiles of 8 x 8: █ " in narrow
    assert "(a character is 2 tokens)" in narrow


def test_the_example_has_a_trie_of_depth_two(monkeypatch):
    pairs = [
        BodyPair(f"module:function{n}", "module", "other", (1, 2, 3, n), (10, 11, 12, 13, 14, 2), (20, 21, 22, 23, 2))
        for n in range(6)
    ]
    monkeypatch.setattr("flexdpo.example.stdlib.read_standard_library", lambda progress=False: None)
    monkeypatch.setattr("flexdpo.example.task.build_task", lambda library, seed: SimpleNamespace(train=pairs))
    groups = example_groups(3)
    assert [len(group.response_ids) for group in groups] == [3, 2, 2]
    assert [ids.tolist() for ids in groups[0].response_ids] == [
        [10, 11, 12, 13, 14, 2],
        [10, 11, 12, 23, 2],
        [20, 21, 22, 23, 2],
    ]
    kinds = [run.kind for run in trie_runs(pack(groups[:1])[0])]
    assert kinds == [PROMPT, SHARED, FIRST_RESPONSE, FIRST_RESPONSE + 1, FIRST_RESPONSE + 2]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[{", r"lengths.json, line 1: not valid JSON"),
        ("[]", r"expected a list of groups such as .* found list \(\[\]\)"),
        ([3], r"group 0 \(counted from 0\): expected a list of groups"),
        ([{"prompt": 3}], r"group 0 .*found dict"),
        ([{"prompt": 3, "responses": 4}], "group 0, 'responses': expected a list of lengths, found int"),
        ([{"prompt": 3, "responses": [[4, 5]]}], r"'responses': expected a length or \[length, \[branches\]\]"),
        ([{"prompt": 0, "responses": [4]}], "'prompt': expected a number of tokens from 1 to 200,000, found int"),
        ([{"prompt": 3, "responses": [4]}, {"prompt": True, "responses": [4]}], "group 1, 'prompt': .*found bool"),
    ],
    ids=str,
)
def test_lengths_that_make_no_sense_are_refused(tmp_path, content, match):
    with pytest.raises(FlexdpoError, match=match):
        read_lengths(write_lengths(tmp_path, content))


def test_missing_lengths_are_refused(tmp_path):
    with pytest.raises(FlexdpoError, match=r"--lengths .*missing.json: No such file"):
        read_lengths(tmp_path / "missing.json")
