"""Rows in pieces where some processes have them and others none, and where threads train side by side."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flexdpo import DPOConfig, DPOTrainer, Group, make_train_step, prepare_model
from tests.conftest import build_model, preference_rows
from tests.objective.test_piecewise import deep_group, given_groups
from tests.processes import free_port, spawn_processes
from tests.training.test_context_parallel import _join

STEPS = 3


def mine(rank: int) -> list[Group]:
    """As many pairs for each process, so that the mean over processes is that over all pairs."""
    return [deep_group(np.random.default_rng(rank))]


def ran(
    model: Any, groups: list[Group], *, steps: int = STEPS, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    accelerator = settings.get("accelerator")
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    step = make_train_step(model, optimizer, ref_model=reference, beta=0.3, **settings)
    losses = [float(step(groups).loss) for _ in range(steps)]
    return losses, {name.removeprefix("module."): each.detach().clone() for name, each in model.named_parameters()}


# each process's budget, and the loss; one that couples a batch runs its rows without gradients first
CASES: list[tuple[list[int | None], str]] = [
    ([41, None], "sigmoid"),
    ([41, 45], "sigmoid"),
    ([41, None], "aot"),
    ([None, None], "aot"),
]


def _work(rank: int, port: int, out: str) -> None:
    _join(rank, 2, port)
    from accelerate import Accelerator

    found = []
    for budgets, loss_type in CASES:
        model, accelerator = prepare_model(build_model("llama")), Accelerator(cpu=True)
        settings = {"max_tokens_per_row": budgets[rank], "loss_type": loss_type}
        found.append(ran(model, mine(rank), accelerator=accelerator, **settings))
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()


@pytest.mark.distributed
def test_processes_with_and_without_pieces(tmp_path) -> None:
    """DDP broadcasts and makes ready at passes that only some processes make, unless it is left out of them."""
    spawn_processes(_work, free_port(), str(tmp_path), count=2)
    losses, weights = ran(prepare_model(build_model("llama")), [*mine(0), *mine(1)])
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number in (0, 1):
        np.testing.assert_allclose(np.mean([each[number][0] for each in found], axis=0), losses, rtol=1e-8)
        for each in found:
            _require_equal(each[number][1], weights)
    for each in found:
        # what is compared within a batch is compared within a process
        np.testing.assert_allclose(each[2][0], each[3][0], rtol=1e-8)
        _require_equal(each[2][1], each[3][1])


def _require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-9)


def test_threads_do_not_see_each_others_pieces() -> None:
    found: dict[tuple[int, bool], Any] = {}

    def run(seed: int, *, alone: bool) -> None:
        model = build_model("gpt2", seed=seed)
        found[seed, alone] = ran(model, given_groups()[1:2], steps=1, max_tokens_per_row=41)

    for seed in (0, 1):
        run(seed, alone=True)
    threads = [threading.Thread(target=run, args=(seed,), kwargs={"alone": False}) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert found[seed, False][0] == found[seed, True][0]
        for name, value in found[seed, True][1].items():
            assert torch.equal(found[seed, False][1][name], value)


@pytest.mark.slow
def test_a_run_in_pieces_is_continued(tmp_path, tokenizer, small_model) -> None:
    from datasets import Dataset

    def trained(folder: str, steps: int, budget: int | None, resume: bool = False) -> Any:
        args = DPOConfig(
            str(tmp_path / folder), use_cpu=True, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
            lr_scheduler_type="constant", logging_steps=1, report_to="none", save_steps=2, disable_tqdm=True,
            regroup_prompts=True, prove=False, max_tokens_per_row=budget,
        )  # fmt: skip
        trainer = DPOTrainer(small_model("llama"), None, args, train_dataset=data, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}, trainer

    rows = preference_rows(8)
    data = Dataset.from_list([{**row, "prompt": rows[number // 4]["prompt"]} for number, row in enumerate(rows)])
    whole, trainer = trained("whole", 4, None)
    groups = [group for batch in trainer.get_train_dataloader() for row in batch["batch"].rows for group in row.groups]
    longest = max(ids.size + group.prompt_ids.size for group in groups for ids in group.response_ids)
    trained("pieces", 2, longest)
    continued, trainer = trained("pieces", 4, longest, resume=True)
    rows_run = [row for batch in trainer.get_train_dataloader() for row in batch["batch"].rows]
    assert any(row.pieces for row in rows_run)
    for name, want in whole.items():
        torch.testing.assert_close(continued[name], want, rtol=1e-4, atol=2e-5)
