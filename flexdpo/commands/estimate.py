"""``flexdpo estimate``: what flexdpo would do for a dataset, before anything is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from flexdpo.commands.options import DatasetOptions, OptionParser, settings_of, writable
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.settings import EstimateSettings


@dataclass(frozen=True)
class EstimateSource(DatasetOptions):
    """Where data, tokenizer and sizes come from, and what the settings themselves hold in other units."""

    model: str | None = field(
        default=None,
        metadata={"help": "A saved model or hub name: its tokenizer and sizes are used, its weights are not read."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder with a tokenizer or a hub name; by default that of --model."}
    )
    reference_free: bool = field(
        default=False, metadata={"help": "No reference model runs: its values are precomputed or the loss has none."}
    )
    memory: float | None = field(
        default=None,
        metadata={"help": "GB of the device; by default what is free on it, or 80 for a GPU that is not here."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let tokenizers from the hub run their own code."})
    json: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def run(argv: list[str]) -> int:
    """Run ``flexdpo estimate`` with the words after it; prints the prediction."""
    options = OptionParser(
        prog="flexdpo estimate",
        usage="flexdpo estimate DATASET (--model NAME | --tokenizer NAME [--shape NAME]) [--json FILE] [options]",
        description="Read preferences, tokenise them as the trainer would, and predict what flexdpo does for them: "
        "tokens, work, speed-up and memory against padded and packed training, what each feature adds, and settings.",
    )
    options.add_argument("dataset", nargs="?", help="A file, a folder or a hub name, as flexdpo train takes it.")
    options.add_settings(EstimateSource)
    options.add_settings(EstimateSettings)
    found = options.read(argv)
    source = settings_of(EstimateSource, found)
    if found.dataset is None:
        raise FlexdpoError("which dataset? give a file, folder or hub name: flexdpo estimate pairs.jsonl --model NAME")
    if source.model is None and source.tokenizer is None:
        raise FlexdpoError("lengths depend on the tokenizer; give --model NAME, or --tokenizer NAME and a --shape")
    memory = None if source.memory is None else int(source.memory * 1e9)
    settings = settings_of(EstimateSettings, found, reference=not source.reference_free, memory=memory)
    target = writable(source.json)

    from flexdpo.estimate.estimate import estimate_dataset
    from flexdpo.training.model_loading import load_config, load_tokenizer

    trust = source.trust_remote_code
    config = None if source.model is None else load_config(source.model, trust_remote_code=trust)
    tokenizer = load_tokenizer(str(source.tokenizer or source.model), trust_remote_code=trust)
    estimate = estimate_dataset(source.load(found.dataset), tokenizer, settings, model=config)
    if target is not None:
        target.write_text(json.dumps(estimate.as_json(), indent=1) + "\n", encoding="utf-8")
    print(estimate.table())
    return 0
