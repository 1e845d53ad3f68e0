"""Reference log-probabilities of whole datasets before training: from the cache, or through the model into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.data.cache import cache_folder
from flexdpo.data.tokenize import group_from_row
from flexdpo.reference.cache import ReferenceCache, ReferenceIdentity
from flexdpo.reference.logps import PrecomputeSettings, precompute_reference
from flexdpo.reference.scores import cache_of_scores
from flexdpo.training import distribution
from flexdpo.training.batch import REFERENCE_COLUMN, REFERENCE_PAIR_COLUMN

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flexdpo.config import DPOConfig
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps


@dataclass(frozen=True)
class Precompute:
    """Computes the reference values of datasets and adds them as columns."""

    config: DPOConfig
    accelerator: Accelerator
    run: Callable[[Row], ResponseLogps]
    identity: ReferenceIdentity  # whose values they are
    max_tokens_per_row: int | None
    limits: tuple[int, ...] = ()
    rows_at_once: int = 65_536  # of the dataset, whose tokens are in memory together and so can be brought together

    def add_columns(self, dataset: Any, name: str) -> Any:
        """Return ``dataset`` with its reference values; one that has them, and ``None``, comes back as it is."""
        if dataset is None or REFERENCE_COLUMN in dataset.column_names:
            return dataset
        # by the setting, ``FLEXDPO_CACHE``, or a folder beside the hub's cache
        root = Path(self.config.precompute_ref_cache_dir or cache_folder("reference_logps"))
        if root.suffix == ".parquet":
            return self._with_values(dataset, cache_of_scores(root, self.identity))
        cache = ReferenceCache(self.identity.folder_in(root), self.identity)
        self.accelerator.wait_for_everyone()
        for start in range(0, len(dataset), self.rows_at_once):
            part = dataset.select(range(start, min(start + self.rows_at_once, len(dataset))))
            precompute_reference(cache, [group_from_row(row) for row in part], self.run, self._settings(name))
            self.accelerator.wait_for_everyone()
            cache.reload()
            # nobody writes the next part's values before all have read this one's
            self.accelerator.wait_for_everyone()
        return self._with_values(dataset, cache)

    def _with_values(self, dataset: Any, cache: ReferenceCache) -> Any:
        dataset = dataset.add_column(REFERENCE_COLUMN, [cache.sums(group_from_row(row)) for row in dataset])
        ld_alpha = self.config.ld_alpha
        if ld_alpha is not None:
            pairs = [cache.pair_sums(group_from_row(row), ld_alpha) for row in dataset]
            dataset = dataset.add_column(REFERENCE_PAIR_COLUMN, pairs)
        return dataset

    def _settings(self, name: str) -> PrecomputeSettings:
        config = self.config
        return PrecomputeSettings(
            max_tokens_per_row=self.max_tokens_per_row,
            limits=self.limits,
            clusters_per_row=config.precompute_ref_batch_size or config.per_device_train_batch_size,
            pad_to_multiple_of=config.row_multiple,
            with_beginnings=config.ld_alpha is not None,
            device=config.device,
            process_index=config.process_index,
            num_processes=config.world_size,
            # all processes gather a sharded weight together, so all must ask for it equally often
            equal_forwards=distribution.wraps_in_shards(self.accelerator),
            progress=not config.disable_tqdm,
            description=f"Reference log-probabilities, {name}",
        )
