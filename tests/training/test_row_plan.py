"""How long rows are and what they are padded to, decided from settings, memory and data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from flexdpo import DPOConfig, DPOTrainer, FlexdpoError
from flexdpo.attention import flex
from flexdpo.attention.flex import KernelKey, _kernel_for
from flexdpo.layout.packing import MAX_WASTE
from flexdpo.training import run_data
from flexdpo.training import trainer as trainer_module
from flexdpo.training.distribution import shards_of
from flexdpo.training.run_data import FEW_LENGTHS, RowPlan
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
    return RowPlan.of(args, model, reference=True, longest=0).with_buckets(dataset, args)


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
    assert args.layer_compile_options == {"mode": "reduce-overhead"}
    assert args.kernel_settings().dynamic(args.device.type)
    assert not settings(tmp_path).compile_layers
    with pytest.raises(FlexdpoError, match="torch_compile=False leaves torch_compile_backend and torch_compile_mode"):
        settings(tmp_path, torch_compile=False, torch_compile_mode="reduce-overhead")


@pytest.mark.parametrize(
    ("asked", "device", "compiled"),
    [(None, "cuda", True), (False, "cuda", False), (True, "cuda", True), (None, "cpu", False), (True, "cpu", True)],
)
def test_layers_are_compiled_on_a_gpu_unless_switched_off(tmp_path, monkeypatch, asked, device, compiled) -> None:
    monkeypatch.setattr(DPOConfig, "device", torch.device(device))
    args = settings(tmp_path, torch_compile=asked)
    assert args.compile_layers == compiled
    assert args.compiles_unasked == (asked is None and compiled)


def test_every_kernel_that_chosen_lengths_need_may_be_compiled(tmp_path, small_model, monkeypatch) -> None:
    monkeypatch.setattr(flex, "_kernels", {})
    monkeypatch.setattr(flex, "_compile", lambda key: key)
    lengths = np.random.default_rng(0).integers(1, 6000, 2000).tolist()
    args = settings(tmp_path, attn_kernel_lengths="bucket", per_device_train_batch_size=1)
    found = plan(args, small_model(), tokenised(lengths))
    assert found.buckets is not None
    # a model with sliding windows has two kinds of masks; its reference runs without gradients
    for kind in ("causal", "sliding"):
        for grad in (True, False):
            for length in found.buckets.lengths:
                row_mask = SimpleNamespace(settings=found.kernels, layout=SimpleNamespace(length=length))
                _kernel_for(KernelKey(kind, grad, length, None, None, False, ()), row_mask)  # type: ignore[arg-type]
    assert len(flex._kernels) == 4 * len(found.buckets.lengths) > 32
    # rows that were not made of training batches need no more of them
    assert found.kernels_of_any_length.dynamic("cuda")


def test_auto_runs_in_pieces_what_fits_no_row(tmp_path, tokenizer, small_model, monkeypatch) -> None:
    from flexdpo.training import memory

    rows = [
        {"prompt": "w5 " * 300, "responses": [f"w{k} " * 30 for k in range(6, 16)], "scores": list(range(10))},
        *({"prompt": "w3 w4 ", "responses": ["w5 ", "w6 w7 "], "scores": [1, 0]} for _ in range(3)),
    ]
    curves = []
    for free, in_pieces in ((1 << 30, False), (5 * 2**20, True)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        args = settings(tmp_path, max_tokens_per_row="auto", max_steps=2, logging_steps=1, save_strategy="no")
        trainer = DPOTrainer(
            small_model(), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        budget = trainer.row_plan.max_tokens_per_row
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["batch"]
        assert any(row.pieces for row in batch.rows) == in_pieces == (budget < 800)
        # proved in pieces too
        trainer.train()
        assert trainer.proof.gradient_error < 1e-4
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append([(entry["loss"], entry["grad_norm"], entry["tokens/run"]) for entry in logs])
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    assert curves[1] == [pytest.approx(entry, rel=1e-4) for entry in curves[0]]
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    with pytest.raises(FlexdpoError, match=r"no row fits: 36\d tokens of"):
        DPOTrainer(small_model(), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_bucket_lengths_are_whole_tiles_of_the_padding_and_of_the_budget(tmp_path, small_model, tokenizer) -> None:
    def build(**changes):
        args = settings(tmp_path, attn_kernel_lengths="bucket", max_steps=2, **changes)
        data = Dataset.from_list([{"prompt": "w5 " * n, "chosen": "w6 w7 ", "rejected": "w8 "} for n in (20, 130)] * 4)
        return DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer)

    # what fits into 200 tokens, but into no row of whole tiles, is refused before the first step
    with pytest.raises(FlexdpoError, match=r"row 1 has a sequence of 13\d tokens .*_per_row=200 leaves room for 128"):
        build(max_tokens_per_row=200)
    run = build(max_tokens_per_row=300)
    run.train()
    assert run.row_plan.buckets is not None
    assert max(run.row_plan.buckets.lengths) <= 256
    wide = build(pad_to_multiple_of=192)
    assert all(length % 384 == 0 for length in wide.row_plan.buckets.lengths)


@pytest.mark.parametrize("few", [True, False])
def test_layers_are_compiled_for_each_length_only_where_lengths_are_few(
    tmp_path, small_model, tokenizer, preferences, monkeypatch, few: bool
) -> None:
    asked = []
    monkeypatch.setattr(trainer_module, "compile_decoder_layers", lambda model, **options: asked.append(options))
    if not few:
        # as on a GPU, where lengths that waste too much give way to one kernel
        monkeypatch.setattr(run_data, "choose_buckets", lambda *a, **k: SimpleNamespace(waste=0.5, lengths=(128,)))
        monkeypatch.setattr(DPOConfig, "device", type("device", (), {"type": "cuda"})())
    args = settings(tmp_path, torch_compile=True, pad_to_multiple_of=1)
    if few:
        args.attn_kernel_lengths = "bucket"
    plan_ = plan(args, small_model(), tokenised([88] * 8))
    made = SimpleNamespace(row_plan=plan_)
    DPOTrainer._compile(made, args, small_model(), None)  # type: ignore[arg-type]
    assert asked == [{"dynamic": not few}]


def test_settings_read_back_are_the_settings(tmp_path) -> None:
    args = settings(tmp_path, torch_compile=True, torch_compile_backend="eager", max_tokens_per_row="512")
    again = DPOConfig(**args.to_dict())
    assert again.compile_layers
    assert again.layer_compile_options == args.layer_compile_options
    assert again.kernel_settings() == args.kernel_settings()
    assert again.max_tokens_per_row == 512
    assert not DPOConfig(**settings(tmp_path).to_dict()).compile_layers


def test_copies_to_a_device_do_not_wait_for_each_other(tmp_path) -> None:
    def config(**changes):
        return DPOConfig(str(tmp_path), report_to="none", **changes)

    assert config().accelerator_config.non_blocking
    assert not config(dataloader_pin_memory=False).accelerator_config.non_blocking
    assert not config(accelerator_config={"even_batches": True}).accelerator_config.non_blocking


@pytest.mark.parametrize(("stage", "expected"), [(0, (1, 1)), (1, (1, 4)), (2, (1, 4)), (3, (4, 4))])
def test_only_the_third_stage_of_deepspeed_shards_weights(stage: int, expected: tuple[int, int]) -> None:
    config = SimpleNamespace(get_value=lambda key, default: {"zero_optimization.stage": stage}[key])
    plugin = SimpleNamespace(hf_ds_config=config)
    args = SimpleNamespace(fsdp=None, deepspeed="zero.json", deepspeed_plugin=plugin, world_size=4)
    assert tuple(shards_of(args).values()) == expected  # type: ignore[arg-type]


def test_sharding_may_be_asked_for_by_the_launcher(monkeypatch) -> None:
    args = SimpleNamespace(fsdp=None, deepspeed=None, deepspeed_plugin=None, world_size=4)
    assert tuple(shards_of(args).values()) == (1, 1)  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert tuple(shards_of(args).values()) == (4, 4)  # type: ignore[arg-type]


def test_processes_of_one_machine_share_its_memory(tmp_path, small_model, monkeypatch) -> None:
    from flexdpo.training import memory

    def budget(free: int, processes: int) -> int | None:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        args = settings(tmp_path, max_tokens_per_row="auto")
        return RowPlan.of(args, small_model(), reference=True, longest=0).max_tokens_per_row

    assert budget(2**26, 4) == budget(2**24, 1) != budget(2**26, 1)
    assert budget(2**26, 1) == budget(2**28, 4)
