"""The packed run against one sequence at a time: values and gradients, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from flexdpo import Group, Row, RowLayout

PAD_TO = 16


@dataclass
class Run:
    """Logits of every sequence, ``[L_i, V]`` each, and the gradient of every parameter that has one."""

    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def example_groups(vocabulary: int = 128, *, prompt: int = 14, seed: int = 0) -> list[Group]:
    """Return two documents of two and three responses, longer than any window, two of them with equal beginnings."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        # token ids below 8 are special in some configurations
        return generator.integers(8, vocabulary - 8, count).tolist()

    beginning = tokens(3)
    return [
        Group.from_lists(tokens(prompt), [tokens(11), tokens(13)]),
        Group.from_lists(tokens(prompt - 5), [beginning + tokens(9), tokens(10), beginning + tokens(12)], [(0, 1)]),
    ]


def example_row(vocabulary: int = 128, **kwargs: Any) -> Row:
    return Row.from_groups(example_groups(vocabulary, **kwargs), pad_to_multiple_of=PAD_TO)


def sequence_paths(row: Row) -> list[torch.Tensor]:
    """Row indices of every token of every sequence of a row, prompt included."""
    paths, response = [], 0
    for group, (start, _) in zip(row.groups, row.documents, strict=True):
        prompt = np.arange(start, start + group.prompt_ids.size)
        for _ in group.response_ids:
            paths.append(torch.from_numpy(np.concatenate([prompt, row.response_paths[response]])))
            response += 1
    return paths


def leaking_layout(row: Row) -> RowLayout:
    """Return the row's layout with every token visible to all that follow: responses and documents mix."""
    ends = torch.full_like(row.subtree_end, row.layout.length)
    return RowLayout(row.position_ids, ends, row.layout.num_tokens)


class Float64(TorchFunctionMode):
    """Keeps computations in float64 that models do in float32 whatever comes in, as norms, softmax and rotations.

    Without it a correct packed run differs from the unpacked one by what float32 rounds, about 1e-7.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(_widened(each) for each in args)
        return func(*args, **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _score(logits: list[torch.Tensor]) -> torch.Tensor:
    """Weigh every logit at random, so that its gradient says whether each one depends on what it should."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in logits]
    return torch.stack([(w * each).sum() / each.shape[-1] for w, each in zip(weights, logits, strict=True)]).sum()


def _run(model: Any, logits: list[torch.Tensor]) -> Run:
    model.zero_grad()
    _score(logits).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Run([each.detach() for each in logits], gradients)


def unpacked_run(model: Any, row: Row, **kwargs: Any) -> Run:
    """Run one sequence at a time, with whatever attention the model has."""
    sequences = [torch.from_numpy(sequence) for group in row.groups for sequence in group.sequences]
    return _run(model, [model(input_ids=ids[None], use_cache=False, **kwargs).logits[0] for ids in sequences])


def packed_run(model: Any, row: Row, **kwargs: Any) -> Run:
    logits = model(**{**row.inputs(), **kwargs}).logits[0]
    return _run(model, [logits[path] for path in sequence_paths(row)])


def logit_error(got: Run, want: Run) -> float:
    scale = max(float(each.abs().max()) for each in want.logits)
    return max(float((g - w).abs().max()) for g, w in zip(got.logits, want.logits, strict=True)) / scale


def gradient_error(got: Run, want: Run) -> float:
    """Return the largest error of any parameter's gradient, relative to that gradient's own largest entry.

    A gradient that is zero but for rounding, as a key bias has, is measured against the largest one of the model. A
    parameter without a gradient, as of an expert that no token chose, counts as zero.
    """
    largest = max(float(each.abs().max()) for each in want.gradients.values())
    errors = []
    for name in got.gradients.keys() | want.gradients.keys():
        g, w = got.gradients.get(name, torch.zeros(1)), want.gradients.get(name, torch.zeros(1))
        errors.append(float((g - w).abs().max()) / max(float(w.abs().max()), 1e-3 * largest))
    return max(errors)
