"""What an estimate is made for; the fields with a help text are the options of ``flexdpo estimate``."""

from __future__ import annotations

from dataclasses import dataclass

from flexdpo.errors import FlexdpoError, nearest
from flexdpo.estimate.costs import MACHINES, find_machine
from flexdpo.estimate.model_shapes import SHAPES
from flexdpo.layout.packing import SHARING
from flexdpo.layout.row import tile_multiple
from flexdpo.objective.loss_types import setting
from flexdpo.training.memory import TrainingSetup

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_row",
    "sample",
    "batches",
    "memory",
)


@dataclass(frozen=True)
class EstimateSettings:
    """What to predict for; the names are those of ``DPOConfig``."""

    shape: str | None = setting(
        None, f"Sizes to predict for without --model: {', '.join(SHAPES)}; llama-8b by default."
    )
    device: str = setting("cuda", f"Whose costs to predict with: {', '.join(MACHINES)} (an H100; one core of a Xeon).")
    dtype: str | None = setting(None, "Of weights: float32 or bfloat16; by default bfloat16 on cuda.")
    max_length: int | None = setting(1024, "Longest prompt plus response; 0 for no limit.")
    per_device_train_batch_size: int = setting(8, "Rows of the dataset in a batch.")
    gradient_accumulation_steps: int = setting(1, "Batches per optimizer step.")
    max_tokens_per_row: int | None = setting(None, "Longest packed row; by default a batch is one row.")
    processes: tuple[int, ...] = setting(
        (), "Say for each of these numbers of processes how long they wait for the slowest: 8 64 1024."
    )
    gradient_checkpointing: bool = setting(False, "Run layers again in the backward pass.")
    keep_attention: bool = setting(False, "Run them again without their attention, whose outputs are kept; on a cpu.")
    reference: bool = True  # one runs beside the policy, and its weights are kept
    sharing: str = setting("group", "group, or step: across the examples of a batch too.")
    # lengths at which the model's rotary frequencies change, see ``flexdpo.pack``; by default those of the given model
    limits: tuple[int, ...] = ()
    setup: TrainingSetup | None = None  # for the memory; by default from the above, all weights by AdamW
    memory: int | None = None  # bytes of the device; by default those free on it, or 80 GB for a GPU that is not there
    sample: int | None = setting(None, "Look at this many rows, drawn at random.")
    num_proc: int | None = setting(None, "Processes that tokenise.")
    batches: int = 48  # of the sample, that are laid out token by token
    seed: int = setting(0, "Of the sample and the order of rows.")

    def __post_init__(self) -> None:
        find_machine(self.device)
        object.__setattr__(self, "max_length", self.max_length or None)
        if self.dtype is None:
            object.__setattr__(self, "dtype", "bfloat16" if self.device == "cuda" else "float32")
        if self.dtype not in _DTYPE_BYTES:
            raise FlexdpoError(f"dtype {self.dtype!r} is unknown; use {' or '.join(_DTYPE_BYTES)}")
        if self.keep_attention and not (self.gradient_checkpointing and self.device == "cpu"):
            raise FlexdpoError(
                "keep_attention has no effect without gradient_checkpointing, and keeps attention on a cpu only; leave "
                "it out, or set gradient_checkpointing and device cpu"
            )
        if self.sharing not in SHARING:
            raise FlexdpoError(
                f"sharing must be one of {SHARING}, got {self.sharing!r}{nearest(self.sharing, SHARING)}"
            )
        if any(count < 1 for count in self.processes):
            raise FlexdpoError(f"processes must be at least 1 each, got {' '.join(map(str, self.processes))}")
        for name in _COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise FlexdpoError(f"{name} must be at least 1, got {value}")

    @property
    def training_setup(self) -> TrainingSetup:
        """How the model is trained, as far as memory depends on it."""
        if self.setup is not None:
            return self.setup
        width = _DTYPE_BYTES[str(self.dtype)]
        return TrainingSetup(
            weight_bytes=width,
            compute_bytes=width,
            gradient_checkpointing=self.gradient_checkpointing,
            keeps_attention=self.keep_attention,
            reference=self.reference,
            device_type=self.device,
        )

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens, as the trainer does."""
        return tile_multiple(self.device)
