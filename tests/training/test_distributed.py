"""Several processes against one: the same pairs per step, the same curve."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexdpo.training.model_loading import load_tokenizer
from tests.conftest import preference_rows
from tests.processes import run_processes
from tests.training.test_router_loss import mixtral

pytestmark = pytest.mark.distributed

SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from flexdpo import DPOConfig, DPOTrainer
from flexdpo.training.model_loading import load_model, load_tokenizer
from tests.processes import fully_sharded, leave
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
data, model, output = settings.pop("data"), settings.pop("model"), settings.pop("output")

free = settings.pop("free_memory", None)
if free:
    from flexdpo.training import memory
    memory.free_memory = lambda device: free[int(os.environ["RANK"])]
resume = settings.pop("resume", None)
adapter = None
if settings.pop("lora", False):
    from peft import LoraConfig
    adapter = LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
policy = load_model(model)
if settings.pop("trained_adapter", False):
    # it changes the model already, and is trained further: what it is now must be kept as the reference
    from peft import LoraConfig, get_peft_model
    trained = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"],
                         trainable_token_indices=[5, 9], modules_to_save=["norm"])
    torch.manual_seed(1)
    policy = get_peft_model(policy, trained)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
Trainer = fully_sharded(DPOTrainer) if settings.pop("fsdp2", False) else DPOTrainer
if "deepspeed" in settings:
    settings["use_cpu"] = False
fixed = {"max_steps": 6, "use_cpu": True, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True,
         "logging_steps": 1, "save_strategy": "no", "per_device_eval_batch_size": 3}
args = DPOConfig(output, **fixed | settings)
if args.deepspeed:
    # on a machine without an accelerator, accelerate takes each DeepSpeed process for the only one
    from accelerate import PartialState
    rank, state = int(os.environ["RANK"]), PartialState._shared_state
    state.update(num_processes=int(os.environ["WORLD_SIZE"]), process_index=rank, local_process_index=rank)
    args.distributed_state.__dict__.update(state)
    args.hf_deepspeed_config.mismatches.clear()
trainer = Trainer(policy, None, args, train_dataset=Dataset.from_json(data),
                     eval_dataset=Dataset.from_json(data).select(range(18)), processing_class=load_tokenizer(model),
                  peft_config=adapter)
rows = []
collate = trainer.data_collator
def counting(examples):
    found = collate(examples)
    rows.append((len(found["batch"].rows), sorted(found["example_rows"].tolist())))
    return found
trainer.data_collator = counting
trainer.train(resume_from_checkpoint=resume)
trainer.evaluate()
with open(f"{output}.rows.{trainer.args.process_index}.json", "w") as file:
    json.dump(rows, file)
if Trainer is not DPOTrainer:
    from torch.distributed.fsdp import FSDPModule
    assert isinstance(trainer.model_wrapped, FSDPModule) and trainer.accelerator.is_fsdp2
trainer.save_model(output + "-final")
if trainer.is_world_process_zero():
    with open(output + ".json", "w") as file:
        json.dump(trainer.state.log_history, file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
leave()
"""
COMPARED = ["loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"]


def run(processes: int, **settings: object) -> list[dict[str, float]]:
    environment = {}
    if "deepspeed" in settings:
        environment = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    run_processes(["-c", SCRIPT, json.dumps(settings)], processes, **environment)
    return json.loads(Path(str(settings["output"]) + ".json").read_text())


def assert_same_curve(got: list[dict[str, float]], want: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    for mine, other in zip(got[:6], want[:6], strict=True):
        # the policy that has not moved is its reference to rounding, so which reward is larger is chance
        at_start = max(abs(line["rewards/margins"]) for line in (mine, other)) < 1e-6
        for name in COMPARED:
            if name == "rewards/accuracies" and at_start:
                continue
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=0.1 * tolerance), (name, mine["step"])
    evaluated, expected = (next(x for x in lines if "eval_loss" in x) for lines in (got, want))
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[name] == pytest.approx(expected[name], rel=tolerance, abs=0.1 * tolerance), name
    # every token of the step is counted once, wherever it ran
    assert got[5]["tokens/run"] == want[5]["tokens/run"]


@pytest.fixture(scope="module")
def common(tmp_path_factory, tokenizer, small_model) -> dict[str, object]:
    """Settings of all runs: uneven lengths, so that with this row budget the ranks need different numbers of rows."""
    folder = tmp_path_factory.mktemp("common")
    data, model = folder / "pairs.jsonl", folder / "model"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40)))
    small_model("llama", layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return {"data": str(data), "model": str(model), "max_tokens_per_row": 60}


@pytest.fixture(scope="module")
def one_process(common) -> list[dict[str, float]]:
    """What was logged; the model lies in ``one-final`` beside the data."""
    return run(1, output=str(Path(common["data"]).parent / "one"), per_device_train_batch_size=8, **common)


WAYS = {
    "DDP": {"ddp_backend": "gloo"},
    "FSDP2": {"ddp_backend": "gloo", "fsdp2": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_curve_of_one(tmp_path, common, one_process, processes: int, way: str) -> None:
    output = tmp_path / "several"
    got = run(processes, output=str(output), per_device_train_batch_size=8 // processes, **WAYS[way], **common)
    assert_same_curve(got, one_process)
    ranks = [json.loads(Path(f"{output}.rows.{rank}.json").read_text()) for rank in range(processes)]
    one = Path(common["data"]).parent / "one"
    saved = [load_file(Path(f"{name}-final") / "model.safetensors") for name in (output, one)]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[1].items():
        torch.testing.assert_close(saved[0][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    # nothing made the ranks' batches alike
    assert len({tuple(count for count, _ in rank) for rank in ranks}) > 1


CHANGES = [
    {"gradient_accumulation_steps": 2},
    {"loss_type": ["aot"], "beta": 0.5},
    {"lora": True, "activation_checkpointing": True},
    {"bf16": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_fsdp2_with_accumulation_adapters_half_precision_and_losses_that_couple_a_batch(
    tmp_path, common, changes
) -> None:
    """Against DDP on the same two processes, where each rank's batch is coupled by itself."""
    # autocast and bfloat16 weights round differently
    tolerance = 0.1 if "bf16" in changes else 1e-4
    both = [
        run(2, output=str(tmp_path / way), per_device_train_batch_size=4, **WAYS[way], **common, **changes)
        for way in ("DDP", "FSDP2")
    ]
    assert_same_curve(both[1], both[0], tolerance)


def test_fsdp2_goes_back_to_the_adapter_that_came(tmp_path, common) -> None:
    """The reference is the policy at step 0: its adapter was trained before, and shards are put in its place."""
    one = run(1, output=str(tmp_path / "one"), per_device_train_batch_size=8, trained_adapter=True, **common)
    way = WAYS["FSDP2"] | {"save_strategy": "steps", "save_steps": 4}
    two = run(2, output=str(tmp_path / "two"), per_device_train_batch_size=4, trained_adapter=True, **way, **common)
    assert two[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_curve(two, one)


def test_fsdp2_balances_experts(tmp_path, common) -> None:
    """Against DDP on the same two processes: a load-balancing loss is that of each process's own batch, as in TRL."""
    folder = tmp_path / "mixtral"
    mixtral().save_pretrained(folder)
    load_tokenizer(common["model"]).save_pretrained(folder)
    common = common | {"model": str(folder), "per_device_train_batch_size": 4, "max_steps": 3}
    two = [run(2, output=str(tmp_path / way), **WAYS[way], **common) for way in ("DDP", "FSDP2")]
    for mine, other in zip(two[1][:3], two[0][:3], strict=True):
        assert other["aux_loss"] > 0.1
        for name in ("loss", "aux_loss", "grad_norm", "rewards/margins"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (name, mine["step"])


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_two_processes_continues_from_its_checkpoint(tmp_path, common, one_process, way: str) -> None:
    common = common | WAYS[way] | {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    output = str(tmp_path / "parts")
    # the schedule is that of the whole run
    run(2, output=output, **common, max_steps=6)
    for newer in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(Path(output) / newer)
    got = run(2, output=output, **common, max_steps=6, resume=True)
    assert [line["step"] for line in got if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert_same_curve(got, one_process)


@pytest.mark.parametrize("way", WAYS)
def test_a_reference_that_moves_is_continued_by_two_processes(tmp_path, common, way: str) -> None:
    common = common | WAYS[way] | {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    common |= {"sync_ref_model": True, "ref_model_sync_steps": 2, "output": str(tmp_path / "parts")}
    want = run(2, **common)
    for newer in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "parts" / newer)
    got = run(2, resume=True, **common)
    assert_same_curve(got, want)


def test_reference_values_are_complete_where_processes_have_unequal_memory(tmp_path, common, one_process) -> None:
    """The rows of precomputing are split, so all processes must lay out the same ones."""
    changes = {"max_tokens_per_row": "auto", "free_memory": [3 * 2**21, 3 * 2**22], "precompute_ref_log_probs": True}
    output = str(tmp_path / "unequal")
    got = run(2, output=output, per_device_train_batch_size=4, **WAYS["DDP"], **common | changes)
    for mine, other in zip(got[:6], one_process[:6], strict=True):
        # at first policy and reference agree to rounding, so which reward is larger is chance
        for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (name, mine["step"])


def test_the_command_ends_well_in_every_process_and_its_card_tells_what_was_set(tmp_path, common) -> None:
    """A card asks for the default settings; a process that forgets the others over them leaves a barrier out."""
    output = tmp_path / "run"
    words = ["-m", "flexdpo", "train", "--model_name_or_path", common["model"], "--dataset_name", common["data"]]
    words += ["--output_dir", str(output), "--use_cpu", "--max_steps", "2", "--beta", "0.2", "--ddp_backend", "gloo"]
    words += ["--max_tokens_per_row", "60", "--per_device_train_batch_size", "4"]
    # as a user starts it: the setting alone says that it is a CPU, which the defaults do not
    printed = run_processes(words, 2, ACCELERATE_USE_CPU="false")
    assert "written to" in printed[0]
    changes = (output / "README.md").read_text().split("differ from the defaults")[1].split("##")[0]
    changed = dict(re.findall(r"^- (\w+): (.*)$", changes, re.MULTILINE))
    assert changed == {"beta": "0.2", "per_device_train_batch_size": "4"}


LOSS_AT_START = {"sigmoid": math.log(2), "apo_zero_unpaired": 0.5}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired", "sigmoid"])
def test_repeated_examples_are_evaluated_once(tmp_path, common, loss_type: str) -> None:
    # 18 examples in global batches of 8: the last is filled up with repeats
    # after a step no example's loss is another's; kto's step depends on what else stands in a batch, so it takes none
    rate = 0.0 if loss_type == "kto" else 1e-2
    common = common | {"loss_type": [loss_type], "per_device_eval_batch_size": 4, "learning_rate": rate, "max_steps": 1}
    common["max_tokens_per_row"] = 96
    evaluated = []
    for processes in (1, 2):
        output = str(tmp_path / f"of-{processes}")
        way = WAYS["DDP"] if processes > 1 else {}
        lines = run(processes, output=output, per_device_train_batch_size=8 // processes, **way, **common)
        evaluated.append(next(line for line in lines if "eval_loss" in line))
    names = ("eval_logps/chosen", "eval_logps/rejected", *(() if loss_type == "kto" else ("eval_loss",)))
    for name in names:
        assert evaluated[1][name] == pytest.approx(evaluated[0][name], rel=1e-5), name
    if loss_type != "kto":
        assert abs(evaluated[0]["eval_loss"] - LOSS_AT_START[loss_type]) > 0.01


def test_a_mean_over_tokens_is_one_over_those_of_all_processes(tmp_path, common, one_process) -> None:
    curves = []
    for processes in (1, 2):
        way = WAYS["DDP"] if processes > 1 else {}
        output = str(tmp_path / f"tokens-of-{processes}")
        changes = {"loss_type": ["sigmoid", "sft"], "max_tokens_per_row": 96}
        curves.append(
            run(processes, output=output, per_device_train_batch_size=8 // processes, **way, **common | changes)
        )
    for mine, other in zip(curves[1][:6], curves[0][:6], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_curve_of_one_process(tmp_path, common, one_process, stage: int, accumulation: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency of the tests; install it to run this one")
    want = one_process
    if accumulation > 1:
        common = common | {"gradient_accumulation_steps": accumulation}
        want = run(1, output=str(tmp_path / "accumulated"), per_device_train_batch_size=8, **common)
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": 8 * accumulation,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    got = run(2, output=str(tmp_path / "zero"), per_device_train_batch_size=4, deepspeed=config, **common)
    assert_same_curve(got, want)


def test_the_command_line_runs_in_several_processes(tmp_path, saved_model) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(20)))
    config = tmp_path / "run.yaml"
    settings = {"model_name_or_path": str(saved_model("llama")), "dataset_name": str(data), "max_steps": 2}
    settings |= {"output_dir": str(tmp_path / "out"), "use_cpu": True, "ddp_backend": "gloo", "report_to": "none"}
    # accelerate has no FSDP on a CPU; the settings are read all the same
    settings |= {"fsdp": True, "fsdp_config": {"version": 2}, "eval_dataset_name": str(data)}
    config.write_text(json.dumps(settings))
    texts = run_processes(["-m", "flexdpo", "train", "--config", str(config)], 2)
    # one table, of the tokens of both
    assert "tokens run in training" in texts[0]
    assert "tokens run in training" not in texts[1]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("eval_rewards/margins") for line in lines)
    assert (tmp_path / "out" / "model.safetensors").exists()
