"""What a training run does before its first step: it proves itself on its own first examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.utils import logging

from flexdpo.attention.settings import kernel_settings_as
from flexdpo.proof.prove import measure, require_proof
from flexdpo.training import distribution
from flexdpo.training.streaming import StreamedPreferences

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.row import Row
    from flexdpo.training.step import PackedBatch
    from flexdpo.training.trainer import DPOTrainer

logger = logging.get_logger(__name__)

_MOST_EXAMPLES = 4


class ProofAtStart(TrainerCallback):
    """Runs :func:`flexdpo.proof.prove.measure` when training begins; all processes take the same examples.

    Args:
        trainer: Whose model, data and settings are proved.
        reference_is_policy: Whether the reference must agree with a policy that has not taken a step.
    """

    def __init__(self, trainer: DPOTrainer, *, reference_is_policy: bool) -> None:
        self.trainer = trainer
        self.reference_is_policy = reference_is_policy

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Prove, log the proof in one line and keep it, or stop with the figures."""
        trainer = self.trainer
        sharded = distribution.is_sharded(args)
        model = trainer.model_wrapped if sharded else trainer.model
        was_training = model.training
        model.train()
        batch = self._first_batch()
        compare = self.reference_is_policy and state.global_step == 0

        def reference(row: Row) -> Tensor:
            if batch.reference is not None:
                return batch.reference[batch.rows.index(row)].sums
            return trainer.reference_logps(row).sums

        # the first examples may need lengths that the batches do not
        with kernel_settings_as(trainer.row_plan.kernels_of_any_length):
            proof = measure(
                model,
                batch.rows,
                reference=reference if compare else None,
                with_gradients=not sharded,
                autocast=trainer.compute_loss_context_manager,
            )
        model.train(was_training)
        require_proof(proof, model)
        trainer.proof = proof
        if args.process_index == 0:
            # at a level that transformers shows by default
            logger.warning(proof.line())

    def _first_batch(self) -> PackedBatch:
        trainer, args = self.trainer, self.trainer.args
        # half a step's pairs or fewer: all passes of the proof together then cost less than two steps
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
        # a loss that compares with other examples needs one
        fewest = 2 if trainer.objective.needs_unrelated_responses else 1
        count = max(fewest, min(_MOST_EXAMPLES, pairs // 2))
        data = trainer.train_dataset
        if isinstance(data, StreamedPreferences):
            data = data.sample(count)
        collated = trainer.data_collator([data[index] for index in range(min(count, len(data)))])
        batch: PackedBatch = collated["batch"].to(args.device)
        return batch
