"""``Trainer`` with checkpoints that are complete or none, and that only the run they came from goes on from."""

from __future__ import annotations

from copy import copy
from dataclasses import MISSING, fields
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from flexdpo.data.draft import TOKENISED_COLUMNS
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.workers import plain_worker_errors
from flexdpo.errors import FlexdpoError, first_line, found
from flexdpo.training import checkpoints
from flexdpo.training.checkpoints import RECORD_FILE, data_digest, plain_write_errors, run_record
from flexdpo.training.finite import require_finite_weights
from flexdpo.training.model_card import model_card
from flexdpo.training.model_loading import require_own
from flexdpo.training.output_lock import holding_output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from flexdpo.data.report import DataReport
    from flexdpo.layout.row import Row
    from flexdpo.objective.logps import ResponseLogps
    from flexdpo.objective.objective import Objective
    from flexdpo.proof.prove import Proof
    from flexdpo.reference.cache import ReferenceIdentity
    from flexdpo.training.finite import StepGuard
    from flexdpo.training.run_data import RowPlan

logger = logging.get_logger(__name__)
# how the log calls what is counted
LOGGED = {
    "run": "tokens/run",
    "unshared": "tokens/unshared",
    "images": "images/run",
    "images_unshared": "images/unshared",
}


class ResumableTrainer(Trainer):
    """The part of :class:`~flexdpo.training.trainer.DPOTrainer` that starts, continues and saves a run."""

    args: Any
    train_dataset: Any
    data_collator: Any
    ref_model: Any
    objective: Objective
    row_plan: RowPlan
    reference_identity: ReferenceIdentity
    reference_logps: Callable[[Row], ResponseLogps]  # of a row's responses, without gradients
    tokens: dict[str, int]  # that this process ran in training, and that an ordinary run would have
    data_reports: dict[str, DataReport]
    proof: Proof | None = None  # of the run, before its first step
    # for the model's card: of the training data, and what the run came to
    dataset_names: tuple[str, ...] = ()
    figures: Mapping[str, str] = MappingProxyType({})
    _guard: StepGuard
    _fingerprints: dict[str, str]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or continue from a checkpoint of the same data and settings (``True``: the last one in output_dir)."""
        require_own(self.model)
        output_dir, done = Path(str(self.args.output_dir)), 0
        if not isinstance(resume_from_checkpoint, str | PathLike | bool | None):
            raise FlexdpoError(
                "resume_from_checkpoint must be a folder, or True for the last one, got "
                f"{found(resume_from_checkpoint)}"
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints.last_checkpoint(output_dir))
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            stored = checkpoints.require_same_run(folder, self._run_record)
            done = checkpoints.require_same_schedule(folder, self.args)
            if self.args.sync_ref_model:
                checkpoints.load_reference(folder, self.ref_model, self.args.process_index)
            # what the run had counted goes on in one process; the log adds them up
            if self.args.process_index == 0:
                self.tokens |= stored.get("tokens", {})
        if self._stream is not None:
            self._stream.closed = done >= self.args.max_steps
        writes = self.args.should_save and self.args.save_strategy != "no"
        with holding_output(output_dir, is_owner=writes), plain_worker_errors(self.args.dataloader_num_workers):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if self._stream is not None:
            self.data_reports["train"] = self._stream.report
            logger.warning(self._stream.report.summary())
        return output

    @property
    def _stream(self) -> StreamedPreferences | None:
        return self.train_dataset if isinstance(self.train_dataset, StreamedPreferences) else None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as ``Trainer`` does, but none beyond the last step.

        ``Trainer`` looks at the number of steps only after each, so a run that is continued at its end would go on.
        """
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                f"the checkpoint has all {self.state.max_steps} steps of this run, so there is nothing left to do"
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @cached_property
    def _run_record(self) -> dict[str, Any]:
        # of a stream, its beginning must do
        data = self.train_dataset.sample(256) if self._stream is not None else self.train_dataset
        return run_record(self.args, data_digest(data, TOKENISED_COLUMNS), self._fingerprints)

    def total_tokens(self) -> dict[str, int]:
        """Tokens of the run so far, over all processes, each of which must call this."""
        counts = torch.tensor(list(self.tokens.values()), device=self.args.device)
        totals = self.accelerator.reduce(counts, reduction="sum").tolist()
        return dict(zip(self.tokens, map(int, totals), strict=True))

    def changed_settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults and have a say in what is learned."""
        # a config made anew would set up accelerate once more, and this process would forget the others: the copy's
        # devices are set up already
        plain = copy(self.args)
        for each in fields(plain):
            setattr(plain, each.name, each.default if each.default_factory is MISSING else each.default_factory())
        plain.__post_init__()
        settings, defaults = self._run_record["settings"], run_record(plain, "")["settings"]
        return {name: value for name, value in settings.items() if value != defaults.get(name)}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **metadata: Any
    ) -> None:
        """Write ``README.md`` into the output folder; the arguments are those of TRL's, and more for the hub."""
        if not self.is_world_process_zero():
            return
        output = Path(str(self.args.output_dir))
        names = self.dataset_names if dataset_name is None else [dataset_name]
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        card = model_card(self, model_name or output.name, names, tags, self.figures, **metadata)
        card.save(output / "README.md")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does, and push where ``push_to_hub`` says so."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self.save_whole(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_whole(self, output_dir: str | None = None) -> None:
        """Save the finished model, under FSDP whole however its checkpoints are, and push it nowhere."""
        require_finite_weights(self._guard.model, self.accelerator, "the model")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        kept = getattr(plugin, "state_dict_type", None)
        with plain_write_errors("the finished model", Path(str(self.args.output_dir))):
            try:
                if plugin is not None:
                    plugin.set_state_dict_type("FULL_STATE_DICT")
                super().save_model(output_dir, _internal_call=True)
            finally:
                if plugin is not None:
                    plugin.set_state_dict_type(kept)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer``'s, which asks for the repository before the first step."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the hub and of whatever carries it
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            raise FlexdpoError(
                f"push_to_hub: the hub gives no repository {name!r} to push to ({type(error).__name__}: "
                f"{first_line(error)}); log in with hf auth login or HF_TOKEN, choose another with hub_model_id, or "
                "leave push_to_hub out"
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s; what was trained is safe on disk where the hub does not take it."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except FlexdpoError:
            raise
        except Exception as error:  # of the hub and of whatever carries it
            output, name = self.args.output_dir, self.hub_model_id
            raise FlexdpoError(
                f"the model is saved in {output}, and could not be pushed to {name} ({type(error).__name__}: "
                f"{first_line(error)}); push it later with: hf upload {name} {output}"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As ``Trainer`` does in the background, where nobody would hear of an error."""
        super()._push_from_checkpoint(checkpoint_folder)
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", ()):
            job.add_done_callback(partial(_warn_of_failed_push, checkpoint_folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as ``Trainer`` does, mark the checkpoint as complete, and only then let older ones go."""
        output_dir = self._get_output_dir(trial=trial)
        folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        require_finite_weights(self._guard.model, self.accelerator, f"the checkpoint {folder}", self.optimizer)
        tokens = self.total_tokens()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            # a complete checkpoint of an earlier run may stand there, and counts for incomplete until its record is new
            (folder / RECORD_FILE).unlink(missing_ok=True)
        with plain_write_errors(f"the checkpoint {folder}", folder.parent):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.sync_ref_model:
                checkpoints.save_reference(folder, self.ref_model, self.args.process_index)
            # the record vouches for what all processes have written
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # the one written before lacks the limit
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
                proof = None if self.proof is None else self.proof.figures()
                vouched = {"tokens": tokens, "files": checkpoints.file_record(folder), "proof": proof}
                checkpoints.write_record(folder, {**self._run_record, **vouched})
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=output_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
            )


def _warn_of_failed_push(folder: str, job: Any) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"{folder} could not be pushed ({type(error).__name__}: {first_line(error)}); it is on disk")
