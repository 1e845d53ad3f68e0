"""What would fail in the middle of a run, or learn nothing, is refused before it with the way out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import flexdpo
from flexdpo import DPOTrainer, FlexdpoError, PackingCollator, make_train_step
from flexdpo.training.adapters import add_adapter
from tests.conftest import odd_groups, preference_rows
from tests.training.test_trainer import settings


@pytest.fixture
def start(tmp_path: Path, tokenizer: Any, small_model: Any) -> Any:
    def make(
        model: Any = None, rows: Any = 16, ref_model: Any = None, eval_rows: Any = None, peft_config: Any = None,
        optimizers: Any = (None, None), **changes: Any,
    ) -> DPOTrainer:  # fmt: skip
        train, held = (Dataset.from_list(preference_rows(n)) if isinstance(n, int) else n for n in (rows, eval_rows))
        return DPOTrainer(
            small_model() if model is None else model, ref_model, settings(tmp_path, **changes), train_dataset=train,
            eval_dataset=held, processing_class=tokenizer, peft_config=peft_config, optimizers=optimizers,
        )  # fmt: skip

    return make


def labelled(prompts: int, each: int) -> Dataset:
    """Labelled rows, those of a prompt side by side."""
    rows = [(prompt, number) for prompt in range(prompts) for number in range(each)]
    return Dataset.from_list(
        [{"prompt": f"w{5 + p} w6 ", "completion": f"w{20 + p + n} w9", "label": n % 2 == 0} for p, n in rows]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 17}, r"train: .* the last batch of 17 examples in batches of 4 holds one; set dataloader_drop_last"),
        ({"eval_rows": 9}, r"eval: .* the last batch of 9 .* or another per_device_eval_batch_size"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1 holds one prompt; set it to 2 or more"),
        ({"rows": labelled(1, 8)}, "all 8 examples have the same one; use loss_type 'apo_zero_unpaired'"),
    ],
)
def test_a_kto_batch_that_is_sure_to_hold_one_prompt(start: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        start(loss_type="kto", **changes)


def test_kto_trains_on_what_may_well_work(start: Any) -> None:
    assert start(rows=17, loss_type="kto", dataloader_drop_last=True).train().global_step == 5
    # the first rows, on which the run proves itself, have one prompt
    assert start(rows=labelled(8, 2), loss_type="kto", max_steps=1).train().global_step == 1
    by_chance = start(rows=labelled(4, 6), loss_type="kto", per_device_train_batch_size=2, max_steps=24)
    with pytest.raises(FlexdpoError, match=r"all its 2 labelled responses answer the same prompt; use a larger"):
        by_chance.train()


def test_a_run_without_a_step(start: Any) -> None:
    too_large = {"per_device_train_batch_size": 32, "dataloader_drop_last": True}
    with pytest.raises(
        FlexdpoError, match=r"16 examples fill no batch of 32, .*per_device_train_batch_size to at most 16"
    ):
        start(**too_large)
    assert start(**too_large | {"dataloader_drop_last": False}, max_steps=1).train().global_step == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 0}, "the adapter default is scaled by 0 in every layer, .* give its config a lora_alpha"),
        (
            {"modules_to_save": ["lm_head", "foo"]},
            r"modules_to_save=\['foo', 'lm_head'\], and .* has no 'foo' to train",
        ),
        ({"target_parameters": ["foo.weight"]}, "LlamaForCausalLM has no 'foo.weight' to train"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head', where peft takes a list; give \['lm_head'\]"),
    ],
)
def test_an_adapter_that_would_learn_nothing(start: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        start(peft_config=peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}))


@pytest.mark.parametrize("scaled", [{}, {"lora_alpha": 0}], ids=["scaled", "scaled by 0"])
def test_an_adapter_of_several_parts(start: Any, scaled: dict[str, int]) -> None:
    parts = {"modules_to_save": ["lm_head"], "target_parameters": ["k_proj.weight"], "target_modules": ["q_proj"]}
    assert start(peft_config=peft.LoraConfig(r=2, **parts, **scaled)).model.active_adapters == ["default"]


def test_modules_that_get_no_adapter_are_named(small_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for targets in (["q_proj", "mlp.up_proj"], "all-linear", ".*q_pro[j]", None):
        add_adapter(small_model(), peft.LoraConfig(r=2, target_modules=targets))
    assert not caplog.text
    add_adapter(small_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "c_attn", "proj"]))
    assert "LlamaForCausalLM has no 'c_attn', 'proj', so only the others get an adapter" in caplog.text


def test_options_without_effect_on_what_is_given(start: Any, saved_model: Any) -> None:
    stream = Dataset.from_list(preference_rows(8)).to_iterable_dataset()
    with pytest.raises(
        FlexdpoError, match=r"dataset_num_proc=2 has no effect on train, a stream .*; set dataloader_num"
    ):
        start(rows=stream, max_steps=1, dataset_num_proc=2)
    with pytest.raises(FlexdpoError, match=r"revision 'v1' has no effect: .* is a folder here"):
        start(str(saved_model("llama")), model_init_kwargs={"revision": "v1"})


def test_an_optimizer_of_another_model(start: Any, small_model: Any) -> None:
    model = small_model()
    assert start(model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), max_steps=1).train().global_step
    with pytest.raises(FlexdpoError, match=r"the optimizer has 12 weights and none of them is a trainable one of this"):
        start(optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


@pytest.mark.parametrize("norm", [-1, 0, float("nan"), "1"])
def test_norms_that_nothing_can_be_clipped_to(small_model: Any, norm: Any) -> None:
    model = small_model()
    with pytest.raises(FlexdpoError, match=r"max_grad_norm must be a number above 0, got .*; None clips nothing"):
        make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=norm)
    with pytest.raises(FlexdpoError, match="pad_to_multiple_of must be at least 1, got 0"):
        make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), pad_to_multiple_of=0)


def test_what_a_trainer_is_asked_for_in_vain(start: Any, tmp_path: Path, saved_model: Any) -> None:
    trainer = start(saved_model("llama"), eval_rows=DatasetDict(a=Dataset.from_list(preference_rows(8))))
    for ask, message in {
        lambda: trainer.evaluate("b"): r"no eval_dataset is called 'b', found 'a'; name one",
        lambda: trainer.predict(trainer.train_dataset): r"no predictions, .*; call evaluate",
        lambda: trainer.train(resume_from_checkpoint=3): r"must be a folder, or True for the last one, got int \(3\)",
        lambda: start(ref_model="gpt2"): r"ref_model must be a loaded model, got str \('gpt2'\); load it",
        lambda: start(eval_rows=[1]): r"eval: expected a datasets.Dataset, found list",
        lambda: start(rows=3.5): r"train: expected a datasets.Dataset, found float",
        lambda: PackingCollator()(preference_rows(1)): r"these have no 'prompt_ids', .*tokenize_preferences first",
        lambda: settings(tmp_path, padding_free=True): r"no setting 'padding_free'; leave it out\. README",
        lambda: settings(tmp_path, learning_rat=1): r"no setting 'learning_rat'; did you mean 'learning_rate'",
    }.items():
        with pytest.raises(FlexdpoError, match=message):
            ask()


def test_several_splits_are_no_training_data(start: Any) -> None:
    data = Dataset.from_list(preference_rows(8))
    with pytest.raises(FlexdpoError, match=r"a DatasetDict of 'a', 'b'; give one .* train_dataset=data\['a'\]"):
        start(rows=DatasetDict(a=data, b=data))
    assert set(start(eval_rows=DatasetDict(a=data, b=data)).eval_dataset) == {"a", "b"}


def test_models_that_predict_no_tokens(start: Any, small_model: Any) -> None:
    for model in (LlamaForSequenceClassification(small_model().config), small_model().model):
        message = f"{type(model).__name__} predicts no tokens, it has no language-model head; load it as a causal LM"
        with pytest.raises(FlexdpoError, match=message):
            start(model)
        with pytest.raises(FlexdpoError, match=message):
            start(ref_model=model)
        with pytest.raises(FlexdpoError, match=message):
            make_train_step(model, torch.optim.SGD(model.parameters()))


class Nameless(LlamaForCausalLM):
    """A model of somebody's own, which does not say which of its layers is the head."""

    def get_output_embeddings(self) -> None:
        """It has one that it does not name."""

    def can_generate(self) -> bool:
        """Nor does it generate."""
        return False

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        """Its outputs may be a tuple."""
        output = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        return output.to_tuple() if self.config.name_or_path == "tuple" else output


def test_a_head_that_is_not_named(small_model: Any) -> None:
    def step_of(kind: Any, name: str = "") -> Any:
        model = kind(small_model().config)
        model.load_state_dict(small_model().state_dict())
        model.config.name_or_path = name
        return make_train_step(model, torch.optim.SGD(model.parameters()))(odd_groups(np.random.default_rng(0)))

    torch.testing.assert_close(step_of(Nameless).grad_norm, step_of(LlamaForCausalLM).grad_norm)
    with pytest.raises(FlexdpoError, match=r"Nameless returns tuple .* without logits \[rows, .*; load a causal LM"):
        step_of(Nameless, "tuple")


def test_training_twice_proves_all_but_the_reference(start: Any) -> None:
    trainer = start(max_steps=2)
    trainer.train()
    first = trainer.proof
    trainer.train()
    assert first is not trainer.proof
    assert "the reference within" in first.line()
    assert "the reference within" not in trainer.proof.line()


def test_the_order_of_the_data_is_the_settings_alone(start: Any) -> None:
    def order(seed: int, **changes: Any) -> list[int]:
        trainer = start(**changes)
        torch.manual_seed(seed)
        return [int(row) for batch in trainer.get_train_dataloader() for row in batch["example_rows"]]

    assert order(1) == order(2) == order(3, data_seed=42)
    assert order(1) != order(1, data_seed=7)


def test_prefixes_that_are_shared_twice(start: Any, small_model: Any) -> None:
    trainer = start()
    with pytest.raises(FlexdpoError, match="flexdpo's own DPOTrainer shares prefixes itself"):
        flexdpo.trl.enable(trainer)
    shared = r"this LlamaForCausalLM shares prefixes already .* call flexdpo.unshare\(model\)"
    flexdpo.share_prefixes(trainer.model)
    with pytest.raises(FlexdpoError, match=shared):
        trainer.train()
    model = small_model()
    with flexdpo.share_prefixes(model):
        for make in (start, lambda model: make_train_step(model, torch.optim.SGD(model.parameters()))):
            with pytest.raises(FlexdpoError, match=shared):
                make(model)
    start(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": None}, r"optimizer must be a torch.optim.Optimizer, got NoneType \(None\); make one of"),
        (
            {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters())},
            "2 weights and none of them is a trainable",
        ),
        ({"betta": 1}, "make_train_step takes no betta=1; did you mean 'beta'"),
        ({"loss_type": None}, r"loss_type must be a list of texts, got NoneType \(None\)"),
        ({"beta": "0.1"}, r"beta must be a number, got str \('0.1'\)"),
        ({"loss_weights": [0.0]}, "leaves no loss"),
        ({"max_tokens_per_row": 2.5}, "max_tokens_per_row must be a whole number, at least 1, got float"),
    ],
)
def test_a_step_of_ones_own_that_cannot_be(small_model: Any, changes: dict[str, Any], message: str) -> None:
    model = small_model()
    with pytest.raises(FlexdpoError, match=message):
        make_train_step(model, **{"optimizer": torch.optim.SGD(model.parameters()), **changes})


def test_no_list_of_groups(small_model: Any, rng: Any) -> None:
    model = small_model()
    step = make_train_step(model, torch.optim.SGD(model.parameters()))
    for groups, message in (
        ([], "one group at least, got an empty list"),
        (odd_groups(rng)[0], "expected a list of flexdpo.Group, got Group"),
        (["x"], r"got str \('x'\) in it"),
    ):
        with pytest.raises(FlexdpoError, match=message):
            step(groups)


@pytest.mark.parametrize("changes", [{"max_tokens_per_row": "x"}, {"max_tokens_per_row": 0}, {"pad_to_multiple_of": 0}])
def test_a_collator_of_no_length(changes: dict[str, Any]) -> None:
    with pytest.raises(FlexdpoError, match=f"{next(iter(changes))} must be .*at least 1, got"):
        PackingCollator(**changes)
    with pytest.raises(FlexdpoError, match="one tokenised row at least, got none"):
        PackingCollator(100)([])
