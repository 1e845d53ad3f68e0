"""Which model a run holds its policy against, and what a checkpoint remembers of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import can_run
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.unwrap import unwrap_model
from flexdpo.reference.fingerprints import settings_fingerprint, weights_sample
from flexdpo.reference.sync import mix_into_reference
from flexdpo.training import adapters, distribution, model_loading

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from flexdpo.config import DPOConfig


def reference_model(
    policy: nn.Module, given: nn.Module | None, args: DPOConfig, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | None:
    """The frozen model that the policy is held against: the one given, or a copy of the policy as it is now.

    ``None`` where the loss needs none, and where the policy itself gives the values: an adapter's, brought back to its
    first weights, and one whose reference is precomputed before its first step.
    """
    objective = args.objective()
    if not objective.needs_reference:
        if given is not None:
            raise FlexdpoError(f"loss_type {', '.join(args.loss_type)} uses no reference; leave ref_model out")
        return None
    if given is not None:
        model_loading.require_vocabulary(unwrap_model(given), tokenizer, "reference model")
        prepare_model(given, impl=args.attn_impl)  # type: ignore[arg-type]
        given.requires_grad_(False)
        evaluated: nn.Module = given.eval()
        return evaluated
    sharded = distribution.is_sharded(args)
    if adapters.is_peft_model(policy):
        if sharded and args.precompute_ref_log_probs:
            raise FlexdpoError(
                "precompute_ref_log_probs with an adapter would run the whole model in every process before it is "
                "sharded; leave it out, an adapter's reference takes no memory"
            )
        return None
    return None if args.precompute_ref_log_probs and not sharded else model_loading.frozen_copy(policy)


def fingerprints(model: nn.Module, reference: nn.Module | None, args: DPOConfig, *, fresh: bool) -> dict[str, str]:
    """What a checkpoint does not hold itself, for its record: settings, weights that stay, and the reference.

    Before the policy's weights are moved, wrapped or sharded. With ``fresh``, its adapter was made for this run, and so
    is no reference to come back to.
    """
    parts = [part for part in (model, reference) if part is not None]
    if not all(map(can_run, parts)) or args.process_index > 0:
        # the first process has the weights, and looks at the record for all
        return {}
    found = {"model settings": settings_fingerprint(model), "frozen weights": weights_sample(model, trainable=False)}
    if args.objective().needs_reference and not fresh:
        kept = model if reference is None else reference
        found["reference weights"] = weights_sample(kept, trainable=True)
    return found


class SyncReference(TrainerCallback):
    """TR-DPO: moves the reference towards the policy every ``ref_model_sync_steps`` optimizer steps.

    Raises ``FlexdpoError`` if there is no reference, or its weights are spread over processes.
    """

    def __init__(self, reference: nn.Module | None) -> None:
        if reference is None:
            raise FlexdpoError(
                "sync_ref_model needs a reference model of its own, and a model with an adapter has none; leave "
                "sync_ref_model or peft_config out"
            )
        if any(hasattr(parameter, "ds_id") for parameter in reference.parameters()):
            raise FlexdpoError(
                "sync_ref_model cannot move a reference that ZeRO-3 has spread over the processes; use FSDP2 or ZeRO-2"
            )
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Move it, at every so many steps."""
        if state.global_step % args.ref_model_sync_steps == 0:
            mix_into_reference(self.reference, model, args.ref_model_mixup_alpha)
