"""The load-balancing loss of mixtures of experts, over the rows of a batch as over the padded batch.

The loss multiplies the share of tokens that each expert got with the mean probability that it was given, both over the
whole batch. So the rows of a batch cannot be taken one by one: the routers' logits of all rows come first, without
gradients, and then each row runs again with its own, whose gradient in the whole batch's loss is exact.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from flexdpo.errors import FlexdpoError
from flexdpo.hf.unwrap import base_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from flexdpo.layout.row import Row


@dataclass(eq=False)
class Routed:
    """What one forward pass said of its routers; filled when it is done."""

    aux_loss: Tensor | None = None  # the model's own load-balancing loss of this pass, a scalar
    logits: tuple[Tensor, ...] = ()  # logits of each layer's router, ``[S, experts]`` each


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model, times a coefficient."""

    base: Any  # the Hugging Face model, whose forward gives the loss of one row
    coefficient: float  # weight of the loss
    _reproduces: list[bool] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, coefficient: float | None) -> RouterLoss | None:
        """The loss of a model, or ``None`` where it has none or the coefficient is 0.

        A coefficient of ``None`` is the config's ``router_aux_loss_coef``, as in TRL.

        Raises ``FlexdpoError`` if a coefficient is given for a model without routers, or it is negative.
        """
        base = base_model(model)
        config = base.config.get_text_config()
        has_routers = hasattr(config, "output_router_logits")
        if coefficient is not None and coefficient < 0:
            raise FlexdpoError(f"router_aux_loss_coef must not be negative, got {coefficient}")
        if coefficient and not has_routers:
            raise FlexdpoError(
                f"router_aux_loss_coef={coefficient}: {type(base).__name__} returns no router logits, so it has no "
                "load-balancing loss; leave it out"
            )
        weight = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        return cls(base, float(weight)) if has_routers and weight else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Routed]:
        """Ask a forward pass in the block for its routers' logits."""
        routed = Routed()

        def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
            return args, {**kwargs, "output_router_logits": True}

        def take(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            routed.aux_loss = output.aux_loss if isinstance(output.aux_loss, torch.Tensor) else None
            logits = output.router_logits or ()
            routed.logits = tuple(rearrange(each, "... e -> (...) e") for each in logits if each is not None)

        handles = (
            # before the hook that takes the layout out, which weighs tokens where routers are asked for
            self.base.register_forward_pre_hook(ask, with_kwargs=True, prepend=True),
            self.base.register_forward_hook(take),
        )
        try:
            yield routed
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, passes: Sequence[Routed], rows: Sequence[Row]) -> Tensor:
        """The loss of all rows of a batch, with gradients in those logits that have any."""
        own = passes[0].aux_loss
        if own is None:
            raise FlexdpoError(
                f"{type(self.base).__name__} returned no load-balancing loss in this version of transformers; set "
                "router_aux_loss_coef=0 to train without it"
            )
        own = self.coefficient * own
        if len(rows) == 1:
            return own
        if not self._reproduces:
            # asked once: the model's own function, on one row, against what its forward returned
            alone = self._function([passes[0].logits], rows[:1])
            self._reproduces.append(alone is not None and torch.allclose(alone, own.detach(), rtol=1e-3))
        total = self._function([each.logits for each in passes], rows) if self._reproduces[0] else None
        if total is None:
            raise FlexdpoError(
                f"the load-balancing loss of {type(self.base).__name__} can be computed for whole batches only; leave "
                "max_tokens_per_row out, or set router_aux_loss_coef=0 to train without it"
            )
        return total

    def _function(self, logits: Sequence[tuple[Tensor, ...]], rows: Sequence[Row]) -> Tensor | None:
        # FSDP2 gives the model a class of its own over that of transformers
        modules = [sys.modules[each.__module__] for each in type(self.base).__mro__]
        functions = [getattr(module, "load_balancing_loss_func", None) for module in modules]
        function: Callable[..., Any] | None = next((each for each in functions if each is not None), None)
        experts, top_k = (getattr(self.base, name, None) for name in ("num_experts", "num_experts_per_tok"))
        if function is None or experts is None or top_k is None:
            return None
        weights = [row.layout.multiplicity for row in rows]
        if any(weight is None for weight in weights):
            return None
        layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
        counted = torch.cat([weight[0] for weight in weights if weight is not None])
        loss: Tensor = function(layers, experts, top_k, counted[None])
        return self.coefficient * loss
