"""Random groups, tiny models whose attention matters, a tokenizer made in place and small preference data."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

# datasets counts every file that is read at the hub, and waits seconds for an answer where there is no network
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import flexdpo
from flexdpo.hf.versions import TAKES_IMAGES
from tests.hf.architectures import REPORTED_CHANGES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset

# the models here are so small that handing work to other threads takes longer than doing it
torch.set_num_threads(1)

VOCABULARY = 97
# earlier versions refuse images, and lack what makes them
collect_ignore_glob = [] if TAKES_IMAGES else ["images/test_*.py", "*/test_images.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the default run between processes where pytest-xdist is installed; it is not needed.

    Only the whole of it, since each process imports and collects for itself; ``-n`` has the last word.
    """
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.keyword
    default = config.getini("addopts")[-1] == option.markexpr
    watched = option.usepdb or option.trace or option.capture == "no" or option.collectonly
    # each of the processes comes here too, and must not start others
    first = "PYTEST_XDIST_WORKER" not in os.environ
    if not (config.pluginmanager.hasplugin("xdist") and first):
        return
    if option.numprocesses is None and whole and default and not watched:
        option.numprocesses = min(os.cpu_count() or 1, 4)
        # neighbours stay together, so that what a module's tests share is seldom made twice
        option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection, half the time of a short training run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Leave out what a file's tests left too: accelerate collects at every run, through all there is."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under ``-m gpu`` or ``-m codegen`` read only the files with such tests: other imports may be missing there."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    marker = config.option.markexpr
    if marker in ("gpu", "codegen") and is_test:
        return f"mark.{marker}" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report, without failing, what a transformers newer than the records of the zoo changed."""
    passed = terminalreporter.stats.get("passed", [])
    changes = {change for report in passed for change in report.user_properties if change[0] in REPORTED_CHANGES}
    if changes:
        terminalreporter.section(f"transformers {transformers.__version__} is newer than the records of the zoo")
    for change in REPORTED_CHANGES:
        names = sorted(name for kind, name in changes if kind == change)
        if names:
            terminalreporter.write_line(f"{change}: {', '.join(names)}")


_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=256,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    # a window shorter than every prompt, so that distance matters
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=5),
}
# Llama-like norms compute in float32, GPT-2 keeps float64 throughout
TOLERANCE = {"gpt2": 1e-9, "llama": 1e-6, "qwen3": 1e-6, "mistral": 1e-6}


def strengthen(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw weights large enough that attention, positions and biases all show in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim < 2:
            parameter.data += (0.1 * noise).to(parameter.dtype)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.data = (0.7 * noise).to(parameter.dtype)
        else:
            parameter.data = (noise / parameter.shape[-1] ** 0.5).to(parameter.dtype)
    return model


def build_model(name: str, attn_implementation: str = "eager", seed: int = 0) -> Any:
    """A tiny model in float64; the same seed gives the same weights under every attention implementation."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attn_implementation)
    return strengthen(model.double(), seed).eval()


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(3, VOCABULARY, length).tolist()


def odd_groups(rng: np.random.Generator) -> list[flexdpo.Group]:
    """K = 2 and 3, a shared response beginning, a trie of depth two, a one-token prompt and a one-token response."""
    prompt, stem, twig = random_ids(rng, 11), random_ids(rng, 3), random_ids(rng, 2)
    return [
        flexdpo.Group.from_lists(random_ids(rng, 9), [random_ids(rng, 12), random_ids(rng, 7)], name="pair"),
        flexdpo.Group.from_lists(
            prompt,
            # the first two share stem and twig, the third only the stem: branches under branches
            [stem + twig + random_ids(rng, 5), stem + twig + random_ids(rng, 8), stem + random_ids(rng, 6)],
            [(0, 1), (0, 2), (2, 1)],
            name="depth two",
        ),
        flexdpo.Group.from_lists(random_ids(rng, 1), [random_ids(rng, 6), random_ids(rng, 1)], name="short"),
        flexdpo.Group.from_lists(
            random_ids(rng, 14), [random_ids(rng, 9), random_ids(rng, 10), random_ids(rng, 4)], [(1, 0)], name="triple"
        ),
    ]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20241)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word ``w0`` .. ``w96``."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    )


tokenizer = pytest.fixture(scope="session")(word_tokenizer)


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, rng.integers(low, high))) + " "

    return [{"prompt": text(6, 24), "chosen": text(2, 12), "rejected": text(2, 12)} for _ in range(count)]


@pytest.fixture
def preferences() -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(preference_rows(24))


@pytest.fixture(scope="session")
def small_model() -> Any:
    """Makes a model to train: one layer does, since what is compared layer by layer has models of its own."""

    def build(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 1) -> Any:
        torch.manual_seed(seed)
        config = CONFIGS[name]()
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return strengthen(AutoModelForCausalLM.from_config(config), seed).to(dtype)

    return build


@pytest.fixture
def saved_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, small_model: Any) -> Any:
    def save(name: str) -> Path:
        folder = tmp_path / f"{name}-model"
        small_model(name, layers=2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference values of one test must not be another's."""
    monkeypatch.setenv("FLEXDPO_CACHE", str(tmp_path / "flexdpo-cache"))
