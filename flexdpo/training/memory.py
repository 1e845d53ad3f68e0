"""How much memory training takes, predicted without any, and the longest row that fits into what is free.

Activations are what autograd keeps for its backward pass, which the model itself is asked on torch's meta device; where
it cannot run there, they are counted by a formula for the common layers. Attention keeps nothing that grows with the
square of a row, and logits exist a chunk at a time: memory is linear in a row's tokens.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexdpo.attention.blockwise import KEPT_SCORES
from flexdpo.errors import FlexdpoError
from flexdpo.hf.checkpointing import checkpointing_name
from flexdpo.hf.mixer_kernels import SCAN_CHUNK
from flexdpo.layout.row import TILE, tile_multiple
from flexdpo.objective.linear_logps import targets_per_chunk, tile_shape
from flexdpo.training.kept_bytes import KeptBytes
from flexdpo.training.model_size import ModelSize

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn
    from transformers import TrainingArguments

# what a CPU's allocator holds between blocks in use, as a share of them: on steps of six length profiles, padded,
# packed and shared, the resident peak was 5 to 20 % above the count. Experts under checkpoints free blocks of so many
# sizes, and glibc keeps so much of them, that it was 1.2 to 1.4 times this prediction, and below it with
# MALLOC_MMAP_THRESHOLD_=1048576. On CUDA the margin has to cover it
_CPU_FRAGMENTS = 0.15
# bytes of optimizer state per trained parameter, beside those kept in the parameter's own dtype
_STATE_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
# states per trained parameter in the parameter's own dtype; what is not named here is taken for AdamW, which has two
_STATES = dict.fromkeys((*_STATE_BYTES, "sgd", "adafactor"), 0)
_STATES |= dict.fromkeys(("adagrad", "rmsprop", "lion_32bit", "paged_lion_32bit"), 1)
MARGIN = 0.12  # is left free: the allocator's fragments, other processes on the device, what the count does not see
LONGEST_ROW = 1 << 18  # a longer one gains nothing: kernels are long since busy, and tile tables grow with its square


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it."""

    weight_bytes: int = 4  # of a weight, its gradient and each optimizer state: 4 for float32, 2 for bfloat16
    compute_bytes: int = 4  # of an activation; below ``weight_bytes`` under mixed precision
    autocast: bool = False  # mixed precision, which casts what is wider than ``compute_bytes``
    gradient_checkpointing: bool = False
    keeps_attention: bool = False  # what attention came to is kept through it, by ``keep_attention``
    every_n_layers: int = 1  # of so many layers one is checkpointed
    offload: bool = False  # what checkpoints keep lies in the host's memory
    reference: bool = True  # a frozen copy of the weights is kept: not with an adapter, nor with precomputed values
    trainable: int | None = None  # parameters that get gradients; ``None`` for all
    optimizer: str = "adamw_torch"  # as ``TrainingArguments.optim`` names it
    shards: int = 1  # processes that share weights, gradients and optimizer states (FSDP, ZeRO-3)
    optimizer_shards: int = 1  # processes that share the optimizer states, where weights are whole (ZeRO-1 and -2)
    in_pieces: bool = False  # the longest row is the path to a piece and that piece, see ``Row.pieces``
    device_type: str = "cpu"  # or ``"cuda"``, which decides how many logits exist at a time

    @classmethod
    def from_arguments(cls, args: TrainingArguments, model: nn.Module | None = None, **others: Any) -> TrainingSetup:
        """The setup of a run, whose model tells its dtype and what is trained: else float32, and all."""
        # an adapter is trained in float32 beside frozen weights in half precision; the many decide, quantised ones not
        weights = [] if model is None else [p for p in model.parameters() if p.element_size() > 1]
        weight_bytes = max(weights, key=lambda p: p.numel()).element_size() if weights else 4
        checkpoints = getattr(args, checkpointing_name(args, "_kwargs")) or {}
        return cls(
            weight_bytes=weight_bytes,
            compute_bytes=min(2, weight_bytes) if args.bf16 or args.fp16 else weight_bytes,
            autocast=bool(args.bf16 or args.fp16),
            gradient_checkpointing=bool(getattr(args, checkpointing_name(args))),
            keeps_attention=bool(getattr(args, "keep_attention", False)),
            every_n_layers=int(checkpoints.get("every_n_layers", 1)),
            offload=bool(checkpoints.get("offload", False)),
            trainable=None if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad),
            optimizer=str(getattr(args.optim, "value", args.optim)),
            device_type=args.device.type,
            **others,
        )

    def measured(self, model_or_config: Any) -> ModelSize:
        """The size of a model with what autograd keeps in such a run."""
        autocast = self.autocast or self.compute_bytes < self.weight_bytes
        return ModelSize.measured(model_or_config, self.weight_bytes, autocast=autocast)


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted bytes of one process at the peak of a training step."""

    weights: int  # the policy's
    gradients: int
    optimizer: int  # its states
    reference: int  # the frozen copy
    activations: int  # what autograd keeps of all tokens of the longest row
    working: int  # on top for a while: a chunk of logits or the gradients inside a layer, and copies of weights
    tokens: int  # of the longest row, for which the last two hold

    @property
    def fixed(self) -> int:
        """What does not depend on the row."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.activations + self.working


def predict_memory(
    model_or_config: Any, tokens: int, setup: TrainingSetup | None = None, *, targets: int | None = None
) -> MemoryPrediction:
    """Predict the memory of a step whose longest row has ``tokens`` tokens, all or ``targets`` of them of responses."""
    setup = setup or TrainingSetup()
    size = setup.measured(model_or_config)
    trainable = size.parameters if setup.trainable is None else setup.trainable
    weights = size.parameters * setup.weight_bytes
    state_bytes = _STATES.get(setup.optimizer, 2) * setup.weight_bytes + _STATE_BYTES.get(setup.optimizer, 0)
    kept, working = _row_bytes(size, setup, tokens, tokens if targets is None else targets)
    working += _fragments(setup, kept + working)
    return MemoryPrediction(
        weights=weights // setup.shards,
        gradients=trainable * setup.weight_bytes // setup.shards,
        optimizer=trainable * state_bytes // max(setup.shards, setup.optimizer_shards),
        reference=weights // setup.shards if setup.reference else 0,
        activations=kept,
        working=working,
        tokens=tokens,
    )


def predict_padded_memory(model_or_config: Any, tokens: int, setup: TrainingSetup | None = None) -> MemoryPrediction:
    """The same for an ordinary step on a padded batch of ``tokens`` tokens, with logits at all of them."""
    setup = setup or TrainingSetup()
    size = setup.measured(model_or_config)
    packed = predict_memory(size, tokens, setup, targets=0)
    logits = tokens * size.vocabulary * setup.compute_bytes
    # logits and their gradient exist whole, and half-precision logits a third time as log-probabilities
    kept = packed.activations + logits * (2 if setup.compute_bytes < 4 else 1)
    working = max(logits, _passing_bytes(size, setup) * tokens) + _gathered_bytes(size, setup)
    return replace(packed, activations=kept, working=working + _fragments(setup, kept + working))


def _fragments(setup: TrainingSetup, used: int) -> int:
    return int(_CPU_FRAGMENTS * used) if setup.device_type == "cpu" else 0


def _row_bytes(size: ModelSize, setup: TrainingSetup, tokens: int, targets: int) -> tuple[int, int]:
    """What is kept for the backward pass of a row, and what exists on top of it for a while."""
    rerun = -(-size.layers // setup.every_n_layers) if setup.gradient_checkpointing else 0
    asked = _kept(size, setup)
    layers = rerun * _checkpoint_bytes(size, setup) + asked.layers * (size.layers - rerun) / max(size.layers, 1)
    final = int(asked.outside) * tokens + 4 * size.hidden * targets
    kept = (int(layers) + _path_bytes(size, setup)) * tokens + final
    # six tables with a number for every pair of tiles, and layout vectors
    tables = 24 * (-(-tokens // TILE)) ** 2 + 64 * tokens
    # the masks of query blocks, which have no tiles
    masks = min(tokens * tokens // 2, KEPT_SCORES) * setup.compute_bytes if setup.device_type == "cpu" else 0
    # what the head kept is gone when the layers run backwards
    passing = max(_passing_bytes(size, setup) * tokens - final, _head_bytes(size, setup, targets))
    return kept + tables, passing + masks + _gathered_bytes(size, setup)


def _kept(size: ModelSize, setup: TrainingSetup) -> KeptBytes:
    """What autograd keeps without checkpoints: what the model told, or else by the formula for common layers.

    Where the model was asked for another setup, the formula gives the ratio.
    """
    counted = _counted(size, setup)
    if size.kept is None:
        return counted
    weight_bytes, autocast = size.asked
    then = replace(setup, weight_bytes=weight_bytes, compute_bytes=min(2, weight_bytes) if autocast else weight_bytes)
    figures = zip(astuple(size.kept), astuple(counted), astuple(_counted(size, then)), strict=True)
    return KeptBytes(*(told * here / there for told, here, there in figures))


def _counted(size: ModelSize, setup: TrainingSetup) -> KeptBytes:
    layer, scan = kept_bytes_per_layer(size, setup), _scan_bytes(size)
    return KeptBytes(size.layers * layer + size.state_layers * scan, layer + scan, _norm_bytes(size, setup))


def _checkpoint_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """What a checkpoint keeps of a layer, in bytes per token: its input, and what attention came to where asked."""
    kept = 0 if setup.offload else setup.weight_bytes * size.hidden
    if setup.keeps_attention:
        # and the normaliser of each head
        wide = 4 if setup.compute_bytes < 8 else 8
        kept += (size.heads * size.head_dim * setup.compute_bytes + wide * size.heads) * size.attending // size.layers
    return kept


def _path_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """What running in pieces adds, in bytes per token: gradients of keys and values, and a copy behind their path.

    With checkpoints the keys and values themselves too, which are kept anyway without.
    """
    copies = 0 if not setup.in_pieces else 3 if setup.gradient_checkpointing else 2
    return copies * size.attending * 2 * size.key_heads * size.head_dim * setup.compute_bytes


def _passing_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """What exists while one layer is in its backward pass, in bytes per token; with checkpoints its activations too.

    Its gradients are those of the two branches of the feed-forward layer, of the stream and of what is added to it.
    That was measured on a CPU; what compiled layers hold on a GPU was not, and counts twice.
    """
    again = int(_kept(size, setup).most) - _checkpoint_bytes(size, setup)
    wide = 2 if setup.device_type == "cpu" else 4
    gradients = setup.compute_bytes * wide * size.intermediate + (8 + 2 * setup.weight_bytes) * size.hidden
    return gradients + (max(again, 0) if setup.gradient_checkpointing else 0)


def _scan_bytes(size: ModelSize) -> int:
    """What autograd keeps of a layer's scan, in bytes per token: all of it in float32.

    States at the end of every chunk and of every segment, of which a row has about as many; what goes into the state
    and comes out of it, some eighteen times the heads' width; six matrices of a chunk's tokens for each head. Counted
    in what transformers' delta rule and Mamba 2 keep.
    """
    if not size.state_heads:
        return 4 * 4 * size.state  # Mamba 1 keeps the state at every token
    width = int((size.state * size.state_heads) ** 0.5)
    return 4 * (8 * size.state // SCAN_CHUNK + 18 * width + 6 * size.state_heads * SCAN_CHUNK)


def kept_bytes_per_layer(size: ModelSize, setup: TrainingSetup) -> int:
    """What autograd keeps of a decoder layer, in bytes per token; inputs that several matrices share count once."""
    width, compute = size.heads * size.head_dim, setup.compute_bytes
    # queries, keys and values behind their rotation, the output twice (again transposed), the normaliser of each head
    attention = compute * (3 * width + 2 * size.key_heads * size.head_dim) + 4 * size.heads
    if size.head_norms:
        attention += (4 + setup.weight_bytes) * (width + size.key_heads * size.head_dim)
    # of a gated layer the gate before and behind its activation, the other branch and the product;
    # GPT-2's activation is written out in Python and keeps its input, half of it, the tanh, one plus that, the product
    feed_forward = compute * size.intermediate * (4 if size.gated else 5)
    return 2 * _norm_bytes(size, setup) + attention + feed_forward


def _norm_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """Bytes per token of a norm: input (RMSNorm's is float32), what it multiplies with its weight, and output."""
    return size.hidden * ((0 if size.layer_norm else 4) + setup.weight_bytes + setup.compute_bytes)


def _head_bytes(size: ModelSize, setup: TrainingSetup, targets: int) -> int:
    """The larger of the head's forward pass (logits and their logarithms, a weight of another dtype) and its backward.

    That one holds a tile of logits in float32 and in half precision, the gradients of weight and hidden states, and of
    a half weight one block in float32; of a frozen head it holds nothing that large.
    """
    if not targets:
        return 0
    device = torch.device(setup.device_type)
    chunk = targets_per_chunk(size.vocabulary, device)
    rows, words = tile_shape(targets, size.vocabulary, chunk * size.vocabulary)
    half = setup.compute_bytes < 4
    # only a GPU multiplies halves as they are
    factor_bytes = setup.compute_bytes if half and device.type == "cuda" else 4
    copied = size.vocabulary * size.hidden * factor_bytes if factor_bytes != setup.weight_bytes else 0
    forward = 8 * min(targets, chunk) * size.vocabulary + copied
    if not size.head_learns:
        return forward
    block = words * size.hidden * 4 if setup.weight_bytes < 4 else 0
    weight = size.vocabulary * size.hidden * setup.weight_bytes
    backward = rows * words * (4 + (2 if half else 0)) + weight + block + 8 * targets * size.hidden
    return max(forward, backward)


def _gathered_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """Weights in the dtype of mixed precision, and those of two layers gathered from all shards."""
    cast = size.parameters * setup.compute_bytes if setup.compute_bytes < setup.weight_bytes else 0
    gathered = 2 * size.parameters * setup.compute_bytes // max(size.layers, 1) if setup.shards > 1 else 0
    return cast // setup.shards + gathered


def gigabytes(count: float) -> str:
    """Bytes for people, ``"3.25 GB"`` or ``"410 MB"``, in powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def free_memory(device: torch.device | str) -> int:
    """Bytes that a process can still allocate on a device, torch's unused ones too, within a container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    import psutil

    return min(int(psutil.virtual_memory().available), _left_of_container())


def _left_of_container(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What is left of a Linux container's memory limit, or more than there is without one."""
    old = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for most, used in (("memory.max", "memory.current"), old):
        try:
            limit, taken = (root / most).read_text(encoding="ascii").strip(), (root / used).read_text(encoding="ascii")
        except OSError:
            continue
        # the old interface writes an absurdly large number for "no limit"
        if limit != "max" and int(limit) < 1 << 60:
            return max(0, int(limit) - int(taken))
    return sys.maxsize


def auto_row_budget(
    model_or_config: Any,
    setup: TrainingSetup | None = None,
    *,
    device: torch.device | str,
    free: int | None = None,
    resident: Collection[str] = (),
    multiple: int | None = None,
    longest: int = 0,
    longest_sequence: int | None = None,
) -> int:
    """The largest ``max_tokens_per_row``, at most 262,144, whose step fits into a device's free memory.

    It is a multiple of ``multiple`` tokens, by default 128 on CUDA and 1 elsewhere. The longest example's ``longest``
    distinct tokens must fit, or where given ``longest_sequence``, so that longer examples run in pieces; else the error
    says what takes the memory. ``resident`` names fields of :class:`MemoryPrediction` that are no part of ``free``.
    """
    setup = setup or TrainingSetup(device_type=torch.device(device).type)
    size = setup.measured(model_or_config)
    unit = multiple or tile_multiple(device)
    free = free_memory(device) if free is None else free
    usable = int(free * (1 - MARGIN))

    def needed(setup: TrainingSetup, tokens: int) -> int:
        predicted = predict_memory(size, tokens, setup)
        return predicted.total - sum(int(getattr(predicted, part)) for part in resident)

    cases = [(max(longest, unit), setup)]
    if longest_sequence is not None:
        cases.append((max(longest_sequence, unit), replace(setup, in_pieces=True)))
    for tokens, setup in cases:
        lengths = range(unit, max(unit, LONGEST_ROW // unit * unit) + 1, unit)
        fitting = unit * bisect_right(lengths, usable, key=partial(needed, setup))
        if fitting >= tokens:
            return fitting
    helping = {
        "lower max_length": True,
        "set activation_checkpointing=True": not setup.gradient_checkpointing,
        "set precompute_ref_log_probs=True, which keeps no reference in memory": setup.reference,
        "train an adapter (peft_config)": setup.trainable in (None, size.parameters),
    }
    ways = [way for way, helps in helping.items() if helps]
    parts = vars(predict_memory(size, tokens, setup)).items()
    raise FlexdpoError(
        f"no row fits: {tokens} tokens of {size.name} need about {gigabytes(needed(setup, tokens))} more "
        f"({', '.join(f'{name} {gigabytes(count)}' for name, count in parts if name != 'tokens')}), and "
        f"{gigabytes(usable)} of {gigabytes(free)} free memory can be used; {', or '.join(ways)}"
    )
