"""Whole tiny models on packed rows, their CUDA kernels interpreted, against the same models in pieces on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig

from flexdpo import DPOConfig, DPOTrainer, Group, Row, make_train_step, prepare_model, response_logps
from flexdpo.attention import flex, row_mask
from flexdpo.attention.settings import KernelSettings, kernel_settings_as
from flexdpo.hf.compilation import compile_decoder_layers
from flexdpo.training import memory
from tests.codegen.as_if_cuda import Recording
from tests.codegen.kernel_cases import TILES_OF_64
from tests.conftest import VOCABULARY, random_ids, strengthen, word_tokenizer

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# windows shorter than a tile and than the prompts
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": partial(LlamaConfig, **_SHAPE),
    "mistral": partial(MistralConfig, **_SHAPE, sliding_window=50),
    # these two alternate between a window and full attention
    "gemma2": partial(Gemma2Config, **_SHAPE, sliding_window=50, query_pre_attn_scalar=32, attn_logit_softcapping=5.0),
    "gpt_oss": partial(GptOssConfig, **_SHAPE, sliding_window=50, num_local_experts=4, num_experts_per_tok=2),
}


@dataclass
class Pass:
    """One forward and backward: the loss, and the gradient of every parameter by its name."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def differences(self, want: Pass) -> dict[str, float]:
        """Largest difference of each tensor as a share of its largest value; infinite where one is not finite."""
        found = {"loss": abs(self.loss - want.loss) / abs(want.loss)}
        for name, expected in want.gradients.items():
            got = self.gradients[name].to(expected.dtype)
            share = float((got - expected).abs().max() / expected.abs().max())
            found[name] = share if np.isfinite(share) else float("inf")
        return found


def groups() -> list[Group]:
    """358 tokens in two documents, the first a trie of depth two whose prompt is longer than a tile."""
    rng = np.random.default_rng(0)
    stem = random_ids(rng, 20)
    deep = [stem + random_ids(rng, 70), stem + random_ids(rng, 20), random_ids(rng, 40)]
    return [
        Group.from_lists(random_ids(rng, 140), deep, [(0, 1), (0, 2)]),
        Group.from_lists(random_ids(rng, 28), [random_ids(rng, 25), random_ids(rng, 15)]),
    ]


def build(name: str, layers: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](num_hidden_layers=layers), attn_implementation="flexdpo", **settings
    )
    return strengthen(model, 0)


def through_logps(model: Any, impl: str, change: Callable[[Any], Any] = lambda model: None) -> Pass:
    """A loss of the responses' log-probabilities."""
    prepare_model(model, impl=impl)
    change(model)
    row = Row.from_groups(groups(), pad_to_multiple_of=128)
    sums = response_logps(model, row).sums
    loss = -torch.nn.functional.logsigmoid(0.01 * (sums[::2].sum() - sums[1::2].sum()))
    loss.backward()
    return Pass(loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def through_a_step(model: Any, impl: str) -> Pass:
    """One optimizer step; gradients as the optimizer receives them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    step = make_train_step(model, optimizer, impl=impl, pad_to_multiple_of=128, max_grad_norm=None, beta=0.1)
    return Pass(float(step(groups()).loss), seen)


def differences(name: str, layers: int, run: Callable[[Any, str], Pass], _: Recording) -> dict[str, dict[str, float]]:
    """The interpreted pass and the pieces in float32, both against the pieces in float64."""
    # grouped products of experts exist up to float32 only
    settings = {"experts_implementation": "eager"} if name == "gpt_oss" else {}
    model = build(name, layers, **settings)
    exact = run(copy.deepcopy(model).double(), "sdpa")
    pieces = run(copy.deepcopy(model), "sdpa")
    with interpreted_kernels():
        got = run(model, "flex")
    assert flex._kernels, "no kernel was interpreted"
    return compared(got, pieces, exact)


def compared(got: Pass, pieces: Pass, exact: Pass) -> dict[str, dict[str, float]]:
    return {
        "to float64": got.differences(exact),
        "of pieces to float64": pieces.differences(exact),
    }


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    torch._dynamo.reset()
    flex._kernels.clear()
    with kernel_settings_as(KernelSettings(lengths="bucket", kernel_options=TILES_OF_64)):
        yield


def compiled_layers(recording: Recording) -> dict[str, dict[str, float]]:
    """Two decoder layers compiled with their attention in them."""
    model = build("llama", 2)
    exact = through_logps(copy.deepcopy(model).double(), "sdpa")
    pieces = through_logps(copy.deepcopy(model), "sdpa")
    with interpreted_kernels():
        got = through_logps(model, "flex", partial(compile_decoder_layers, dynamic=False))
    assert not flex._kernels, "attention ran outside of the layers"
    return compared(got, pieces, exact)


def trainer_asked_for_nothing(recording: Recording) -> dict[str, Any]:
    """Two steps of a trainer as a card's defaults have it, on two rows: what was compiled, and how often.

    The trainer is made while settings say that they are a card's, so whatever it decides by that is decided as there;
    its tensors stay on the CPU, where the kernels are interpreted.
    """
    torch._dynamo.reset()
    flex._kernels.clear()
    counters.clear()
    before = len(recording.wrappers)
    rng = np.random.default_rng(0)
    data = Dataset.from_list(
        [
            {"prompt_ids": random_ids(rng, n), "response_ids": [random_ids(rng, 40), random_ids(rng, 30)],
             "edges": [[0, 1]], "row": row}
            for row, n in enumerate((20, 45))
        ]
    )  # fmt: skip
    with ExitStack() as patches, TemporaryDirectory() as folder:
        # in place of the driver's answers and of what would put tensors there
        for owner, name, value in (
            (row_mask, "resolve_impl", lambda impl, device: "flex" if impl == "auto" else impl),
            (memory, "free_memory", lambda device: 8 << 30),
            (DPOTrainer, "_move_model_to_device", lambda self, model, device: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        on_card = property(lambda args: args._setup_devices and torch.device("cuda", 0))
        with mock.patch.object(DPOConfig, "device", on_card):
            # tiles that an interpreter can run, and no proof, which compiles for rows of its own
            args = DPOConfig(
                folder,
                max_steps=2,
                per_device_train_batch_size=1,
                logging_steps=1,
                attn_kernel_options=TILES_OF_64,
                prove=False,
                save_strategy="no",
                report_to="none",
            )
            trainer = DPOTrainer(build("llama", 2), args=args, train_dataset=data, processing_class=word_tokenizer())
        trainer.train()
    return {
        "compiles unasked": args.compiles_unasked,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "graphs": counters["stats"]["unique_graphs"],
        "graph breaks": dict(counters["graph_break"]),
        "attention outside of layers": len(flex._kernels),
        "launches of attention": [
            sum(".run(" in line and "tem_fused" in line for line in wrapper.splitlines())
            for wrapper in recording.wrappers[before:]
        ],
    }


MODELS = {
    "llama": partial(differences, "llama", 1, through_logps),
    "mistral": partial(differences, "mistral", 1, through_logps),
    "gemma2": partial(differences, "gemma2", 2, through_logps),
    "gpt_oss": partial(differences, "gpt_oss", 2, through_logps),
    "a step of llama": partial(differences, "llama", 1, through_a_step),
    "compiled layers": compiled_layers,
}
CASES = MODELS | {"trainer": trainer_asked_for_nothing}
