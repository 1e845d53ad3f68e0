"""A reference that follows the policy slowly (TR-DPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.hf.unwrap import base_model

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def mix_into_reference(reference: nn.Module, policy: nn.Module, alpha: float = 0.6) -> None:
    """Move every weight of the reference towards the policy's: ``alpha * policy + (1 - alpha) * reference``.

    Sharded weights (FSDP2) are mixed shard by shard, so both models must be sharded alike.

    ``alpha`` is in ``(0, 1]``; 1 copies the policy (a hard update).

    Raises ``FlexdpoError`` if ``alpha`` is out of range or the models' weights do not match.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, soft update (hard for ``alpha = 1``).
    """
    if not 0 < alpha <= 1:
        raise FlexdpoError(f"ref_model_mixup_alpha must be in (0, 1], got {alpha}")
    sources = dict(base_model(policy).named_parameters())
    targets = dict(base_model(reference).named_parameters())
    if sources.keys() != targets.keys():
        name = sorted(sources.keys() ^ targets.keys())[0]
        raise FlexdpoError(f"the reference cannot follow the policy: only one of them has the weight {name!r}")
    for name, target in targets.items():
        source = sources[name].detach()
        if source.shape != target.shape:
            raise FlexdpoError(
                f"the reference cannot follow the policy: weight {name!r} is {list(target.shape)} in the reference and "
                f"{list(source.shape)} in the policy"
            )
        target.lerp_(source.to(target.dtype), alpha)
