"""Reward models on shared rows against one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flexdpo import FlexdpoError, Group, Row, UnsupportedModelError, prepare_model
from flexdpo.objective.rewards import response_rewards, reward_row_loss
from tests.conftest import CONFIGS, TOLERANCE, odd_groups, strengthen


def reward_model(name: str, attn_implementation: str, labels: int = 1) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)
    return strengthen(model.double(), 0).eval()


def one_at_a_time(model: Any, groups: list[Group]) -> torch.Tensor:
    sequences = [sequence for group in groups for sequence in group.sequences]
    return torch.cat([model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in sequences])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rewards_and_gradients_are_the_ordinary_ones(name: str) -> None:
    groups = odd_groups(np.random.default_rng(0))
    stock, model = reward_model(name, "eager"), prepare_model(reward_model(name, "flexdpo"))
    want = one_at_a_time(stock, groups)
    row = Row.from_groups(groups, pad_to_multiple_of=32)
    chosen, rejected = want[row.edges[:, 0]], want[row.edges[:, 1]]
    loss = (-F.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).mean()
    loss.backward()

    rewards = response_rewards(model, row)
    result = reward_row_loss(rewards, row, len(row.edges), centre_coefficient=0.1)
    result.loss.backward()
    tolerance = TOLERANCE[name]
    torch.testing.assert_close(rewards, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.loss, loss, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=tolerance * float(wanted.grad.abs().max() + 1))
    assert result.metrics["rewards/margins"].tolist() == pytest.approx((chosen - rejected).tolist(), rel=1e-6)


def test_the_shares_of_rows_add_up() -> None:
    groups = odd_groups(np.random.default_rng(1))
    model = prepare_model(reward_model("gpt2", "flexdpo"))
    whole = Row.from_groups(groups)
    total = len(whole.edges)
    want = reward_row_loss(response_rewards(model, whole), whole, total).loss
    rows = [Row.from_groups([group]) for group in groups]
    got = sum(reward_row_loss(response_rewards(model, row), row, total).loss for row in rows)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_models_that_score_nothing_or_too_much() -> None:
    row = Row.from_groups(odd_groups(np.random.default_rng(0)))
    causal = prepare_model(AutoModelForCausalLM.from_config(CONFIGS["gpt2"](), attn_implementation="flexdpo"))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no score head; load it with AutoModelForSeq"):
        response_rewards(causal, row)
    with pytest.raises(FlexdpoError, match="a reward model gives one score, this one has num_labels=3"):
        response_rewards(prepare_model(reward_model("gpt2", "flexdpo", labels=3)), row)
