"""Training on images is the ordinary run: TRL's own batches, each pair by itself, through the stock model."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset

from flexdpo import DPOConfig, DPOTrainer, FlexdpoError
from flexdpo.cli import main
from flexdpo.data.images import images_of_row
from flexdpo.layout.images import joined_inputs
from flexdpo.training import run_data
from tests.images import processors
from tests.images.all_processors import PROCESSORS, processor_of
from tests.images.models import make_model

trl = pytest.importorskip("trl")

MAKERS = {
    "llava": (processors.llava_model, processors.llava_processor),
    "qwen2_vl": (processors.qwen_model, processors.qwen_processor),
}
# the others, each with the processor that transformers has for it
OTHERS = {name: (partial(make_model, name, dtype=torch.float32), partial(processor_of, name)) for name in PROCESSORS}
EVERY_KIND = [*MAKERS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
# what makes other things of several images than of each alone
ONE_IMAGE = "llava_onevision"
# tokens of a row, more than those of its longest pair
ROOM = {"llava_next": 140, "gemma4": 140}
BETA = 0.3


def _stock_loss(model: Any, reference: Any, processor: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of one pair: TRL's collator, the model as transformers made it, and DPO's loss by hand."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    batch = DataCollatorForVisionPreference(processor)([copy.deepcopy(row)])
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    sums = []
    for each in (model, reference):
        logits = each(**inputs, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        sums.append((logps * batch["completion_mask"][:, 1:]).sum(-1))
    margin = (sums[0] - sums[1]) @ torch.tensor([1.0, -1.0], dtype=sums[0].dtype)
    return -torch.nn.functional.logsigmoid(BETA * margin)


def _config(folder: Path, **settings: Any) -> DPOConfig:
    given = {"beta": BETA, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3, "use_cpu": True}
    return DPOConfig(str(folder), **{**given, "bf16": False, "max_length": None, **settings})


def _moved(model: Any) -> Any:
    """Another model nearby, so that a policy differs from its reference."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for weight in moved.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return moved


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="rows"),
        pytest.param({"sharing": "step", "activation_checkpointing": True}, id="step", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_stock_runs(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    make, make_processor = {**MAKERS, **OTHERS}[kind]
    model, processor, rows = make(), make_processor(), processors.rows()
    if kind == ONE_IMAGE:
        with pytest.raises(FlexdpoError, match=r"of its 2 images together than of each.* give one image a prompt"):
            DPOTrainer(model, None, _config(tmp_path), train_dataset=_dataset(rows), processing_class=processor)
        rows = [row for row in rows if len(row["images"]) < 2]
    reference = _moved(model)
    stock, stock_reference = copy.deepcopy(model).train(), copy.deepcopy(reference)
    want = []
    for row in rows:
        loss = _stock_loss(stock, stock_reference, processor, row)
        (loss / len(rows)).backward()
        want.append(loss.item())
    trainer = DPOTrainer(
        model,
        reference,
        _config(tmp_path, per_device_train_batch_size=len(rows), max_tokens_per_row=ROOM.get(kind, 90), **settings),
        train_dataset=Dataset.from_list(processors.in_parts(rows)),
        processing_class=processor,
    )
    [inputs] = list(trainer.get_train_dataloader())
    trainer.optimizer = torch.optim.SGD(model.parameters())
    trainer.current_gradient_accumulation_steps = 1
    batch = inputs["batch"]
    assert len(batch.rows) > 1
    # processes synchronise the tower's gradients at the last row
    assert [row.layout.images is not None for row in batch.rows] == sorted(
        row.layout.images is not None for row in batch.rows
    )
    assert batch.rows[-1].layout.images is not None
    loss = trainer.training_step(trainer.model, inputs)
    assert loss.item() == pytest.approx(sum(want) / len(want), rel=1e-5)
    for (name, got), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if expected.grad is None:
            assert got.grad is None or not got.grad.any(), name
            continue
        scale = max(expected.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(got.grad / scale, expected.grad / scale, atol=2e-5, rtol=0, msg=name)
    distinct = sum(len({image.digest for group in row.groups for image in group.images}) for row in batch.rows)
    unshared = 2 * sum(len(row["images"]) for row in rows)
    assert (trainer.tokens["images"], trainer.tokens["images_unshared"]) == (distinct, unshared)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_tokens_and_pixels_are_those_of_the_processor(tmp_path: Path, kind: str) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    make, make_processor = {**MAKERS, **OTHERS}[kind]
    rows = [row for row in processors.rows() if kind != ONE_IMAGE or len(row["images"]) < 2]
    trainer = _trainer(tmp_path, rows, model=make(), processing_class=make_processor())
    for row, tokenised in zip(rows, trainer.train_dataset, strict=True):
        batch = DataCollatorForVisionPreference(make_processor())([copy.deepcopy(row)])
        ids = [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert ids == [tokenised["prompt_ids"] + response for response in tokenised["response_ids"]]
        # of the chosen and of the rejected response
        images = [image.inputs for image in images_of_row(tokenised)[0]] * 2
        told = {name for name in batch if not name.endswith(("_ids", "_mask")) or name.startswith(("image_", "pixel_"))}
        assert told == {name for image in images for name in image}
        for name in told:
            side_by_side = torch.cat([image[name].flatten() for image in images])
            filled_up = joined_inputs(images)[name].flatten()
            assert any(torch.equal(batch[name].flatten(), each) for each in (side_by_side, filled_up)), name


def _trainer(folder: Path, rows: list[dict[str, Any]], **given: Any) -> DPOTrainer:
    settings = given.pop("settings", {})
    given = {"processing_class": processors.llava_processor(), "train_dataset": _dataset(rows), **given}
    return DPOTrainer(given.pop("model", None) or processors.llava_model(), None, _config(folder, **settings), **given)


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(processors.in_parts(rows))


def _curve(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_reference_that_is_precomputed_knows_images_apart(tmp_path: Path) -> None:
    rows = processors.rows()
    # two prompts that differ in the image alone, and one image in several
    steps = {"max_steps": 3, "per_device_train_batch_size": 5, "logging_steps": 1}
    plain = _trainer(tmp_path / "a", rows, settings=steps)
    plain.train()
    kept = _trainer(tmp_path / "b", rows, settings={**steps, "precompute_ref_log_probs": True})
    sums = [row["ref_response_logps"] for row in kept.train_dataset]
    kept.train()
    assert _curve(kept) == pytest.approx(_curve(plain), abs=1e-6)
    # the same texts with other images are found nowhere in the cache
    swapped = [{**row, "images": [processors.picture(7)] * len(row["images"])} for row in rows]
    others = _trainer(tmp_path / "c", swapped, settings={**steps, "precompute_ref_log_probs": True}).train_dataset
    differs = [abs(a[0] - b[0]) > 1e-4 for a, b in zip(sums, others["ref_response_logps"], strict=True)]
    assert differs == [True, True, True, False, True]


def test_what_an_encoder_keeps_is_said_to_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(run_data.logger, "warning", told.append)
    trainer = _trainer(tmp_path, processors.rows(), settings={"max_tokens_per_row": "auto"})
    assert trainer.row_plan.max_tokens_per_row > 0
    assert [line for line in told if "not what the part that encodes them keeps" in line]


@pytest.mark.slow
def test_evaluation_accumulation_and_streams(tmp_path: Path) -> None:
    rows = processors.rows()
    steps = {"max_steps": 2, "logging_steps": 1}
    whole = _trainer(
        tmp_path / "a", rows[:4], eval_dataset=_dataset(rows), settings={**steps, "per_device_train_batch_size": 4}
    )
    want = whole.evaluate()
    whole.train()
    in_parts = {**steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parted = _trainer(tmp_path / "b", rows[:4], settings=in_parts)
    parted.train()
    assert _curve(parted) == pytest.approx(_curve(whole), abs=1e-6)
    assert parted.evaluate(_dataset(rows))["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-6)
    assert want["eval_loss"] == pytest.approx(0.6931, abs=1e-4)

    def again() -> Any:
        yield from rows[:4]

    stream = IterableDataset.from_generator(again)
    streamed = _trainer(
        tmp_path / "c", rows, train_dataset=stream, settings={**steps, "per_device_train_batch_size": 4}
    )
    streamed.train()
    assert _curve(streamed) == pytest.approx(_curve(whole), abs=1e-6)


@pytest.mark.slow
def test_a_run_with_an_adapter_goes_on_where_it_stopped(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    settings["per_device_train_batch_size"] = 2
    rows = processors.rows()
    whole = _trainer(tmp_path / "a", rows, peft_config=adapter, settings=settings)
    whole.train()
    assert whole.proof is not None
    assert (whole.proof.images, whole.proof.failures) == (2, [])
    assert "2 images among them, gradients of the parts that see them were not compared" in whole.proof.line()
    again = _trainer(tmp_path / "a", rows, peft_config=adapter, settings=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, got), (_, want) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    assert again.tokens == whole.tokens
    # what is learned from is the pictures too
    swapped = [{**row, "images": [processors.picture(7)] * len(row["images"])} for row in rows]
    other = _trainer(tmp_path / "a", swapped, peft_config=adapter, settings=settings)
    with pytest.raises(FlexdpoError, match="data"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_models_and_processors_that_do_not_go_with_the_data(tmp_path: Path) -> None:
    rows, tokenizer = processors.rows(), processors.llava_processor().tokenizer
    with pytest.raises(FlexdpoError, match="images are read by a processor, and here is a tokenizer alone"):
        _trainer(tmp_path, rows, processing_class=tokenizer)
    folder = tmp_path / "model"
    processors.llava_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(FlexdpoError, match="processor"):
        _trainer(tmp_path, rows, model=str(folder), processing_class=None)


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_model_that_generates(tmp_path: Path) -> None:
    model = tmp_path / "model"
    processors.llava_model().save_pretrained(model)
    processors.llava_processor().save_pretrained(model)
    file = processors.written_rows(tmp_path / "data")
    out = tmp_path / "out"
    words = f"train --model_name_or_path {model} --dataset_name {file} --output_dir {out} --max_steps 10"
    words += " --per_device_train_batch_size 4 --logging_steps 1 --report_to none --use_cpu true --learning_rate 1e-3"
    assert main(words.split()) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "images/run" in line]
    assert len(logged) == 10
    # one row a batch of 4, 4 and 2 pairs: the distinct pictures of its prompts, which the ordinary run sees twice each
    assert logged[-1]["images/unshared"] == 2 * (3 * 10 + 4)
    pictures = [number % 4 for number in range(10)]
    assert logged[2]["images/run"] <= 4 + 4 + 2 < len(pictures) * 2
    processor = transformers.AutoProcessor.from_pretrained(out)
    trained = transformers.AutoModelForImageTextToText.from_pretrained(out)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5 w6"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[[processors.picture(1)]], text=[text], return_tensors="pt", add_special_tokens=False)
    made = trained.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
