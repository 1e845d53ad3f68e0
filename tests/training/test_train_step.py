"""The step for loops of one's own, against autograd written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from flexdpo import FlexdpoError, Group, parity_probe
from flexdpo.training.train_step import make_train_step
from tests.conftest import build_model, odd_groups
from tests.hf.architectures import build_model as build_zoo_model
from tests.hf.architectures import needs_states
from tests.test_equivalence import sequence_logp


def plain_step(model, reference, optimizer, groups) -> float:
    pairs = [(g, chosen, rejected) for g in groups for chosen, rejected in g.edges]
    loss = 0.0
    for group, chosen, rejected in pairs:
        margins = []
        for end in (chosen, rejected):
            with torch.no_grad():
                base = sequence_logp(reference, group, group.response_ids[end])
            margins.append(sequence_logp(model, group, group.response_ids[end]) - base)
        loss = loss - F.logsigmoid(0.3 * (margins[0] - margins[1])) / len(pairs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("max_tokens_per_row", [None, 64])
@pytest.mark.parametrize("with_accelerate", [False, True])
def test_a_loop_of_ones_own_follows_the_plain_one(rng, max_tokens_per_row, with_accelerate) -> None:
    plain = build_model("gpt2")
    reference = copy.deepcopy(plain)
    ours = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, ours)]
    settings = {"beta": 0.3, "max_tokens_per_row": max_tokens_per_row}
    if with_accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        ours, optimizers[1] = accelerator.prepare(ours, optimizers[1])
        settings["accelerator"] = accelerator
    step = make_train_step(ours, optimizers[1], **settings)
    for number in range(4):
        groups = odd_groups(rng)
        want = plain_step(plain, reference, optimizers[0], groups)
        result = step(groups)
        assert result.loss.item() == pytest.approx(want, rel=1e-9)
        assert (number > 0) or result.loss.item() == pytest.approx(0.6931471805599453, abs=1e-9)
        assert result.tokens_run < result.tokens_unshared
        assert {"rewards/chosen", "rewards/margins", "rewards/accuracies"} <= result.metrics.keys()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


@needs_states
@pytest.mark.parametrize(("name", "rate"), [("lfm2", 0.1), ("falcon_h1", 30.0)])
def test_a_loop_on_a_model_with_states(name, rate, rng) -> None:
    plain = build_zoo_model(name)
    reference, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model in (plain, ours)]
    step = make_train_step(ours, optimizers[1], beta=0.3)
    for _ in range(2):
        groups = odd_groups(rng)
        want = plain_step(plain, reference, optimizers[0], groups)
        # norms and scans compute in float32
        assert step(groups).loss.item() == pytest.approx(want, rel=1e-4)
    assert want != pytest.approx(0.6931471805599453, abs=1e-4)


def test_a_loss_that_is_not_finite_leaves_the_weights(rng) -> None:
    model = build_model("llama")
    step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_type="simpo")
    groups = odd_groups(rng)
    with torch.no_grad():
        model.model.embed_tokens.weight[groups[0].prompt_ids[0]] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FlexdpoError, match=r"pair: the log-probability of response .* is nan"):
        step(groups)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], equal_nan=True)


def test_bad_settings(rng) -> None:
    model = build_model("llama")
    with pytest.raises(FlexdpoError, match=r"unknown loss_type 'sigmod'; did you mean 'sigmoid'"):
        make_train_step(model, torch.optim.SGD(model.parameters()), loss_type="sigmod")


def test_another_default_device_changes_nothing(rng, small_model) -> None:
    groups = [*odd_groups(rng), Group.from_lists([1] * 8, [[2] * 20, [3] * 20])]

    def norm_of(model) -> torch.Tensor:
        step = make_train_step(model, torch.optim.SGD(model.parameters()), max_tokens_per_row=40)
        return step(groups).grad_norm

    one, other = small_model(), small_model()
    want = norm_of(one)
    # its tensors hold nothing, so any that is made there and not where it belongs stops the run
    with torch.device("meta"):
        assert torch.equal(norm_of(other), want)
        assert parity_probe(other).exact
