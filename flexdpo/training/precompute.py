"""Reference log-probabilities of whole datasets before training: from the cache, or through the model into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType

from flexdpo.data.cache import cache_folder
from flexdpo.data.tokenize import group_from_row
from flexdpo.reference.cache import ReferenceCache, ReferenceIdentity
from flexdpo.reference.logps import PrecomputeSettings, precompute_reference
from flexdpo.training.batch import REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flexdpo.config import DPOConfig
    from flexdpo.layout.groups import Group
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps


def cache_root(config: DPOConfig) -> Path:
    """Where reference values are kept: the setting, ``FLEXDPO_CACHE``, or a folder beside the hub's cache."""
    if config.precompute_ref_cache_dir is not None:
        return Path(config.precompute_ref_cache_dir)
    return cache_folder("reference_logps")


# all processes gather a sharded weight together, so all must ask for it equally often
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass(frozen=True)
class Precompute:
    """Computes the reference values of datasets and adds them as columns.

    Attributes:
        model: Fingerprint of the reference's weights, adapter included.
        tokenizer: Fingerprint of the tokenizer.
        rows_at_once: Rows of the dataset whose tokens are in memory together, and so can be brought together.
    """

    config: DPOConfig
    accelerator: Accelerator
    run: Callable[[Row], ResponseLogps]
    model: str
    tokenizer: str
    max_tokens_per_row: int | None
    limits: tuple[int, ...] = ()
    rows_at_once: int = 65_536

    def add_columns(self, dataset: Any, name: str) -> Any:
        """Return ``dataset`` with its reference values; one that has them, and ``None``, comes back as it is."""
        if dataset is None or REFERENCE_COLUMN in dataset.column_names:
            return dataset
        cache = self._open_cache()
        for start in range(0, len(dataset), self.rows_at_once):
            part = dataset.select(range(start, min(start + self.rows_at_once, len(dataset))))
            self._fill(cache, [group_from_row(row) for row in part], name)
        dataset = dataset.add_column(REFERENCE_COLUMN, [cache.sums(group_from_row(row)) for row in dataset])
        ld_alpha = self.config.ld_alpha
        if ld_alpha is not None:
            pairs = [cache.pair_sums(group_from_row(row), ld_alpha) for row in dataset]
            dataset = dataset.add_column(REFERENCE_PAIR_COLUMN, pairs)
        return dataset

    def _fill(self, cache: ReferenceCache, groups: list[Group], name: str) -> None:
        config = self.config
        settings = PrecomputeSettings(
            max_tokens_per_row=self.max_tokens_per_row,
            limits=self.limits,
            clusters_per_row=config.precompute_ref_batch_size or config.per_device_train_batch_size,
            pad_to_multiple_of=config.row_multiple,
            with_beginnings=config.ld_alpha is not None,
            device=config.device,
            process_index=config.process_index,
            num_processes=config.world_size,
            equal_forwards=self.accelerator.distributed_type in _SHARDED,
            progress=not config.disable_tqdm,
            description=f"Reference log-probabilities, {name}",
        )
        precompute_reference(cache, groups, self.run, settings)
        self.accelerator.wait_for_everyone()
        cache.reload()
        # nobody writes the next part's values before all have read this one's
        self.accelerator.wait_for_everyone()

    def _open_cache(self) -> ReferenceCache:
        # values of another precision are other values; lengths need not be named, for tokens name themselves
        precision = str(self.accelerator.mixed_precision)
        identity = ReferenceIdentity(self.model, self.tokenizer, (("mixed_precision", precision),))
        cache = ReferenceCache(identity.folder_in(cache_root(self.config)), identity)
        self.accelerator.wait_for_everyone()
        return cache
