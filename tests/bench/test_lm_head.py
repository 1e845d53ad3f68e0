"""The head's work, counted: most of what a GPU could do."""

from __future__ import annotations

import pytest
import torch

from flexdpo.bench.lm_head import H100, Card, CountWork, HeadSize, count_head
from flexdpo.objective.linear_logps import LogitTransform


def test_the_head_reaches_four_fifths_of_an_h100() -> None:
    work = count_head(HeadSize(targets=8192, vocabulary=128_256, hidden=4096), H100)
    assert work["ideal_seconds"] == pytest.approx(8 * 8192 * 128_256 * 4096 / 798e12)
    # four products, none of which waits for memory
    assert work["product_seconds"] == pytest.approx(work["ideal_seconds"])
    assert work["efficiency"] >= 0.8
    # another vocabulary, and fewer and more targets than a tile is high
    for size in (HeadSize(vocabulary=151_936), HeadSize(targets=4096), HeadSize(targets=20_000)):
        assert count_head(size)["efficiency"] >= 0.8


def test_what_follows_the_head_costs_passes() -> None:
    assert count_head(transform=LogitTransform(0.25))["efficiency"] >= 0.8
    # tanh, log-softmax and exp go over all logits one by one, each time for 6 % of what the products take
    assert 0.6 < count_head(transform=LogitTransform(1.0, 30.0))["efficiency"] < 0.8


def test_counting_by_hand() -> None:
    card = Card("made up", flops=1e3, bandwidth=1e2)
    with torch.device("meta"):
        left, right, total = torch.empty(2, 3), torch.empty(3, 5), torch.empty(2, 5)
        index = torch.empty(2, 1, dtype=torch.int64)
        with CountWork(card) as count:
            # views and allocations are free
            torch.empty(100).view(10, 10).t()[:3]
            assert count.seconds == 0
            product = left @ right
            # 60 multiplications and additions take 0.06 s; 6 + 15 + 10 floats at 100 bytes/s 1.24 s
            assert count.product_seconds == pytest.approx(1.24)
            torch.addmm(total, left, right, out=total)
            assert count.product_seconds == pytest.approx(1.24 + 1.64)
            torch.addmm(total, left, right, beta=0, out=total)
            assert count.product_seconds == pytest.approx(1.24 + 1.64 + 1.24)
            product.exp_()
            assert count.moved["exp_"] == 2 * 40
            # a row is read for each of its copies' results, not for each copy
            product.mul_(total[:1].expand(2, 5))
            assert count.moved["mul_"] == 2 * 40 + 20
            total.copy_(product)
            assert count.moved["copy_"] == 2 * 40
            torch.log_softmax(product, dim=1, out=total)
            assert count.moved["log_softmax"] == 4 * 40
            product.gather(1, index)
            assert count.moved["gather"] == 2 * (8 + 4 + 4)
