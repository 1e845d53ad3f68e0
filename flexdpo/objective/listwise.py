"""Rankings of more than two responses: the Plackett-Luce form of DPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import numbered
from flexdpo.layout.row import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flexdpo.layout.groups import Group


def ranking_of(group: Group) -> tuple[int, ...]:
    """Return the responses of a group from best to worst, as its edges rank them, without those that no edge names.

    Raises ``FlexdpoError`` if the edges contradict each other, or leave the order of two responses open; all pairs of a
    ranking leave nothing open, and neither do its neighbours alone.
    """
    better = {k: {chosen for chosen, rejected in group.edges if rejected == k} for edge in group.edges for k in edge}
    order: list[int] = []
    while better:
        best = [k for k, above in better.items() if not above]
        if not best:
            raise FlexdpoError(
                f"{group.name}: its preferences contradict each other among responses {sorted(better)}, so they are no "
                "ranking; drop one of them, or use a pairwise loss_type"
            )
        if len(best) > 1:
            raise FlexdpoError(
                f"{group.name}: its preferences leave the order of responses {best[0]} and {best[1]} open; "
                "loss_type 'plackett_luce' needs a full ranking, so add the missing preference or use a pairwise one"
            )
        order.append(best[0])
        del better[best[0]]
        for above in better.values():
            above.discard(best[0])
    return tuple(order)


def plackett_luce_loss(ranked_rewards: Tensor) -> Tensor:
    """DPO on a ranking: at every place, the best of the responses that are left must win against all of them.

    ``ranked_rewards``, ``[N, K]``, are the implicit rewards of ``N`` rankings of ``K`` responses, from best to worst.
    Returns ``[N]``; for ``K = 2`` the sigmoid loss. Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 20.
    """
    of_those_left = ranked_rewards.flip(1).logcumsumexp(dim=1).flip(1)
    return (of_those_left - ranked_rewards).sum(dim=1)


def ranked_responses(groups: Sequence[Group], device: torch.device) -> list[Tensor]:
    """Number the responses of some groups by rank, one ``[N, K]`` int64 tensor for each length ``K`` of ranking."""
    by_length: dict[int, list[list[int]]] = {}
    for ranking in ([first + k for k in ranking_of(group)] for group, first in numbered(groups) if group.edges):
        by_length.setdefault(len(ranking), []).append(ranking)
    return [on_device(rankings, torch.int64, device) for rankings in by_length.values()]
