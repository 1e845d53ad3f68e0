"""What to train on what; the fields are the options of ``flexdpo train`` beside those of ``DPOConfig``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from flexdpo.config import DPOConfig


@dataclass
class ModelSettings:
    """Which model to train, and whether through an adapter. Names as in TRL."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A causal LM: a folder saved with save_pretrained, or a hub name."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Load weights in this dtype: float32, bfloat16, float16 or auto."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; by default those peft knows for the model."}
    )

    def load_kwargs(self, config: DPOConfig) -> dict[str, Any]:
        """For ``from_pretrained``: those of the config, and what was given here."""
        given = {"revision": self.model_revision if self.model_revision != "main" else None, "dtype": self.dtype}
        init_kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
        return {**init_kwargs, **{name: value for name, value in given.items() if value is not None}}

    def peft_config(self) -> Any:
        """The adapter to train, a ``peft.LoraConfig``, or ``None``."""
        if not self.use_peft:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise FlexdpoError("--use_peft needs the peft package; pip install 'flexdpo[peft]'") from error
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            # a shared prompt cannot have different dropout for each response
            lora_dropout=0.0,
            target_modules=self.lora_target_modules,
            task_type="CAUSAL_LM",
        )


@dataclass
class Job(ModelSettings):
    """A model, and which preferences it is to learn. Names as in TRL."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preferences: a .jsonl, .json, .parquet or .csv file, a folder of them, a folder saved with "
            "save_to_disk, or a hub name."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split of the same dataset to evaluate on, before and after."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Another file, folder or hub name to evaluate on, before and after."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read the datasets as they are needed instead of loading them; set max_steps."},
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several datasets to train on as one: paths, or in a YAML file mappings with path, name, data_dir, "
            "data_files, split, columns, and fraction or count."
        },
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of the training rows to hold out and evaluate on, before and after."}
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Which column is which, where names are not known: prompt=question,chosen=response_j."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into output_dir though it is not empty."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Tokenise, pack, predict tokens, memory and gain, and stop before any weight is loaded."},
    )

    def require_names(self) -> None:
        """Raise unless model and data are named."""
        if self.datasets and (self.dataset_name or self.columns):
            raise FlexdpoError("--datasets names all datasets and their columns; leave --dataset_name and --columns")
        if self.test_split_size is not None and (self.eval_dataset_name or self.dataset_test_split):
            raise FlexdpoError("--test_split_size holds out what to evaluate on; leave it, or other evaluation data")
        for name in ("model_name_or_path", "dataset_name"):
            if getattr(self, name) is None and not (name == "dataset_name" and self.datasets):
                raise FlexdpoError(
                    f"--{name} is missing: give a file, folder or hub name; 'flexdpo train' alone runs the built-in "
                    "example"
                )

    def train_data(self) -> Any:
        """What to train on, or a stream of it."""
        if self.datasets or self.test_split_size is not None:
            return self._mixture()[0]
        return self._load(self.dataset_name, self.dataset_train_split, self.dataset_config)

    def eval_data(self) -> Any:
        """What to evaluate on, or ``None``."""
        if self.test_split_size is not None:
            return self._mixture()[1]
        if self.eval_dataset_name is not None:
            return self._load(self.eval_dataset_name, self.dataset_test_split or "train", None)
        if self.dataset_test_split is not None:
            return self._load(self.dataset_name, self.dataset_test_split, self.dataset_config)
        return None

    def _mixture(self) -> Any:
        """Several datasets, whose mappings come from a YAML file as JSON, or one of which rows are held out."""
        from flexdpo.data.columns import parse_columns
        from flexdpo.data.mixture import load_mixture

        try:
            entries: list[Any] = [json.loads(each) if each[:1] == "{" else each for each in self.datasets or ()]
        except json.JSONDecodeError as error:
            raise FlexdpoError(f"--datasets: not valid JSON ({error.msg}); give paths, or a YAML file") from error
        one = {"path": self.dataset_name, "name": self.dataset_config, "split": self.dataset_train_split}
        return load_mixture(
            entries or [{**one, "columns": parse_columns(self.columns)}],
            streaming=self.dataset_streaming,
            test_split_size=self.test_split_size,
        )

    def _load(self, name: str | None, split: str, config_name: str | None) -> Any:
        from flexdpo.data.columns import parse_columns
        from flexdpo.data.load import load_preference_dataset

        columns, streaming = parse_columns(self.columns), self.dataset_streaming
        return load_preference_dataset(
            str(name), split=split, config_name=config_name, streaming=streaming, columns=columns
        )
