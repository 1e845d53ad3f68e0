"""The trainer against an ordinary loop, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM, TrainerCallback, TrainingArguments

from flexdpo import DPOConfig, DPOTrainer, FlexdpoError, UnsupportedModelError
from flexdpo.data.lengths import token_counts
from flexdpo.objective.logps import response_logps
from flexdpo.objective.loss_types import LOSS_TYPES
from flexdpo.runs.job import MetricsFile
from tests.conftest import preference_rows


def settings(folder: Path, **changes: Any) -> DPOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DPOConfig(output_dir=str(folder), **{**defaults, **changes})


def history(trainer: DPOTrainer, key: str) -> list[float]:
    trainer.train()
    return [line[key] for line in trainer.state.log_history if "loss" in line]


def ordinary_losses(model: Any, tokenizer: Any, data: list[dict[str, str]], args: DPOConfig) -> list[float]:
    """DPO written out: one sequence at a time, torch's own optimizer, pairs in the order of the file."""
    model = copy.deepcopy(model).eval()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)

    def logp(of: Any, prompt: str, response: str) -> torch.Tensor:
        start = len(tokenizer(prompt).input_ids)
        ids = [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
        logps = of(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return sum(logps[i - 1, ids[i]] for i in range(start, len(ids)))

    losses = []
    pairs = data * args.max_steps
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for step in range(args.max_steps):
        losses.append(0.0)
        for row in pairs[step * size : (step + 1) * size]:
            ratios = []
            for column in ("chosen", "rejected"):
                with torch.no_grad():
                    base = logp(reference, row["prompt"], row[column])
                ratios.append(logp(model, row["prompt"], row[column]) - base)
            loss = -F.logsigmoid(args.beta * (ratios[0] - ratios[1])) / size
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


WAYS: list[dict[str, Any]] = [
    {},
    {"max_tokens_per_row": 56},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"precompute_ref_log_probs": True},
    {"activation_checkpointing": True},
    {"pad_to_multiple_of": 128},
    {"sharing": "step"},
    {"max_tokens_per_row": "auto"},
    {"attn_kernel_lengths": "bucket"},
]


@pytest.fixture(scope="module")
def ordinary_curve(tokenizer, small_model) -> Callable[[DPOConfig], list[float]]:
    """The ordinary losses of a run, computed once for all that cut a step alike."""
    made: dict[tuple[int, int], list[float]] = {}

    def curve(args: DPOConfig) -> list[float]:
        cut = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
        if cut not in made:
            made[cut] = ordinary_losses(small_model("mistral"), tokenizer, preference_rows(24), args)
        return made[cut]

    return curve


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_the_loss_curve_is_the_ordinary_one(
    tmp_path, tokenizer, preferences, small_model, ordinary_curve, changes
) -> None:
    args = settings(tmp_path, train_sampling_strategy="sequential", **changes)
    model = small_model("mistral")
    want = ordinary_curve(args)
    trainer = DPOTrainer(model, None, args, train_dataset=preferences, processing_class=tokenizer)
    assert history(trainer, "loss") == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_give_the_ordinary_curve_and_are_compiled_once(tmp_path, tokenizer, small_model) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    data = Dataset.from_list(preference_rows(60))
    # what is traced and when is the same with every backend
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    curves, graphs = [], []
    for changes in ({}, compiled):
        args = settings(tmp_path, max_steps=50, max_tokens_per_row=150, **changes)
        trainer = DPOTrainer(small_model(), None, args, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(_OnStep(lambda: graphs.append(counters["stats"]["unique_graphs"])))
        curves.append(history(trainer, "loss"))
        # layer by layer, never the whole model
        assert trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=True) is trainer.model
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    warm = graphs[50:]
    assert warm[0] > graphs[49]
    # rows come in dozens of lengths
    assert warm[1] == warm[-1]


class _OnStep(TrainerCallback):
    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.do()


def test_the_curve_is_that_of_trl(tmp_path, tokenizer, preferences, small_model) -> None:
    """Same seed, same pairs in the same shuffled order, same rewards: an unmodified TRL run is the reference."""
    import trl

    common = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "max_length": 32}
    args = settings(tmp_path, **common)
    ours = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    model = small_model()
    model.config._name_or_path = str(tmp_path / "policy")
    model.save_pretrained(tmp_path / "policy")
    kept = {
        k: getattr(args, k) for k in ("per_device_train_batch_size", "max_steps", "learning_rate", "lr_scheduler_type")
    }
    their_args = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **common,
        **kept,
    )
    theirs = trl.DPOTrainer(model, None, their_args, train_dataset=preferences, processing_class=tokenizer)
    ours.train()
    theirs.train()
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    names += ["logps/chosen", "logps/rejected"]
    for mine, other in zip(ours.state.log_history[:5], theirs.state.log_history[:5], strict=True):
        for name in names:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_is_the_same_in_one_row_and_in_several(
    tmp_path, tokenizer, preferences, small_model, loss_type
) -> None:
    """Losses that sort or average over the batch too."""
    curves = []
    for budget in (None, 110):
        smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
        args = settings(
            tmp_path, loss_type=loss_type, label_smoothing=smoothing, max_tokens_per_row=budget,
            max_steps=2, prove=False,
        )  # fmt: skip
        trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
        batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["batch"]]
        assert (len(batches[0].rows) > 1) is (budget is not None)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        curves.append([line[key] for line in lines for key in ("loss", "grad_norm")])
    assert curves[0] == pytest.approx(curves[1], rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sampling_strategies_of_transformers_work(tmp_path, tokenizer, preferences, small_model, strategy) -> None:
    args = settings(tmp_path, train_sampling_strategy=strategy, num_train_epochs=1, max_steps=-1)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    order = list(trainer.get_train_dataloader().batch_sampler.sampler)
    assert sorted(order) == list(range(24))
    if strategy == "group_by_length":
        lengths = [sum(len(r["prompt_ids"]) + len(x) for x in r["response_ids"]) for r in trainer.train_dataset]
        # the longest comes first, so that memory runs out at once or not at all
        assert lengths[order[0]] == max(lengths)
    trainer.train()


def test_counts_of_tokens(tmp_path, tokenizer, preferences, small_model) -> None:
    data = DPOTrainer(
        small_model(), None, settings(tmp_path), train_dataset=preferences, processing_class=tokenizer
    ).train_dataset.select(range(3, 17))
    responses = [[len(x) for x in row["response_ids"]] for row in data]
    prompts = [len(row["prompt_ids"]) for row in data]
    assert token_counts(data, shared=True).tolist() == [p + sum(r) for p, r in zip(prompts, responses, strict=True)]
    assert token_counts(data, shared=False).tolist() == [
        p * len(r) + sum(r) for p, r in zip(prompts, responses, strict=True)
    ]


def test_regrouped_prompts_run_each_response_once(tmp_path, tokenizer, small_model) -> None:
    rows = [
        {"prompt": "w5 w6 w7 ", "chosen": "w8", "rejected": "w9"},
        {"prompt": "w5 w6 w7 ", "chosen": "w8", "rejected": "w10 w11"},
        {"prompt": "w12 ", "chosen": "w8", "rejected": "w9"},
        {"prompt": "w5 w6 w7 ", "chosen": "w9", "rejected": "w10 w11"},
    ]
    args = settings(tmp_path, regroup_prompts=True, max_steps=1, per_device_train_batch_size=2)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert [len(row["response_ids"]) for row in trainer.train_dataset] == [3, 2]
    pairs = DPOTrainer(
        small_model(), None, settings(tmp_path, max_steps=1), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    grouped, separate = (history(t, "grad_norm")[0] for t in (trainer, pairs))
    assert grouped == pytest.approx(separate, rel=1e-5)
    assert trainer.tokens["run"] < pairs.tokens["run"]


def test_the_reference_follows_the_policy(tmp_path, tokenizer, preferences, small_model) -> None:
    args = settings(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, max_steps=4)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=preferences, processing_class=tokenizer)
    losses = history(trainer, "loss")
    # a hard update makes them one model again, so the step after it starts at ln 2
    assert losses[2] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-6)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(trainer.ref_model.state_dict()[name], weight)


def test_precomputed_values_are_kept_for_the_next_run(
    tmp_path, tokenizer, preferences, small_model, monkeypatch
) -> None:
    args = settings(tmp_path, precompute_ref_log_probs=True, max_steps=2, ld_alpha=0.5)

    def build() -> DPOTrainer:
        return DPOTrainer(
            small_model(), None, args, train_dataset=preferences, eval_dataset=preferences.select(range(6)),
            processing_class=tokenizer,
        )  # fmt: skip

    first = build()
    assert {"ref_response_logps", "ref_pair_logps"} <= set(first.train_dataset.column_names)
    monkeypatch.setattr(DPOTrainer, "reference_logps", lambda *_: pytest.fail("computed a second time"))
    second = build()
    assert second.train_dataset["ref_response_logps"] == first.train_dataset["ref_response_logps"]
    assert history(second, "loss") == history(first, "loss")


# each way with one of two models, the plain one with both
@pytest.mark.parametrize(
    ("name", "changes"),
    [("qwen3", {}), *((("llama", "qwen3")[number % 2], way) for number, way in enumerate(WAYS))],
    ids=str,
)
def test_the_first_loss_is_ln_2(tmp_path, tokenizer, preferences, small_model, name, changes) -> None:
    args = settings(tmp_path, **{**changes, "max_steps": 1})
    trainer = DPOTrainer(small_model(name), None, args, train_dataset=preferences, processing_class=tokenizer)
    assert history(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("ready_made", [False, True], ids=["peft_config", "trained PeftModel"])
def test_adapters_start_at_ln_2_and_leave_the_base_alone(
    tmp_path, tokenizer, preferences, small_model, ready_made
) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = small_model()
    base = {name: p.clone() for name, p in model.state_dict().items()}
    if ready_made:
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    trainer = DPOTrainer(
        model,
        None,
        settings(tmp_path),
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=None if ready_made else lora,
    )
    losses = history(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] != losses[0]
    after = trainer.model.get_base_model().state_dict()
    for name, before in base.items():
        torch.testing.assert_close(after.get(name, after.get(name.replace(".weight", ".base_layer.weight"))), before)
    frozen = [n for n, p in trainer.model.named_parameters() if ".ref." in n and p.requires_grad]
    assert frozen == []


def test_metrics_and_evaluation(tmp_path, tokenizer, preferences, small_model) -> None:
    file = tmp_path / "metrics.jsonl"
    trainer = DPOTrainer(
        small_model(),
        None,
        settings(tmp_path, eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=5),
        train_dataset=preferences,
        eval_dataset=preferences.select(range(7)),
        processing_class=tokenizer,
        callbacks=[MetricsFile(file, phase="dpo")],
    )
    trainer.train()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    expected = {f"{group}/{name}" for group in ("rewards", "logps") for name in ("chosen", "rejected")}
    expected |= {"rewards/accuracies", "rewards/margins"}
    first = lines[0]
    assert expected | {"loss", "step", "phase", "tokens/run", "tokens/unshared"} <= first.keys()
    assert first["tokens/run"] < first["tokens/unshared"]
    evaluated = next(line for line in lines if "eval_loss" in line)
    assert {f"eval_{name}" for name in expected} <= evaluated.keys()
    # an evaluation mean counts every pair once, though the last batch is smaller
    again = trainer.evaluate(preferences.select(range(7)))
    for name in expected:
        assert again[f"eval_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-4)
    margin = again["eval_rewards/chosen"] - again["eval_rewards/rejected"]
    assert again["eval_rewards/margins"] == pytest.approx(margin, rel=1e-4)


def test_tokens_are_those_of_the_data(tmp_path, tokenizer, preferences, small_model) -> None:
    trainer = DPOTrainer(
        small_model(), None, settings(tmp_path, max_steps=-1, num_train_epochs=1), train_dataset=preferences,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    run = unshared = 0
    for row in trainer.train_dataset:
        prompt, responses = row["prompt_ids"], row["response_ids"]
        unshared += sum(len(prompt) + len(response) for response in responses)
        run += len(
            {tuple(prompt + response)[:n] for response in responses for n in range(1, len(prompt + response) + 1)}
        )
    assert trainer.tokens == {"run": run, "unshared": unshared}


def test_k_responses_and_supervised_groups_train(tmp_path, tokenizer, small_model) -> None:
    rows = [
        {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9], [8, 10], [11]], "edges": [[0, 1], [0, 2]], "row": 0},
        {"prompt_ids": [5, 6], "response_ids": [[12, 9], [14]], "edges": [[1, 0]], "row": 1},
    ] * 4
    trainer = DPOTrainer(
        small_model(), None, settings(tmp_path), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert history(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 2]], "edges": [], "row": i} for i in range(8)]
    supervised = Dataset.from_list(rows).cast_column("edges", _edges_feature())
    args = settings(tmp_path, loss_type="sft")
    trainer = DPOTrainer(small_model(), None, args, train_dataset=supervised, processing_class=tokenizer)
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_single_labels_train(tmp_path, tokenizer, small_model, loss_type) -> None:
    rows = [{"prompt": f"w{5 + i} w6 ", "completion": f"w{20 + i}", "label": i % 2 == 0} for i in range(12)]
    args = settings(tmp_path, loss_type=loss_type, max_steps=24, learning_rate=3e-3)
    trainer = DPOTrainer(small_model(), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    gained = {True: [], False: []}
    for row in trainer.train_dataset:
        # kto wants a response to another prompt
        other = next(each for each in trainer.train_dataset if each["prompt_ids"] != row["prompt_ids"])
        packed = trainer.data_collator([row, other])["batch"].rows[0]
        with torch.no_grad():
            difference = response_logps(trainer.model, packed).sums - trainer.reference_logps(packed).sums
        gained[row["labels"][0]].append(difference[0].item())
    assert sum(gained[True]) / 6 > sum(gained[False]) / 6 + 1
    words = Dataset.from_list([{**row, "label": "perhaps"} for row in rows])
    with pytest.raises(FlexdpoError, match=r"row 0 .*column 'label': expected true or false \(also .*'perhaps'"):
        DPOTrainer(small_model(), None, args, train_dataset=words, processing_class=tokenizer)


def _edges_feature() -> Any:
    from datasets import List, Value

    return List(List(Value("int64")))


# --- what cannot work says so ----------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_exact_is_refused(tmp_path, tokenizer, preferences) -> None:
    config = BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM .* cannot be exact on shared, packed rows: "):
        DPOTrainer(
            BloomForCausalLM(config), None, settings(tmp_path), train_dataset=preferences, processing_class=tokenizer
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "sigmod"}, r"unknown loss_type 'sigmod'; did you mean 'sigmoid'\?; known: "),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 values for 2 losses"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' is not supported"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "sync_ref_model moves the reference, which"),
        ({"precompute_ref_log_probs": True, "loss_type": "kto"}, "so its reference cannot be precomputed"),
        ({"loss_type": "simpo", "sync_ref_model": True}, "loss_type simpo uses no reference; leave sync_ref_model out"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"attn_impl": "flax"}, r"impl must be one of .*'flax'; did you mean 'flex'"),
        (
            {"attn_impl": "varlen", "attn_kernel_options": {"BLOCK_M": 64}},
            "no effect with attn_impl='varlen'; leave one of them out",
        ),
    ],
)
def test_bad_settings(tmp_path, changes, message) -> None:
    with pytest.raises(FlexdpoError, match=message):
        settings(tmp_path, **changes)


def test_bad_combinations(tmp_path, tokenizer, preferences, small_model) -> None:
    def train(model: Any = None, ref_model: Any = None, **changes: Any) -> None:
        arguments = {"train_dataset": preferences, "processing_class": tokenizer, **changes.pop("given", {})}
        DPOTrainer(model or small_model(), ref_model, settings(tmp_path, **changes), **arguments).train()

    same = small_model()
    with pytest.raises(FlexdpoError, match="model and ref_model are the same object"):
        train(same, same)
    with pytest.raises(FlexdpoError, match="loss_type sft uses no reference; leave ref_model out"):
        train(None, small_model(), loss_type="sft")
    with pytest.raises(FlexdpoError, match="give its tokenizer, or its processor, as processing_class="):
        train(given={"processing_class": None})
    with pytest.raises(FlexdpoError, match=r"must be a tokenizer, or a processor .*, got SimpleNamespace"):
        train(given={"processing_class": SimpleNamespace(tokenizer=tokenizer)})
    with pytest.raises(FlexdpoError, match=r"args must be a flexdpo\.DPOConfig, got transformers.*TrainingArguments"):
        DPOTrainer(small_model(), None, TrainingArguments(str(tmp_path)), train_dataset=preferences)
    with pytest.raises(FlexdpoError, match="compute_metrics needs full logits"):
        train(given={"compute_metrics": lambda x: {}})
    with pytest.raises(FlexdpoError, match=r"peft_config must be a peft\.PeftConfig such as LoraConfig, got dict"):
        train(given={"peft_config": {"r": 4}})
    with pytest.raises(FlexdpoError, match=r"row 0 has a sequence of \d+ tokens .*_per_row=8 leaves room for 8"):
        DPOTrainer(
            small_model(), None, settings(tmp_path, max_tokens_per_row=8), train_dataset=preferences,
            processing_class=tokenizer,
        )  # fmt: skip
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 2]], "edges": [], "row": i} for i in range(8)]
    supervised = Dataset.from_list(rows).cast_column("edges", _edges_feature())
    with pytest.raises(FlexdpoError, match="sigmoid compares responses, and the data have single completions; use"):
        train(given={"train_dataset": supervised})


def test_a_tokenizer_larger_than_the_model(tmp_path, tokenizer, preferences, small_model) -> None:
    model = small_model()
    model.resize_token_embeddings(90)
    with pytest.raises(FlexdpoError, match=r"the tokenizer has 97 tokens but the model embeds 90"):
        DPOTrainer(model, None, settings(tmp_path), train_dataset=preferences, processing_class=tokenizer)


def test_more_positions_than_a_learned_table_has(tmp_path, tokenizer, small_model) -> None:
    long = Dataset.from_list([{"prompt": "w5 " * 300, "chosen": "w6", "rejected": "w7"}] * 4)
    with pytest.raises(FlexdpoError, match="the longest example has 302 tokens but the model has 256 positions; set"):
        DPOTrainer(small_model("gpt2"), None, settings(tmp_path), train_dataset=long, processing_class=tokenizer)
