from __future__ import annotations

import pytest
import torch

from flexdpo.layout.row import RowLayout
from flexdpo.mixing.tree_conv import tree_conv1d
from tests.layout.test_segments import parents_by_definition, random_layouts


def conv_by_definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Each token and its ancestors, one tap after the other."""
    tokens, parents = x.transpose(1, 2).flatten(0, 1), parents_by_definition(layout)
    found = []
    for token in range(len(parents)):
        total, above = bias, token
        for tap in reversed(range(weight.shape[1])):
            if above >= 0:
                total = total + weight[:, tap] * tokens[above]
                above = parents[above]
        found.append(total)
    return torch.stack(found).unflatten(0, x.shape[::2]).transpose(1, 2)


@pytest.mark.parametrize("layout", random_layouts()[::5])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_definition(layout: RowLayout, taps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((layout.batch_size, 3, layout.length), (3, taps), (3,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    got, want = tree_conv1d(*inputs, layout), conv_by_definition(*inputs, layout)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for g, w in zip(*(torch.autograd.grad((weights * out).sum(), inputs) for out in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def test_half_precision_is_rounded_once() -> None:
    layout = random_layouts()[0]
    x, weight = torch.randn(1, 3, layout.length).bfloat16(), torch.randn(3, 4).bfloat16()
    got = tree_conv1d(x, weight, None, layout)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, tree_conv1d(x.double(), weight.double(), None, layout).bfloat16())


def test_what_inference_mode_leaves_behind_can_be_trained_with() -> None:
    layout = random_layouts()[1]
    x = torch.randn(1, 3, layout.length, requires_grad=True)
    with torch.inference_mode():
        tree_conv1d(x, torch.ones(3, 4), None, layout)
    tree_conv1d(x, torch.ones(3, 4), None, layout).sum().backward()
