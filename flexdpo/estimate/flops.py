"""How many multiplications a step needs, and so how much faster it could at best become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexdpo.attention.block_masks import classify_tiles
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.layout.row import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row
    from flexdpo.training.model_size import ModelSize


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model, whatever the model is."""

    tokens: int  # that go through the linear layers
    scores: int  # query-key pairs per head, by whole tiles
    targets: int  # positions whose logits are computed

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.scores + other.scores, self.targets + other.targets)

    def forward_flops(self, shape: ModelSize) -> float:
        """Floating-point operations of one forward pass."""
        linear, attention, head = self._parts(shape)
        return linear + attention + head

    def training_flops(
        self, shape: ModelSize, *, checkpointing: bool, keep_attention: bool = False, head_passes: int
    ) -> float:
        """Floating-point operations of one forward and backward pass.

        Args:
            shape: The model.
            checkpointing: Whether the layers run forward a second time.
            keep_attention: Whether they do so without their attention.
            head_passes: 3 where logits are kept for the backward pass, 4 where they are computed again.
        """
        linear, attention, head = self._parts(shape)
        again = 1 if checkpointing else 0
        # fused attention computes its scores again in the backward pass: five products where the forward has two
        attended_again = 0 if keep_attention else again
        return (3 + again) * linear + (3.5 + attended_again) * attention + head_passes * head

    def _parts(self, shape: ModelSize) -> tuple[float, float, float]:
        linear = 2.0 * (shape.layer_parameters + shape.scan_products) * self.tokens
        attention = 4.0 * shape.attending * shape.heads * shape.head_dim * self.scores
        head = 2.0 * shape.hidden * shape.vocabulary * self.targets
        return linear, attention, head


def row_work(row: Row) -> Work:
    """The work of one packed row, its padding not counted."""
    tiles = classify_tiles(row.layout, CAUSAL, TILE)
    # a padding tile holds nothing but padding that sees itself
    real = -(-row.num_tokens // TILE)
    scores = int(tiles.non_empty[:, :real, :real].sum()) * TILE**2
    return Work(row.num_tokens, scores, int(row.predictors.numel()))


def padded_work(groups: Sequence[Group], *, labels_only: bool = False) -> Work:
    """The work of pairs as one padded batch: every sequence as long as the longest, logits everywhere or at labels."""
    longest = max(len(ids) for group in groups for ids in group.sequences)
    sequences = sum(len(group.response_ids) for group in groups)
    tiles = -(-longest // TILE)
    scores = tiles * (tiles + 1) // 2 * TILE**2
    targets = sum(ids.size for group in groups for ids in group.response_ids) if labels_only else sequences * longest
    return Work(sequences * longest, sequences * scores, targets)
