"""What a dataset needs before it is trained on: room in a row, and company for the kto loss."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from flexdpo import DPOTrainer, FlexdpoError
from flexdpo.data.lengths import require_room, tokens_needed
from flexdpo.data.tokenize import group_from_row
from flexdpo.layout.packing import row_lengths
from flexdpo.objective.unpaired import with_unrelated_responses
from flexdpo.training.batch import PackingCollator
from tests.training.test_trainer import settings


def labelled(lengths: list[tuple[int, int]]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"w{i + 3} " * prompt, "completion": f"w{i + 40} " * response, "label": i % 2 == 0}
            for i, (prompt, response) in enumerate(lengths)
        ]
    )


@pytest.fixture
def kto(tmp_path, tokenizer, small_model) -> Any:
    def build(data: Dataset, **changes: Any) -> DPOTrainer:
        args = settings(tmp_path, **{"loss_type": "kto", "max_steps": 3, **changes})
        return DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer)

    return build


def test_room_is_left_for_other_examples_responses(kto) -> None:
    # the long response may come to stand behind the long prompt
    data = labelled([(30, 2), (4, 30)] * 4)
    message = r"row 0 has a prompt of 30 tokens and may get a response of 31 .*_per_row=44 leaves room for 44"
    with pytest.raises(FlexdpoError, match=message):
        kto(data, max_tokens_per_row=44)
    kto(data, max_tokens_per_row=72).train()
    # other losses have no use for it
    kto(data, loss_type="apo_zero_unpaired", max_tokens_per_row=44).train()


@pytest.mark.parametrize("limits", [(), (12,), (12, 32)], ids=str)
@pytest.mark.parametrize("paired", [False, True])
def test_no_batch_needs_more_than_was_counted(kto, paired: bool, limits: tuple[int, ...]) -> None:
    rows = labelled([(30, 2), (4, 30), (9, 5), (2, 7)])
    if paired:
        keys = ("prompt", "chosen", "rejected")
        texts = [("w3 " * 9, "w4 " * 20, "w5 "), ("w6 ", "w7 ", "w8 " * 30), ("w9 ", "w10 ", "w11 ")]
        rows = Dataset.from_list([dict(zip(keys, row, strict=True)) for row in texts])
    data = kto(rows).train_dataset
    needed = tokens_needed(data, unrelated_responses=True, limits=limits)
    groups = with_unrelated_responses([group_from_row(row) for row in data])
    for group, most in zip(groups, needed, strict=True):
        assert PackingCollator(limits=limits).packed([group]).tokens_run <= most
    for row, most in zip(data, tokens_needed(data, limits=limits), strict=True):
        assert PackingCollator(limits=limits).packed([group_from_row(row)]).tokens_run <= most


def test_a_prompt_that_stands_twice_in_a_row_needs_room_for_both(kto) -> None:
    """A row must not mix the rotations of short and long sequences."""
    rows = [{"prompt": "w3 " * 20, "chosen": "w4 " * 3, "rejected": "w5 " * 9}]
    data = kto(Dataset.from_list(rows), loss_type="sigmoid").train_dataset
    (group,) = (group_from_row(row) for row in data)
    short, long = sorted(map(len, group.sequences))
    for limits, needed in (((), group.prompt_ids.size + sum(map(len, group.response_ids))), ((short,), short + long)):
        require_room(data, needed, 1, limits=limits)
        with pytest.raises(FlexdpoError, match=f"row 0 has {needed} distinct tokens .* leaves room for {needed - 1}"):
            require_room(data, needed - 1, 1, limits=limits)
        assert row_lengths([[group]], limits=limits) == [needed]
        assert tokens_needed(data, limits=limits).tolist() == [needed]


def test_a_last_batch_of_one_is_refused_before_training(kto) -> None:
    data = labelled([(5, 3)] * 9)
    with pytest.raises(FlexdpoError, match=r"train: .* the last batch of 9 examples in batches of 4 holds one; set"):
        kto(data)
    kto(data, dataloader_drop_last=True, max_steps=-1, num_train_epochs=2).train()
