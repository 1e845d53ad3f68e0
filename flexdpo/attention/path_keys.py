"""Keys and values that one piece of a row keeps for the pieces behind it, and the gradients that come back to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexdpo.errors import UnsupportedModelError


class _Heads(NamedTuple):
    """Keys and values of one attention module, ``[1, Hkv, S, D]`` and ``[1, Hkv, S, Dv]``."""

    key: Tensor
    value: Tensor


class PathKeys:
    """Keys and values of one piece, by attention module.

    Each pair is kept twice: as the piece's graph made it, and cut off from that graph. Those that run against the
    latter add their gradients up there, and the graph runs backwards once, from all of it.
    """

    def __init__(self) -> None:
        self._made: dict[nn.Module, _Heads] = {}
        self._cut_off: dict[nn.Module, _Heads] = {}

    def behind_path(
        self, module: nn.Module, key: Tensor, value: Tensor, path: Sequence[PathKeys]
    ) -> tuple[Tensor, Tensor]:
        """Keep what a module made of its own tokens, and return it behind what it made of those on the path.

        Raises ``UnsupportedModelError`` if the module attends twice in one forward pass.
        """
        # what a checkpoint runs again, in a backward pass, is what was kept
        again = torch._C._current_graph_task_id() != -1
        if module in self._made and not again:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends several times in one forward pass, so its keys cannot be kept for "
                "the pieces of a row; raise max_tokens_per_row so that the longest example fits into one row"
            )
        if module not in self._made:
            self._made[module] = made = _Heads(key, value)
            self._cut_off[module] = _Heads(*(x.detach().requires_grad_(x.requires_grad) for x in made))
        if not path:
            return key, value
        keys, values = zip(*(each._cut_off[module] for each in path), strict=True)
        return torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the piece's graph runs backwards from besides its own targets, and the gradients there."""
        pairs = [
            (made, cut_off.grad)
            for module, both in self._made.items()
            for made, cut_off in zip(both, self._cut_off[module], strict=True)
            if cut_off.grad is not None
        ]
        return [made for made, _ in pairs], [gradient for _, gradient in pairs]
