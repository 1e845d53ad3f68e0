"""What the head costs on a GPU by arithmetic: products and bytes of one pass, counted on meta tensors, nothing timed.

``python -m flexdpo.bench.lm_head notebooks/results/head-h100.json`` writes the committed result.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexdpo.objective.linear_logps import IDENTITY, LogitTransform, linear_logps


@dataclass(frozen=True)
class Card:
    """What a GPU can do at best."""

    name: str
    flops: float  # of dense bfloat16 products, per second, as measured on large matrices
    bandwidth: float  # of its memory, bytes per second


H100 = Card("H100 SXM", 798e12, 3.35e12)


@dataclass(frozen=True)
class HeadSize:
    """The pass that is counted."""

    targets: int = 8192
    vocabulary: int = 128_256
    hidden: int = 4096


_PRODUCTS = ("mm", "addmm")
# torch's kernels that go over their input more than once: passes beyond reading each input and writing the output once
_MORE_PASSES = {"log_softmax": 2, "_log_softmax": 2, "_softmax": 2, "logsumexp": 5}
# they touch as many elements as they have indices, not all of their input
_BY_INDEX = ("gather", "scatter", "scatter_", "index", "index_put", "index_put_", "index_add", "index_add_")


@dataclass
class CountWork(TorchDispatchMode):
    """Counts products and bytes of every operation under it; views and allocations are free."""

    card: Card
    product_seconds: float = 0.0  # each product at the slower of its multiplications and its bytes
    moved: Counter[str] = field(default_factory=Counter)  # bytes of everything else by operation
    launches: int = 0  # kernels, products included

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def seconds(self) -> float:
        """Everything, one kernel after the other, at the card's full speed."""
        return self.product_seconds + sum(self.moved.values()) / self.card.bandwidth

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.split("::")[1]
        written = any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)
        returns_view = any(result.alias_info is not None for result in schema.returns) and not written
        if returns_view or name.startswith(("empty", "new_empty")):
            return output
        self.launches += 1
        given = {name: value for name, value in kwargs.items() if name != "out"}
        inputs, outputs = _tensors((args, given)), _tensors(output)
        if name in _PRODUCTS:
            left, right = inputs[-2:]
            flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
            # addmm reads what it adds to
            read = inputs[-2:] if kwargs.get("beta") == 0 else inputs
            moved = sum(map(_bytes, read)) + sum(map(_bytes, outputs))
            self.product_seconds += max(flops / self.card.flops, moved / self.card.bandwidth)
        elif name in _BY_INDEX:
            # the indices are read, and as many elements are read and written
            indices = max((x for x in inputs if x.dtype == torch.int64), key=torch.Tensor.numel)
            self.moved[name] += indices.numel() * (8 + 2 * inputs[0].element_size())
        else:
            # what is written in place is among the inputs, so it counts as read and as written
            if name == "copy_":
                inputs = inputs[1:]
            elif name.startswith("new_"):
                inputs = []
            self.moved[name] += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
            self.moved[name] += _MORE_PASSES.get(name, 0) * sum(map(_bytes, inputs))
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(x: torch.Tensor) -> int:
    """Memory that a tensor covers; an expanded dimension covers no more than one of its elements."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def count_head(size: HeadSize = HeadSize(), card: Card = H100, transform: LogitTransform = IDENTITY) -> dict[str, Any]:
    """Count one forward and backward pass of the head in bfloat16, weight and hidden states trained.

    Returns:
        ``ideal_seconds`` of the four products (logits, logits again, two gradients) at the card's full speed,
        ``product_seconds`` as they are made, ``other_bytes`` that everything else reads and writes (``moved``, by
        operation), ``seconds`` in all, ``launches`` of kernels, and the ``efficiency``, the share of full speed.
    """
    with torch.device("meta"):
        states = torch.empty(size.targets, size.hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(size.vocabulary, size.hidden, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(size.targets, dtype=torch.int64)
        with CountWork(card) as count:
            logps = linear_logps(states, weight, None, labels, transform=transform).logps
            logps.backward(torch.empty_like(logps))
    ideal = 8.0 * size.targets * size.vocabulary * size.hidden / card.flops
    return {
        "ideal_seconds": ideal,
        "product_seconds": count.product_seconds,
        "other_bytes": count.moved.total(),
        "seconds": count.seconds,
        "moved": {name: moved for name, moved in count.moved.most_common() if moved},
        "launches": count.launches,
        "efficiency": ideal / count.seconds,
    }


def result(size: HeadSize = HeadSize()) -> dict[str, Any]:
    """What the result file says."""
    from flexdpo import __version__

    return {
        "kind": "head counted",
        "card": asdict(H100),
        "size": asdict(size),
        "dtype": "bfloat16",
        "versions": {"flexdpo": __version__, "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **count_head(size),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")
