"""TRL's own trainer as a baseline: its collator, its forward passes, its loss."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexdpo.bench.variants import Variant
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import Work, padded_work
from flexdpo.hf.checkpointing import checkpointing_name
from flexdpo.layout.groups import Group


class Trl(Variant):
    """``trl.DPOTrainer.compute_loss`` and the backward pass, on copies of the model since TRL changes its forward.

    The reference's forward pass happens inside ``compute_loss``, so all of the time counts as the policy's.

    Args:
        checkpointing: Whether layers run again in the backward pass.

    Raises:
        FlexdpoError: if TRL is not installed.
    """

    name = "trl"
    head_passes = 3
    slow = True

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Sequence[Group]],
        device: torch.device,
        *,
        checkpointing: bool = False,
    ) -> None:
        self.trainer = _trainer(model, device, checkpointing)
        super().__init__(self.trainer.model, batches)
        examples = [
            [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), _lists(group), strict=True)) for group in batch]
            for batch in batches
        ]
        self.inputs = [
            {name: tensor.to(device) for name, tensor in self.trainer.data_collator(each).items()} for each in examples
        ]

    def enter(self) -> None:
        """Start from zero gradients."""
        self.model.zero_grad(set_to_none=True)
        self.model.train()

    def reference(self, batch: int) -> Tensor:
        """Nothing: TRL runs the reference inside its loss."""
        return torch.zeros(2, len(self.batches[batch]))

    def policy(self, batch: int, reference: Tensor) -> Tensor:  # noqa: ARG002
        """TRL's loss, with gradients left in its model."""
        loss: Tensor = self.trainer.compute_loss(self.model, dict(self.inputs[batch]))
        loss.backward()
        return loss.detach()

    def work(self, batch: int) -> Work:
        """By the padded shape; on a GPU TRL computes logits at the responses only, elsewhere at every position."""
        return padded_work(self.batches[batch], labels_only=self.model.device.type == "cuda")


def _lists(group: Group) -> list[list[int]]:
    return [ids.tolist() for ids in (group.prompt_ids, *group.response_ids)]


def _trainer(model: PreTrainedModel, device: torch.device, checkpointing: bool) -> Any:
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise FlexdpoError("--baseline trl needs TRL; pip install 'flexdpo[trl]'") from error
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<a>": 0, "<b>": 1}, unk_token="<a>"))  # noqa: S106
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<b>", pad_token="<a>", unk_token="<a>")  # noqa: S106
    copies = [copy.deepcopy(model) for _ in range(2)]
    for part in copies:
        part.set_attn_implementation("sdpa")
    config = DPOConfig(
        tempfile.mkdtemp(prefix="flexdpo-bench-"),
        max_length=None,
        **{checkpointing_name(DPOConfig): checkpointing},
        use_cpu=device.type == "cpu",
        report_to=[],
        bf16=False,
        disable_tqdm=True,
    )
    # the trainer wants some data to be made with; the batches come ready tokenised
    data = Dataset.from_list([{"prompt": "<a>", "chosen": "<a>", "rejected": "<b>"}])
    return DPOTrainer(copies[0], copies[1], config, train_dataset=data, processing_class=tokenizer)
