"""What a training run does before its first step: it proves itself on its own first examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.utils import logging

from flexdpo.attention.settings import kernel_settings_as
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.tokenize import group_from_row
from flexdpo.proof.allowance import Allowance
from flexdpo.proof.prove import measure, require_proof
from flexdpo.training import distribution

if TYPE_CHECKING:
    from torch import Tensor

    from flexdpo.layout.row import Row
    from flexdpo.training.batch import PackedBatch
    from flexdpo.training.resumable import ResumableTrainer

logger = logging.get_logger(__name__)

_MOST_EXAMPLES = 4
_LOOKED_AT = 64  # examples, for some of different prompts; a stream has read as many already


class ProofAtStart(TrainerCallback):
    """Runs :func:`flexdpo.proof.prove.measure` when training begins; all processes take the same examples.

    Args:
        trainer: Whose model, data and settings are proved.
        reference_is_policy: Whether the reference must agree with a policy that has not taken a step.
    """

    def __init__(self, trainer: ResumableTrainer, *, reference_is_policy: bool) -> None:
        self.trainer = trainer
        self.reference_is_policy = reference_is_policy

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Prove, log the proof in one line and keep it, or stop with the figures."""
        trainer = self.trainer
        sharded = distribution.wraps_in_shards(trainer.accelerator)
        model = trainer.model_wrapped if sharded else trainer.model
        was_training = model.training
        model.train()
        batches = self._first_batches()
        # nor does it agree where ``train`` is called once more
        compare = self.reference_is_policy and state.global_step == 0 and trainer.proof is None
        precomputed = {
            row: logps
            for batch in batches
            for row, logps in zip(batch.rows, batch.reference or (), strict=batch.reference is not None)
        }

        def reference(row: Row) -> Tensor:
            return (precomputed[row] if row in precomputed else trainer.reference_logps(row)).sums

        # the first examples may need lengths that the batches do not
        with kernel_settings_as(trainer.row_plan.kernels_of_any_length):
            proof = measure(
                model,
                [row for batch in batches for row in batch.rows],
                reference=reference if compare else None,
                reference_runs_the_rows=not precomputed,
                sharded=sharded,
                autocast=trainer.compute_loss_context_manager,
                allowance=self._two_steps(batches, compare and not precomputed),
            )
        if sharded:
            distribution.reshard(model)
        model.train(was_training)
        require_proof(proof, model)
        trainer.proof = proof
        if args.process_index == 0:
            # at a level that transformers shows by default
            logger.warning(proof.line())

    def _two_steps(self, batches: list[PackedBatch], reference_runs: bool) -> Allowance:
        """What two steps of such examples cost."""
        args, trainer = self.trainer.args, self.trainer
        examples = sum(len(row.groups) for batch in batches for row in batch.rows)
        tokens = sum(row.layout.length for batch in batches for row in batch.rows)
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
        learned = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
        # to the activations once, twice where checkpointing runs the forward pass again, and to what is trained
        backward = 2 if args.gradient_checkpointing else 1
        share = learned / sum(weight.numel() for weight in trainer.model.parameters())
        reference = trainer.objective.needs_reference and not args.precompute_ref_log_probs
        step = (1 + backward + share + reference) * tokens * pairs / examples
        return Allowance(2 * step, backward, int(reference_runs))

    def _first_batches(self) -> list[PackedBatch]:
        """The first examples in micro-batches as in training: rows are no longer, and as many documents share one."""
        trainer, args = self.trainer, self.trainer.args
        # half a step's pairs or fewer leave time for most of their sequences unpacked
        half = args.per_device_train_batch_size * args.gradient_accumulation_steps // 2
        # a loss that compares with other examples needs one
        unrelated = trainer.objective.needs_unrelated_responses
        size = max(args.per_device_train_batch_size, 2 if unrelated else 1)
        # one example alone would not show that the documents of a row keep apart
        count = max(min(size, 2), min(_MOST_EXAMPLES, half))
        data = trainer.train_dataset
        if isinstance(data, StreamedPreferences):
            data = data.sample(_LOOKED_AT if unrelated else count)
        # rows of one prompt often stand side by side, and training shuffles them
        chosen = _of_different_prompts(data, count) if unrelated else list(range(min(count, len(data))))
        count = len(chosen)
        if count > size:
            count -= count % size  # whole ones
        micro_batches = [chosen[start : min(start + size, count)] for start in range(0, count, size)]
        collated = [trainer.data_collator([data[index] for index in indices]) for indices in micro_batches]
        return [each["batch"].to(args.device) for each in collated]


def _of_different_prompts(data: Any, count: int) -> list[int]:
    """The first examples of so many different prompts, or of fewer among those that are looked at."""
    chosen: dict[bytes, int] = {}
    for index in range(min(_LOOKED_AT, len(data))):
        chosen.setdefault(group_from_row(data[index]).prompt_key, index)
        if len(chosen) == count:
            break
    return list(chosen.values())
