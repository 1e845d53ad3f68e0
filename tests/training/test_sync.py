"""A reference that follows the policy."""

from __future__ import annotations

import pytest
import torch

from flexdpo import FlexdpoError
from flexdpo.training.run_reference import mix_into_reference
from tests.conftest import build_model


def test_weights_move_by_alpha() -> None:
    policy, reference = build_model("llama", seed=0), build_model("llama", seed=1)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    kept = {name: p.clone() for name, p in policy.named_parameters()}
    mix_into_reference(reference, policy, 0.25)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(p, 0.25 * kept[name] + 0.75 * before[name])
    for name, p in policy.named_parameters():
        assert torch.equal(p, kept[name])


def test_a_hard_update_is_a_copy_and_tied_weights_move_once() -> None:
    policy, reference = build_model("gpt2", seed=0), build_model("gpt2", seed=1)
    mix_into_reference(reference, policy, 0.5)
    mix_into_reference(reference, policy, 1.0)
    for got, want in zip(reference.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert reference.lm_head.weight is reference.transformer.wte.weight


def test_models_that_do_not_match() -> None:
    policy, reference = build_model("llama"), build_model("llama")
    with pytest.raises(FlexdpoError, match=r"only one of them has the weight 'lm_head\.weight'"):
        mix_into_reference(build_model("gpt2"), policy, 0.5)
    reference.lm_head.weight = torch.nn.Parameter(torch.zeros(5, 64))
    with pytest.raises(
        FlexdpoError, match=r"'lm_head.weight' is \[5, 64\] in the reference and \[97, 64\] in the policy"
    ):
        mix_into_reference(reference, policy, 0.5)
