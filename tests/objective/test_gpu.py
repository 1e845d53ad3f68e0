"""Log-probabilities on a CUDA device, in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flexdpo.objective.linear_logps import LogitTransform, linear_logps, logits_logps
from flexdpo.objective.lm_head import _held_against


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_halves_on_a_gpu_err_no_more_than_the_ordinary_way(how: str, softcap: float | None) -> None:
    """Against float64, at a size where the projection uses tensor cores; the ordinary way rounds its logits to bf16."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    hidden, weight, gradient = noise(700, 256), noise(5000, 256) / 8, noise(700)
    labels = torch.randint(0, 5000, (700,), generator=generator, device="cuda")
    transform = LogitTransform(1.0, softcap)
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    if how == "bf16 weights":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()

    def run(compute: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
        with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast" and inputs[0].dtype != torch.float64):
            logps = compute(*inputs)
        return [logps.detach().double(), *(g.double() for g in torch.autograd.grad(logps, inputs, gradient.to(logps)))]

    def ordinary(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return logits_logps(transform(F.linear(h, w)), labels).logps

    want = run(ordinary, hidden.double(), weight.double())
    rough = run(ordinary, hidden, weight)
    ours = run(lambda h, w: linear_logps(h, w, None, labels, transform=transform, chunk_size=128).logps, hidden, weight)
    for got, plain, exact in zip(ours, rough, want, strict=True):
        budget = (plain - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (got - exact).abs().max() <= 1.2 * budget
    # inputs are exact in bf16, so the values themselves keep float32
    assert (ours[0] - want[0]).abs().max() < 1e-4


@pytest.mark.gpu
def test_what_changes_behind_the_head_cannot_pass_as_a_number() -> None:
    """Without waiting for the device: NaN, which every loss refuses."""
    logps = torch.tensor([-1.0, -2.0], device="cuda")
    model = torch.nn.Identity()
    assert torch.equal(_held_against(LogitTransform(2.0), logps, (2 * logps)[None, :, None], model), logps)
    assert _held_against(LogitTransform(2.0), logps, logps[None, :, None], model).isnan().all()
