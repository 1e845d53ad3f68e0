import numpy as np
import pytest
import torch

from flexdpo import Row
from flexdpo.attention.mask_mods import CAUSAL, MaskKind, mask_mod_for
from tests.conftest import odd_groups
from tests.oracle import dense_mask


def branch_mask(row: Row, allowed) -> torch.Tensor:
    """Token q sees kv if some sequence holds both, kv not after q, and their positions in it are allowed."""
    length = row.layout.length
    mask = torch.eye(length, dtype=torch.bool)
    for start, path in sequences(row):
        whole = [*start, *path]
        for i, q in enumerate(whole):
            for j, kv in enumerate(whole[: i + 1]):
                mask[q, kv] = allowed(i, j)
    return mask


def sequences(row: Row):
    paths = iter(row.response_paths)
    for (begin, _), group in zip(row.documents, row.groups, strict=True):
        for _ in group.response_ids:
            yield range(begin, begin + len(group.prompt_ids)), next(paths)


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        (CAUSAL, lambda i, j: True),
        (MaskKind("sliding", 4), lambda i, j: i - j < 4),
        (MaskKind("chunked", 4), lambda i, j: i // 4 == j // 4),
        (MaskKind("other", function=lambda b, h, q, kv: (q - kv) % 3 != 1), lambda i, j: (i - j) % 3 != 1),
    ],
)
def test_masks_follow_branches_and_logical_positions(rng: np.random.Generator, kind: MaskKind, allowed) -> None:
    row = Row.from_groups(odd_groups(rng), pad_to_multiple_of=16)
    mask = dense_mask(mask_mod_for(row.layout, kind), 1, row.layout.length)[0]
    torch.testing.assert_close(mask, branch_mask(row, allowed))


def test_a_window_on_row_indices_would_be_another_mask(rng: np.random.Generator) -> None:
    row = Row.from_groups(odd_groups(rng))
    right = dense_mask(mask_mod_for(row.layout, MaskKind("sliding", 4)), 1, row.layout.length)[0]
    index = torch.arange(row.layout.length)
    tree = dense_mask(mask_mod_for(row.layout, CAUSAL), 1, row.layout.length)[0]
    assert not torch.equal(right, tree & (index[:, None] - index[None, :] < 4))
