"""Training on images is the ordinary run: TRL's own batches, each pair by itself, through the stock model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from flexdpo import DPOConfig, DPOTrainer
from tests.images import processors

trl = pytest.importorskip("trl")

MAKERS = {
    "llava": (processors.llava_model, processors.llava_processor),
    "qwen2_vl": (processors.qwen_model, processors.qwen_processor),
}
BETA = 0.3


def _stock_loss(model: Any, reference: Any, processor: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of one pair: TRL's collator, the model as transformers made it, and DPO's loss by hand."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    batch = DataCollatorForVisionPreference(processor)([copy.deepcopy(row)])
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    sums = []
    for each in (model, reference):
        logits = each(**inputs, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        sums.append((logps * batch["completion_mask"][:, 1:]).sum(-1))
    margin = (sums[0] - sums[1]) @ torch.tensor([1.0, -1.0], dtype=sums[0].dtype)
    return -torch.nn.functional.logsigmoid(BETA * margin)


def _config(folder: Path, **settings: Any) -> DPOConfig:
    given = {"beta": BETA, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3, "use_cpu": True}
    return DPOConfig(str(folder), **{**given, "bf16": False, "max_length": None, **settings})


def _moved(model: Any) -> Any:
    """Another model nearby, so that a policy differs from its reference."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for weight in moved.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return moved


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("settings", [{}, {"sharing": "step", "gradient_checkpointing": True}], ids=["rows", "step"])
def test_loss_and_gradients_are_those_of_stock_runs(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    make, make_processor = MAKERS[kind]
    model, processor, rows = make(), make_processor(), processors.rows()
    reference = _moved(model)
    stock, stock_reference = copy.deepcopy(model).train(), copy.deepcopy(reference)
    want = []
    for row in rows:
        loss = _stock_loss(stock, stock_reference, processor, row)
        (loss / len(rows)).backward()
        want.append(loss.item())
    trainer = DPOTrainer(
        model,
        reference,
        _config(tmp_path, per_device_train_batch_size=len(rows), max_tokens_per_row=90, **settings),
        train_dataset=Dataset.from_list(processors.in_parts(rows)),
        processing_class=processor,
    )
    [inputs] = list(trainer.get_train_dataloader())
    trainer.optimizer = torch.optim.SGD(model.parameters())
    trainer.current_gradient_accumulation_steps = 1
    batch = inputs["batch"]
    assert len(batch.rows) > 1
    loss = trainer.training_step(trainer.model, inputs)
    assert loss.item() == pytest.approx(sum(want) / len(want), rel=1e-5)
    for (name, got), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if expected.grad is None:
            assert got.grad is None or not got.grad.any(), name
            continue
        scale = max(expected.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(got.grad / scale, expected.grad / scale, atol=2e-5, rtol=0, msg=name)
    distinct = sum(len({image.digest for group in row.groups for image in group.images}) for row in batch.rows)
    assert (trainer.tokens["images"], trainer.tokens["images_unshared"]) == (distinct, 10)
