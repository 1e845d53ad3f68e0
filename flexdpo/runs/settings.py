"""What to train on what; the fields are the options of ``flexdpo train`` beside those of ``DPOConfig``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError, quoted
from flexdpo.hf.names import adapter_base
from flexdpo.objective.loss_types import setting

if TYPE_CHECKING:
    from flexdpo.config import DPOConfig


@dataclass
class ModelSettings:
    """Which model to train, and whether through an adapter. Names as in TRL."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A causal LM, or an adapter to train on: a folder saved with save_pretrained, or a hub name.",
            "aliases": ["--model"],
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Load weights in this dtype: bfloat16, float16 or auto; by default float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Packed rows need flexdpo's own; --attn_impl chooses its kernel."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Always 0: a shared prompt cannot have other dropout for each response."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter, or all-linear; by default those peft knows for the model."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get an adapter, such as those of experts."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole, beside the adapter."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "The models here are causal ones."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale the adapter by alpha over the root of its rank."})
    use_dora: bool = field(default=False, metadata={"help": "Train the magnitude of each weight by itself (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the weights in 8 bit; with an adapter only."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the weights in 4 bit; with an adapter only."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Numbers of 4 bit: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the constants of 4 bit, too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Dtype that 4-bit weights are kept in."})

    def require_effects(self) -> None:
        """Refuse what could not be done, or would change nothing."""
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16", "float64"):
            raise FlexdpoError(f"--dtype {self.dtype} is no dtype to train in; use float32, bfloat16, float16 or auto")
        if self.attn_implementation not in (None, "flexdpo"):
            raise FlexdpoError(
                f"--attn_implementation {self.attn_implementation} is not supported: packed rows need flexdpo's own "
                "mask; leave it out, and choose its kernel with --attn_impl (flex, varlen, sdpa)"
            )
        if self.lora_dropout:
            raise FlexdpoError(
                f"--lora_dropout {self.lora_dropout} is not supported: a shared prompt cannot have other dropout for "
                "each of its responses; leave it at 0"
            )
        if self.lora_task_type != "CAUSAL_LM":
            raise FlexdpoError(f"--lora_task_type {self.lora_task_type} is not supported: leave it at CAUSAL_LM")
        if self.load_in_4bit and self.load_in_8bit:
            raise FlexdpoError("--load_in_4bit and --load_in_8bit exclude each other; leave one of them out")
        adapted = self.use_peft or (self.model_name_or_path and adapter_base(self.model_name_or_path))
        if (self.load_in_4bit or self.load_in_8bit) and not adapted:
            raise FlexdpoError("quantised weights cannot be trained; add --use_peft, or leave the quantisation out")
        for each in fields(ModelSettings):
            belongs = "use_peft" if each.name.startswith(("lora_", "use_rslora", "use_dora")) else ""
            belongs = "load_in_4bit" if "bnb" in each.name else belongs
            if belongs and getattr(self, each.name) != each.default and not getattr(self, belongs):
                raise FlexdpoError(f"--{each.name} has no effect without --{belongs}; give both, or leave it out")

    def load_kwargs(self, config: DPOConfig) -> dict[str, Any]:
        """For ``from_pretrained``: those of the config, and what was given here."""
        revision = self.model_revision if self.model_revision != "main" else None
        given = {"revision": revision, "dtype": self.dtype, "quantization_config": self._quantization()}
        given = {name: value for name, value in given.items() if value is not None}
        init_kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
        if twice := given.keys() & init_kwargs.keys():
            raise FlexdpoError(
                f"--model_init_kwargs says {quoted(twice)}, and so does an option of its own; leave one of them out"
            )
        return {**init_kwargs, **given}

    def _quantization(self) -> Any:
        """As in TRL, where products are computed in the dtype of the other weights."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        if find_spec("bitsandbytes") is None:
            raise FlexdpoError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=self.dtype or "float32",
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )

    def peft_config(self) -> Any:
        """The adapter to train, a ``peft.LoraConfig``, or ``None``."""
        if not self.use_peft:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise FlexdpoError("--use_peft needs the peft package; pip install 'flexdpo[peft]'") from error
        targets: Any = self.lora_target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            # the word is one of peft's, and a list of it would be a module's name
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )


@dataclass
class DataSettings:
    """Which preferences. Names as in TRL."""

    dataset_name: str | None = setting(
        None,
        "Preferences: a .jsonl, .json, .parquet or .csv file, a folder of them, a folder saved with save_to_disk, or a "
        "hub name.",
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset.", "aliases": ["--config_name"]}
    )
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split to train on; slices such as train[:10%%] too.", "aliases": ["--split"]},
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several datasets as one: paths, or in a YAML file mappings with path, name, data_dir, data_files, "
            "split, columns, and fraction or count."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Which column is which, where names are not known: prompt=question,chosen=response_j."},
    )

    def train_data(self) -> Any:
        """What to train on, or a stream of it."""
        self.require_one_source()
        if self.datasets:
            return self._mixture()[0]
        return self._load(self.dataset_name, self.dataset_train_split, self.dataset_config)

    def require_one_source(self) -> None:
        """Raise unless exactly one thing says where the preferences are."""
        if self.datasets and (self.dataset_name or self.columns):
            raise FlexdpoError("--datasets names all datasets and their columns; leave --dataset_name and --columns")
        for each in ("dataset_config", "dataset_train_split") if self.datasets else ():
            if (value := getattr(self, each)) != DataSettings.__dataclass_fields__[each].default:
                raise FlexdpoError(
                    f"--{each} {value} has no effect with --datasets; give name and split to the entries of a YAML "
                    "file, or leave it out"
                )
        if not self.datasets and self.dataset_name is None:
            raise FlexdpoError("which dataset? give a file, folder or hub name; --dataset_name is missing")

    def _mixture(self, *, streaming: bool = False, test_split_size: float | None = None) -> Any:
        """Several datasets, whose mappings come from a YAML file as JSON, or one of which rows are held out."""
        from flexdpo.data.columns import parse_columns
        from flexdpo.data.mixture import load_mixture

        try:
            entries: list[Any] = [json.loads(each) if each[:1] == "{" else each for each in self.datasets or ()]
        except (json.JSONDecodeError, RecursionError) as error:
            raise FlexdpoError(f"--datasets: not valid JSON ({error}); give paths, or a YAML file") from error
        one = {"path": self.dataset_name, "name": self.dataset_config, "split": self.dataset_train_split}
        return load_mixture(
            entries or [{**one, "columns": parse_columns(self.columns)}],
            streaming=streaming,
            test_split_size=test_split_size,
        )

    def _load(self, name: str | None, split: str, config_name: str | None, *, streaming: bool = False) -> Any:
        from flexdpo.data.columns import parse_columns
        from flexdpo.data.load import load_preference_dataset

        columns = parse_columns(self.columns)
        return load_preference_dataset(
            str(name), split=split, config_name=config_name, streaming=streaming, columns=columns
        )


@dataclass
class Job(DataSettings, ModelSettings):
    """A model, and which preferences it is to learn."""

    dataset_test_split: str | None = setting(None, "Split of the same dataset to evaluate on, before and after.")
    eval_dataset_name: str | None = setting(None, "Another file, folder or hub name to evaluate on, before and after.")
    dataset_streaming: bool = setting(
        False, "Read the datasets as they are needed instead of loading them; set max_steps."
    )
    test_split_size: float | None = setting(
        None, "Share of the training rows to hold out and evaluate on, before and after."
    )
    overwrite_output_dir: bool = setting(False, "Write into output_dir though it is not empty.")
    dry_run: bool = setting(
        False, "Tokenise, pack, predict tokens, memory and gain, and stop before any weight is loaded."
    )

    def require_names(self) -> None:
        """Raise unless model and data are named, each once."""
        if self.model_name_or_path is None:
            raise FlexdpoError(
                "--model_name_or_path is missing: give a folder or hub name; 'flexdpo train' alone runs the built-in "
                "example"
            )
        self.require_one_source()
        if self.test_split_size is not None and not 0 < self.test_split_size < 1:
            raise FlexdpoError(f"--test_split_size {self.test_split_size}: use a share of the rows between 0 and 1")
        if self.test_split_size is not None and (self.eval_dataset_name or self.dataset_test_split):
            raise FlexdpoError("--test_split_size holds out what to evaluate on; leave it, or other evaluation data")
        if self.datasets and self.dataset_test_split is not None and self.eval_dataset_name is None:
            raise FlexdpoError(
                f"--dataset_test_split {self.dataset_test_split} is of one dataset, and --datasets names several; add "
                "--eval_dataset_name, or --test_split_size"
            )

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return any(x is not None for x in (self.test_split_size, self.eval_dataset_name, self.dataset_test_split))

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """What the training data are called, for people."""
        entries = [json.loads(each)["path"] if each[:1] == "{" else each for each in self.datasets or ()]
        return tuple(entries or [str(self.dataset_name)])

    def train_data(self) -> Any:
        """What to train on, or a stream of it."""
        if self.datasets or self.test_split_size is not None:
            return self._mixture(streaming=self.dataset_streaming, test_split_size=self.test_split_size)[0]
        name, split, config = self.dataset_name, self.dataset_train_split, self.dataset_config
        return self._load(name, split, config, streaming=self.dataset_streaming)

    def eval_data(self) -> Any:
        """What to evaluate on, or ``None``."""
        streaming = self.dataset_streaming
        if self.test_split_size is not None:
            return self._mixture(streaming=streaming, test_split_size=self.test_split_size)[1]
        if self.eval_dataset_name is not None:
            return self._load(self.eval_dataset_name, self.dataset_test_split or "train", None, streaming=streaming)
        if self.dataset_test_split is not None:
            return self._load(self.dataset_name, self.dataset_test_split, self.dataset_config, streaming=streaming)
        return None
