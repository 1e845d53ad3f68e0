"""How long rows are and what they are padded to, decided from settings, memory and data."""

import numpy as np
import pytest
from datasets import Dataset

from flexdpo import DPOConfig, DPOTrainer, FlexdpoError
from flexdpo.training import row_plan
from flexdpo.training.row_plan import FEW_LENGTHS, MAX_WASTE, RowPlan
from tests.training.test_trainer import settings


def tokenised(prompts: list[int]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [[5] * length for length in prompts],
            "response_ids": [[[6] * 20, [7] * 20]] * len(prompts),
            "edges": [[[0, 1]]] * len(prompts),
            "row": list(range(len(prompts))),
        }
    )


def plan(args: DPOConfig, model, dataset: Dataset | None) -> RowPlan:
    return RowPlan.of(args, model, reference=True, longest=0, shards=1).with_buckets(dataset, args)


def test_buckets_that_waste_little_are_taken_and_rows_padded_to_them(tmp_path, small_model) -> None:
    # every batch of four has 4 * (88 + 40) = 512 tokens
    found = plan(settings(tmp_path, attn_kernel_lengths="bucket"), small_model(), tokenised([88] * 40))
    assert found.buckets is not None
    assert found.buckets.lengths == (512,)
    assert found.kernels.lengths == "bucket"
    assert found.collation["buckets"] is found.buckets


def test_unasked_buckets_that_waste_much_give_way_to_one_kernel(tmp_path, small_model, monkeypatch) -> None:
    monkeypatch.setattr(DPOConfig, "device", type("device", (), {"type": "cuda"})())
    lengths = np.random.default_rng(0).integers(1, 900, 400).tolist()
    wide = plan(settings(tmp_path, pad_to_multiple_of=128), small_model(), tokenised(lengths))
    assert wide.buckets is None
    assert wide.kernels.lengths == "dynamic"
    # long rows filled to the brim are nearly alike
    args = settings(tmp_path, max_tokens_per_row=4096, per_device_train_batch_size=64, pad_to_multiple_of=128)
    full = plan(args, small_model(), tokenised([88] * 400))
    assert full.buckets is not None
    assert len(full.buckets.lengths) <= FEW_LENGTHS
    assert full.buckets.waste <= MAX_WASTE
    # a stream has no lengths to choose from
    assert plan(args, small_model(), None).kernels.lengths == "dynamic"


def test_a_cpu_compiles_one_kernel(tmp_path, small_model) -> None:
    assert plan(settings(tmp_path), small_model(), tokenised([88] * 8)).buckets is None


def test_auto_fills_the_free_memory_and_says_so(tmp_path, tokenizer, preferences, small_model, monkeypatch) -> None:
    from flexdpo.training import memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**20)
    args = settings(tmp_path, max_tokens_per_row="auto", max_steps=1)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    budget = trainer.row_plan.max_tokens_per_row
    assert budget is not None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["batch"]
    assert all(row.layout.length <= budget for row in batch.rows)
    monkeypatch.setattr(memory, "free_memory", lambda device: 64 * 2**20)
    roomy = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    assert roomy.row_plan.max_tokens_per_row > budget
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**12)
    with pytest.raises(FlexdpoError, match=r"no row fits: \d+ tokens of .* need about .*lower max_length"):
        DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens_per_row": "plenty"}, r"max_tokens_per_row must be a number of tokens or 'auto', got 'plenty'"),
        ({"max_tokens_per_row": "0"}, "max_tokens_per_row must be at least 1, got 0"),
        ({"sharing": "steps"}, r"sharing must be one of \('group', 'step'\), got 'steps'.*'step'"),
        ({"attn_kernel_lengths": "buckets"}, "lengths must be one of .*got 'buckets'.*'bucket'"),
        ({"attn_kernel_options": "BLOCK_M=64"}, "attn_kernel_options must be JSON, got 'BLOCK_M=64'"),
        ({"attn_kernel_options": {"BLOCK_MM": 64}}, "kernel_options has no 'BLOCK_MM'.*'BLOCK_M'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        settings(tmp_path, **changes)


def test_a_number_may_be_given_as_text(tmp_path) -> None:
    assert settings(tmp_path, max_tokens_per_row="4096").max_tokens_per_row == 4096


def test_a_compile_setting_compiles_layers_and_not_the_model(tmp_path) -> None:
    args = settings(tmp_path, torch_compile_mode="reduce-overhead")
    assert args.compile_layers
    assert not args.torch_compile
    assert args.compile_options == {"dynamic": True, "mode": "reduce-overhead"}
    assert not settings(tmp_path).compile_layers
    assert row_plan.MAX_WASTE == 0.03
