"""Several processes: sharded references, gradients held back until the last row, and equal numbers of passes."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import TrainingArguments


def wraps_in_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed runs the models that were prepared, by whatever way it was asked for."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def runs_in_step(accelerator: Accelerator) -> bool:
    """Whether all processes must run equal numbers of passes: they gather weights together, or reduce in each pass."""
    return wraps_in_shards(accelerator) and accelerator.num_processes > 1


def shards_of(args: TrainingArguments) -> dict[str, int]:
    """Over how many processes a run spreads what, as :class:`~flexdpo.training.memory.TrainingSetup` takes it."""
    # FSDP and ZeRO-3 spread all, ZeRO-1 and -2 the optimizer's states
    stage = 3 if is_sharded(args) else 0
    if args.deepspeed_plugin is not None:
        stage = int(args.deepspeed_plugin.hf_ds_config.get_value("zero_optimization.stage", 0))
    return {"shards": args.world_size if stage == 3 else 1, "optimizer_shards": args.world_size if stage > 0 else 1}


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed will run the model, asked for in the settings or by ``accelerate launch``."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or args.deepspeed_plugin is not None
    return bool(args.fsdp or args.deepspeed or launched)


def largest(device: torch.device, value: int) -> int:
    """The largest of the numbers that all processes give, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    number = torch.tensor(value, device=device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number)


@contextlib.contextmanager
def held_gradients(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Add to the gradients of this process alone, as for every row but a step's last."""
    if not accelerator.sync_gradients:
        yield  # gradient accumulation holds them back already
        return
    # DeepSpeed takes its optimizer step in the backward pass, so it must be told too
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def hooks_of(accelerator: Accelerator) -> dict[str, Any]:
    """What a :class:`~flexdpo.training.step.Runner` asks of the other processes, and of mixed precision."""
    return {
        "backward": accelerator.backward,
        "no_sync": lambda model: held_gradients(accelerator, model),
        "autocast": accelerator.autocast,
        "average": lambda value: accelerator.reduce(value, reduction="mean"),
        "agree": (lambda number: largest(accelerator.device, number)) if runs_in_step(accelerator) else None,
    }


def require_supported(accelerator: Accelerator, model: nn.Module, *, images: bool = False) -> None:
    """Refuse what cuts a row or a weight in pieces that no process has whole; ``images`` if data may hold some.

    FSDP of the first version keeps flat parameters, with no head that could be used directly.
    """
    parallel = getattr(accelerator, "parallelism_config", None)
    for name, kind in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if getattr(parallel, f"{name}_enabled", False):
            raise FlexdpoError(
                f"{kind} parallelism ({name}_size={getattr(parallel, f'{name}_size')}) is not supported: a row's mask "
                "and log-probabilities need it whole; use data parallelism (DDP, FSDP2, DeepSpeed)"
            )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise FlexdpoError(
            "the model was spread over the processes when it was loaded (distributed_config), so its reference would "
            "not be; load it without, and set fsdp=True to spread both"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise FlexdpoError("FSDP version 1 is not supported; set fsdp_config={'version': 2} (FSDP2)")
    if images and runs_in_step(accelerator):
        # a process that has no row of its own for the last pass runs text, and its tower takes no part
        raise FlexdpoError(
            "a processor was given for images, and FSDP or DeepSpeed on several processes would leave the gradients of "
            "what encodes them out of a step whose last row has none; use DDP, or a tokenizer for text alone"
        )


def place_reference(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a frozen reference model where the policy will be: on the device, sharded under FSDP2 and DeepSpeed."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed

        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        # an engine that only looks: ZeRO-3 shards its weights like the policy's, the lower stages have nothing to shard
        for training_only in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
            config.pop(training_only, None)
        config["train_micro_batch_size_per_gpu"] = 1
        config["zero_optimization"].pop("offload_optimizer", None)
        if config["zero_optimization"]["stage"] != 3:
            config["zero_optimization"] = {"stage": 0}
        engine = deepspeed.initialize(model=reference, config=config)[0]
        engine.eval()  # which returns nothing
        return engine  # type: ignore[no-any-return]
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare_model(reference, evaluation_mode=True)  # type: ignore[no-any-return]
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
    }
    # layer by layer, so that only one layer's weights are ever whole
    layers = set(getattr(reference, "_no_split_modules", None) or ())
    for module in [part for part in reference.modules() if type(part).__name__ in layers]:
        fully_shard(module, **options)
    fully_shard(reference, **options)
    return reference.eval()


def gathered(parameters: list[nn.Parameter], **options: Any) -> contextlib.AbstractContextManager[Any]:
    """Bring weights that ZeRO-3 has spread together for a moment; with ``modifier_rank=0``, what is written stays."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, **options)  # type: ignore[no-any-return]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Put FSDP2's outermost weights back into shards, which a forward pass leaves whole."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
