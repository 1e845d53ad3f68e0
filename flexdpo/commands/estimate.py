"""``flexdpo estimate``: what flexdpo would do for a dataset, before anything is trained."""

import json
import math
from dataclasses import dataclass

from flexdpo.commands.options import OptionParser, TokenizerOptions, one_name, settings_of, writable
from flexdpo.data.pictures import holds_images
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.objective.loss_types import setting
from flexdpo.runs.settings import DataSettings


@dataclass
class EstimateOptions:
    """What the settings themselves hold in other units, and where the figures go."""

    reference_free: bool = setting(False, "No reference model runs: its values are precomputed or the loss has none.")
    memory: float | None = setting(
        None, "GB of the device; by default what is free on it, or 80 for a GPU that is not here."
    )
    json: str | None = setting(None, "Write every figure to this file.")


def parser() -> OptionParser:
    """The options."""
    options = OptionParser(
        prog="flexdpo estimate",
        usage="flexdpo estimate DATASET (--model_name_or_path NAME | --tokenizer NAME [--shape NAME]) [--json FILE] "
        "[options]",
        description="Read preferences, tokenise them as the trainer would, and predict what flexdpo does for them: "
        "tokens, work, speed-up and memory against padded and packed training, what each feature adds, and settings.",
    )
    options.add_argument("dataset", nargs="?", help="As --dataset_name.")
    options.add_settings(TokenizerOptions, "model")
    options.add_settings(DataSettings, "data")
    options.add_settings(EstimateSettings, "the run")
    options.add_settings(EstimateOptions, "the prediction")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo estimate`` with the words after it; prints the prediction."""
    found = parser().read(argv)
    found.dataset_name = one_name("dataset_name", found.dataset, found.dataset_name)
    data, tokens = settings_of(DataSettings, found), settings_of(TokenizerOptions, found)
    asked = settings_of(EstimateOptions, found)
    data.require_one_source()
    if tokens.model_name_or_path is None and tokens.tokenizer is None:
        raise FlexdpoError(
            "lengths depend on the tokenizer; give --model_name_or_path NAME, or --tokenizer NAME and a --shape"
        )
    if asked.memory is not None and not 0 < asked.memory < math.inf:
        raise FlexdpoError(f"--memory {asked.memory}: give the GB of the device, a number above 0")
    memory = None if asked.memory is None else int(asked.memory * 1e9)
    settings = settings_of(EstimateSettings, found, reference=not asked.reference_free, memory=memory)
    target = writable(asked.json)

    from flexdpo.estimate.estimate import estimate_dataset

    config, rows = tokens.load_config(), data.train_data()
    tokenizer = tokens.load_tokenizer(images=holds_images(rows))
    estimate = estimate_dataset(rows, tokenizer, settings, model=config)
    if target is not None:
        target.write_text(json.dumps(estimate.as_json(), indent=1) + "\n", encoding="utf-8")
    print(estimate.table())
    return 0
