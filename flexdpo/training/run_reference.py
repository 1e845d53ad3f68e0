"""Which model a run holds its policy against, its values before training, and what a checkpoint remembers of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from flexdpo.data.cache import cache_folder
from flexdpo.data.tokenize import group_from_row
from flexdpo.errors import FlexdpoError
from flexdpo.hf.draws import can_run
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.row_dependence import limits_of
from flexdpo.hf.unwrap import base_model, unwrap_model
from flexdpo.reference.cache import ReferenceCache
from flexdpo.reference.fingerprints import settings_fingerprint, weights_sample
from flexdpo.reference.logps import PrecomputeSettings, precompute_reference
from flexdpo.reference.scores import cache_of_scores
from flexdpo.training import adapters, distribution, model_loading
from flexdpo.training.batch import REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from flexdpo.config import DPOConfig
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps
    from flexdpo.training.resumable import ResumableTrainer

ROWS_AT_ONCE = 65_536  # of a dataset, whose tokens are in memory together and so can be brought together


def reference_model(
    policy: nn.Module, given: nn.Module | None, args: DPOConfig, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | None:
    """The frozen model that the policy is held against, or ``None`` where none is needed or the policy is its own."""
    if not args.objective().needs_reference:
        if given is not None:
            raise FlexdpoError(f"loss_type {', '.join(args.loss_type)} uses no reference; leave ref_model out")
        return None
    if given is not None:
        model_loading.require_vocabulary(unwrap_model(given), tokenizer, "reference model")
        prepare_model(given, impl=args.attn_impl)  # type: ignore[arg-type]
        return given.requires_grad_(False).eval()
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
    """What a checkpoint does not hold: settings, weights that stay, and a reference that is not made ``fresh``."""
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
    """TR-DPO: moves the reference towards the policy every ``ref_model_sync_steps`` optimizer steps."""

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


@torch.no_grad()
def mix_into_reference(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Move every weight of the reference to ``alpha * policy + (1 - alpha) * reference``, shard by shard.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, soft update (hard, a copy, for ``alpha = 1``). ``DPOConfig``
    takes no ``alpha`` outside (0, 1].
    """
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


def with_reference(trainer: ResumableTrainer, dataset: Any, name: str) -> Any:
    """Return ``dataset``, or a dict of them, with its reference values as columns; ``None`` comes back as it is."""
    if isinstance(dataset, dict):
        return {key: with_reference(trainer, part, key) for key, part in dataset.items()}
    if dataset is None or REFERENCE_COLUMN in dataset.column_names:
        return dataset
    cache = _filled_cache(trainer, dataset, name)
    alpha = trainer.args.ld_alpha
    dataset = dataset.add_column(REFERENCE_COLUMN, [cache.sums(group_from_row(row)) for row in dataset])
    if alpha is None:
        return dataset
    return dataset.add_column(REFERENCE_PAIR_COLUMN, [cache.pair_sums(group_from_row(row), alpha) for row in dataset])


def _filled_cache(trainer: ResumableTrainer, dataset: Any, name: str) -> ReferenceCache:
    args, accelerator, identity = trainer.args, trainer.accelerator, trainer.reference_identity
    # by the setting, ``FLEXDPO_CACHE``, or a folder beside the hub's cache
    root = Path(args.precompute_ref_cache_dir or cache_folder("reference_logps"))
    if root.suffix == ".parquet":
        return cache_of_scores(root, identity)
    cache = ReferenceCache(identity.folder_in(root), identity)
    settings = PrecomputeSettings(
        max_tokens_per_row=trainer.row_plan.max_tokens_per_row,
        limits=limits_of(trainer.model).limits,
        clusters_per_row=args.precompute_ref_batch_size or args.per_device_train_batch_size,
        pad_to_multiple_of=args.row_multiple,
        with_beginnings=args.ld_alpha is not None,
        device=args.device,
        process_index=args.process_index,
        num_processes=args.world_size,
        # all processes gather a sharded weight together, so all must ask for it equally often
        equal_forwards=distribution.wraps_in_shards(accelerator),
        progress=not args.disable_tqdm,
        description=f"Reference log-probabilities, {name}",
    )

    def run(row: Row) -> ResponseLogps:
        with trainer.compute_loss_context_manager():
            return trainer.reference_logps(row)

    accelerator.wait_for_everyone()
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        part = dataset.select(range(start, min(start + ROWS_AT_ONCE, len(dataset))))
        precompute_reference(cache, [group_from_row(row) for row in part], run, settings)
        accelerator.wait_for_everyone()
        cache.reload()
        # nobody writes the next part's values before all have read this one's
        accelerator.wait_for_everyone()
    return cache
