"""Pairs assigned to processes: the same global batches, about equal costs, and the same epoch on every process."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from flexdpo.bench.profiles import Profile, load_profiles
from flexdpo.data.balance import BalancedSampler, balance, partition
from flexdpo.data.lengths import costs_of, has_one_pair_each, predicted_costs
from flexdpo.estimate.stragglers import stragglers_of


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_parts_are_equally_large_and_nearly_equally_dear(count: int, size: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 100), min_size=count * size, max_size=count * size))
    parts = partition(costs, count)
    assert sorted(item for part in parts for item in part) == list(range(len(costs)))
    assert all(len(part) == size for part in parts)
    sums = [sum(costs[i] for i in part) for part in parts]
    assert max(sums) - min(sums) <= max(costs) * size


def test_dealing_is_better_than_taking_turns() -> None:
    costs = np.random.default_rng(0).lognormal(5, 1, 32)
    assigned = [costs[part].sum() for part in partition(costs, 4)]
    in_turn = costs.reshape(4, 8).sum(axis=1)
    assert max(assigned) - min(assigned) < 0.1 * (max(in_turn) - min(in_turn))


def drawn_tokens(profile: Profile, count: int) -> NDArray[np.float64]:
    """Distinct tokens of pairs, drawn as a profile draws them."""
    noise = np.random.default_rng(0).standard_normal((3, count))
    most = min(profile.max_prompt, profile.max_length - 1)
    prompts = np.minimum(profile.median_prompt * np.exp(profile.sigma_prompt * noise[0]), most)
    responses = profile.median_response * np.exp(profile.sigma_response * noise[1:])
    return prompts + np.minimum(responses, profile.max_length - prompts).sum(axis=0)


@pytest.mark.parametrize("name", list(load_profiles()))
def test_a_thousand_processes_wait_for_nobody(name: str) -> None:
    """16 pairs each: the slowest costs at most 1 % more than the mean, a third and more without balancing."""
    costs = costs_of(drawn_tokens(load_profiles()[name], 1024 * 16), 4096)
    (found,) = stragglers_of(costs, [1024], per_process=16, balances=True)
    assert (found.examples, found.steps) == (len(costs), 1)
    assert found.balanced is not None
    assert found.balanced < 0.01
    assert found.unbalanced > 0.25


@pytest.mark.parametrize("count", [48, 41, 30])
def test_a_step_of_several_batches_keeps_its_examples(count: int) -> None:
    """Batches of 3 on 2 processes, 4 of them accumulated; the last step has fewer, and an incomplete batch."""
    costs = np.random.default_rng(1).lognormal(5, 1, count)
    sampler = BalancedSampler(range(count), costs, batch_size=3, num_processes=2, accumulation=4)  # type: ignore[arg-type]
    order = np.array(list(sampler))
    assert sorted(order[:24]) == list(range(24))
    whole = (count - 24) // 6 * 6
    assert sorted(order[24 : 24 + whole]) == list(range(24, 24 + whole))
    assert order[24 + whole :].tolist() == list(range(24 + whole, count))
    # batches go to the processes in turn
    first, second = (costs[order[:24].reshape(4, 2, 3)[:, process]].sum() for process in (0, 1))
    assert abs(first - second) < 0.01 * (first + second)


class Loader:
    """What accelerate makes of a loader for one of several processes."""

    def __init__(self, dataset: Dataset, sampler: object, process: int) -> None:
        from accelerate.data_loader import BatchSamplerShard
        from torch.utils.data import BatchSampler

        batches = BatchSampler(sampler, batch_size=3, drop_last=False)
        self.batch_sampler = BatchSamplerShard(batches, num_processes=2, process_index=process)


@pytest.mark.parametrize("count", [24, 29])
def test_global_batches_keep_their_examples(count: int) -> None:
    costs = np.random.default_rng(1).integers(1, 1000, count).astype(float)
    dataset = Dataset.from_dict({"x": list(range(count))})
    shares = []
    for process in (0, 1):
        loader = Loader(dataset, SequentialSampler(dataset), process)
        assert balance(loader, costs, num_processes=2)  # type: ignore[arg-type]
        shares.append(list(loader.batch_sampler))
    assert len(shares[0]) == len(shares[1]) == -(-count // 6)
    for step, (first, second) in enumerate(zip(*shares, strict=True)):
        if (step + 1) * 6 <= count:
            assert sorted(first + second) == list(range(step * 6, step * 6 + 6))
            # without balancing, the parts of the last full batches differ by more
            assert len(first) == len(second) == 3
    seen = {i for share in shares for batch in share for i in batch}
    assert seen == set(range(count))


def test_the_epoch_reaches_the_sampler_that_shuffles() -> None:
    class Shuffled(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    inner = Shuffled(range(4))
    BalancedSampler(inner, np.ones(4), batch_size=2, num_processes=2).set_epoch(7)
    assert inner.epoch == 7


def test_a_loader_without_batches_of_a_sampler_is_left_alone() -> None:
    assert not balance(DataLoader(range(4)), np.ones(4), 2)  # type: ignore[arg-type]


def test_costs_grow_faster_than_tokens_and_pairs_are_counted() -> None:
    rows = {
        "prompt_ids": [[1] * 10, [1] * 1000],
        "response_ids": [[[1], [2]], [[1] * 5, [2] * 5]],
        "edges": [[[0, 1]], [[0, 1]]],
        "row": [0, 1],
    }
    small, large = predicted_costs(Dataset.from_dict(rows), hidden_size=64)
    assert small == pytest.approx(12 * (1 + 12 / 768))
    assert large / small > 1010 / 12
    assert has_one_pair_each(Dataset.from_dict(rows))
    assert not has_one_pair_each(Dataset.from_dict(rows | {"edges": [[[0, 1]], []]}))
