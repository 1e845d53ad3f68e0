"""``flexdpo estimate``: what flexdpo would do for a dataset, before anything is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.commands.options import OptionParser
from flexdpo.data.load import load_preference_dataset
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.costs import MACHINES
from flexdpo.estimate.estimate import Estimate, EstimateSettings, estimate_dataset
from flexdpo.estimate.model_shapes import SHAPES
from flexdpo.estimate.sources import find_config, find_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class EstimateArguments:
    """What to predict."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved model or hub name: its tokenizer and sizes are used, its weights are not read."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder with a tokenizer or a hub name; by default that of --model."}
    )
    shape: str = field(
        default="llama-8b", metadata={"help": f"Sizes to predict for without --model: {', '.join(SHAPES)}."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset; slices such as train[:10%%] too."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt plus response; 0 for no limit."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of the dataset in a batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    max_tokens_per_row: int | None = field(
        default=None, metadata={"help": "Longest packed row; by default a batch is one row."}
    )
    sharing: str = field(default="group", metadata={"help": "group, or step: across the examples of a batch too."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Run layers again in the backward pass."})
    reference_free: bool = field(
        default=False, metadata={"help": "No reference model runs: its values are precomputed or the loss has none."}
    )
    device: str = field(
        default="cuda",
        metadata={"help": f"Whose costs to predict with: {', '.join(MACHINES)} (an H100; one core of a Xeon)."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Of weights: float32 or bfloat16; by default bfloat16 on cuda."}
    )
    memory: float | None = field(
        default=None,
        metadata={"help": "GB of the device; by default what is free on it, or 80 for a GPU that is not here."},
    )
    sample: int | None = field(default=None, metadata={"help": "Look at this many rows, drawn at random."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    seed: int = field(default=0, metadata={"help": "Of the sample and the order of rows."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let tokenizers from the hub run their own code."})
    json: str | None = field(default=None, metadata={"help": "Write every figure to this file."})

    def settings(self) -> EstimateSettings:
        """The same for the predictor."""
        return EstimateSettings(
            shape=self.shape,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length or None,
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_tokens_per_row=self.max_tokens_per_row,
            gradient_checkpointing=self.gradient_checkpointing,
            reference=not self.reference_free,
            sharing=self.sharing,
            memory=None if self.memory is None else int(self.memory * 1e9),
            sample=self.sample,
            num_proc=self.num_proc,
            seed=self.seed,
        )


def run(argv: list[str]) -> int:
    """Run ``flexdpo estimate`` with the words after it; prints the prediction."""
    options = OptionParser(
        (EstimateArguments,),
        prog="flexdpo estimate",
        usage="flexdpo estimate DATASET (--model NAME | --tokenizer NAME [--shape NAME]) [--json FILE] [options]",
        description="Read preferences, tokenise them as the trainer would, and predict what flexdpo does for them: "
        "tokens, work, speed-up and memory against padded and packed training, what each feature adds, and settings.",
    )
    options.add_argument("dataset", nargs="?", help="A file, a folder or a hub name, as flexdpo train takes it.")
    if {"-h", "--help"} & set(argv):
        options.print_help()
        return 0
    arguments, rest = options.parse_with_config(argv)
    estimate = _estimate(arguments, rest.dataset)
    print(estimate.table())
    return 0


def _estimate(arguments: EstimateArguments, dataset: str | None) -> Estimate:
    if dataset is None:
        raise FlexdpoError("which dataset? give a file, folder or hub name: flexdpo estimate pairs.jsonl --model NAME")
    if arguments.model is None and arguments.tokenizer is None:
        raise FlexdpoError("lengths depend on the tokenizer; give --model NAME, or --tokenizer NAME and a --shape")
    settings = arguments.settings()
    target = writable(arguments.json)
    trust = arguments.trust_remote_code
    config: Any = None if arguments.model is None else find_config(arguments.model, trust_remote_code=trust)
    tokenizer = find_tokenizer(str(arguments.tokenizer or arguments.model), trust_remote_code=trust)
    data: Dataset = load_preference_dataset(dataset, split=arguments.split, config_name=arguments.config_name)
    estimate = estimate_dataset(data, tokenizer, settings, model=config)
    if target is not None:
        target.write_text(json.dumps(estimate.as_json(), indent=1) + "\n", encoding="utf-8")
    return estimate


def writable(name: str | None) -> Path | None:
    """The result file, tried now: minutes of work must not end in a missing folder."""
    if name is None:
        return None
    path = Path(name)
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise FlexdpoError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from error
    return path
