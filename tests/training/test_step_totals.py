"""Terms that are means over tokens: over the step's, however it is cut into batches."""

from __future__ import annotations

from typing import Any

import pytest

from flexdpo import DPOTrainer
from tests.training.test_trainer import settings

CUTS = [(4, 1, None), (2, 2, None), (1, 4, None), (4, 1, 56)]


@pytest.mark.parametrize(
    "losses",
    [
        {"loss_type": ["sft"]},
        {"loss_type": ["cpo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["orpo"], "rpo_alpha": 0.7},
    ],
    ids=str,
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, tokenizer, preferences, small_model, losses: Any) -> None:
    found = []
    for batch, accumulation, budget in CUTS:
        args = settings(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_tokens_per_row=budget,
            max_steps=2,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            prove=False,
            **losses,
        )
        trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
        trainer.train()
        found.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert got == pytest.approx(want, rel=2e-5)
