"""How many multiplications a step needs, and how long it takes: matrices, attention, what is read and written, logits.

A count of multiplications alone is wrong about padded training. Its attention visits every tile of a padded square,
where a packed row visits the live ones; its logits exist at every position and are read and written several times; and
its tensors are so large that a CPU's allocator maps them anew for every use. Each of these parts has a cost per unit
here. The units come from timing single operations, or from data sheets; none was fitted to a whole step or a profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flexdpo.attention.block_masks import classify_tiles
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.query_blocks import REREAD_QUERIES, START_COST, plan_query_blocks
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group
from flexdpo.layout.row import TILE, Row
from flexdpo.training.model_size import ModelSize


@dataclass(frozen=True)
class Machine:
    """What operations cost on a device.

    Speeds are floating-point operations per second, of large matrix products and of fused attention (4 per score and
    head dimension forward, 10 backward; a share ``masked_attention`` of it under an explicit mask). Then seconds: per
    element written by norms, activations, rotations and sums in a forward pass; per logit normalised, beside its
    product; per byte of memory that the allocator maps anew, in tensors of ``fresh_from`` bytes and more.
    """

    name: str
    source: str
    matmul: float
    attention_forward: float
    attention_backward: float
    masked_attention: float
    elementwise: float
    logit_forward: float
    logit_backward: float
    element_bytes: int
    fresh: float = 0.0
    fresh_from: float = float("inf")


MACHINES = {
    "cpu": Machine(
        name="cpu",
        source="single operations timed on one core of a 2.x GHz Xeon with AVX-512, torch 2.13, float32: products of "
        "8192 x 256 x 768; attention of 512 tokens, 4 heads of 64; SiLU and RMSNorm of 1000 tokens; logsumexp of 512 x "
        "2048; first writes to 64 MB. glibc maps whatever exceeds 32 MiB",
        matmul=1.42e11,
        attention_forward=9.3e10,
        attention_backward=1.08e11,
        masked_attention=0.9,
        elementwise=5.5e-10,
        logit_forward=9.5e-10,
        logit_backward=1.8e-9,
        element_bytes=4,
        fresh=4.5e-10,
        fresh_from=2**25,
    ),
    "cuda": Machine(
        name="cuda",
        source="data sheet of an H100 SXM (989 TFLOP/s in bfloat16, 3.35 TB/s) at the shares that published training "
        "runs and FlexAttention's own benchmarks reach: 60 % in products, 40 % and 30 % in attention, 80 % of the "
        "bandwidth; not measured here",
        matmul=5.9e14,
        attention_forward=4.0e14,
        attention_backward=3.0e14,
        masked_attention=0.5,
        # written once, read about twice, norms in float32
        elementwise=8 / 2.7e12,
        # products in float32, read once and reduced; then read, exponentiated and written in place
        logit_forward=8 / 2.7e12,
        logit_backward=14 / 2.7e12,
        element_bytes=2,
    ),
}

# a scan is many small products, one after another
_SCAN_SLOWNESS = 15.0
# the backward pass of norms, activations and rotations writes this many elements for each of the forward pass
_BACKWARD_WRITES = 2.75


def find_machine(name: str) -> Machine:
    """The costs on this kind of device."""
    if name not in MACHINES:
        raise FlexdpoError(f"device {name!r} is unknown{nearest(name, list(MACHINES))}; devices: {', '.join(MACHINES)}")
    return MACHINES[name]


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model, whatever the model is."""

    tokens: int = 0  # that go through the linear layers
    scores: int = 0  # query-key pairs per head, by whole tiles
    targets: int = 0  # positions whose logits are computed

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.scores + other.scores, self.targets + other.targets)

    def forward_flops(self, shape: ModelSize) -> float:
        """Floating-point operations of one forward pass."""
        return sum(self._parts(shape))

    def training_flops(
        self, shape: ModelSize, *, checkpointing: bool, keep_attention: bool = False, head_passes: int
    ) -> float:
        """Those of one forward and backward pass, with layers run again as in :func:`step_seconds`.

        ``head_passes`` are 3 where logits are kept for the backward pass, 4 where they are computed again.
        """
        linear, attention, head = self._parts(shape)
        # fused attention computes its scores again in the backward pass: five products where the forward has two
        attended = 3.5 + (checkpointing and not keep_attention)
        return (3 + checkpointing) * linear + attended * attention + head_passes * head

    def _parts(self, shape: ModelSize) -> tuple[float, float, float]:
        linear = 2.0 * (shape.layer_parameters + shape.scan_products) * self.tokens
        attention = 4.0 * shape.attending * shape.heads * shape.head_dim * self.scores
        head = 2.0 * shape.hidden * shape.vocabulary * self.targets
        return linear, attention, head


def row_work(row: Row) -> Work:
    """The work of one packed row, its padding not counted."""
    # a padding tile holds nothing but padding that sees itself
    real = -(-row.num_tokens // TILE)
    tiles = classify_tiles(row.layout, CAUSAL, TILE).non_empty[:, :real, :real]
    return Work(row.num_tokens, int(tiles.sum()) * TILE**2, int(row.predictors.numel()))


def padded_work(groups: Sequence[Group], *, labels_only: bool = False) -> Work:
    """The work of pairs as one padded batch: every sequence as long as the longest, logits everywhere or at labels."""
    sequences, longest = _padded_shape(groups)
    tiles = -(-longest // TILE)
    targets = sum(ids.size for group in groups for ids in group.response_ids) if labels_only else sequences * longest
    return Work(sequences * longest, sequences * tiles * (tiles + 1) // 2 * TILE**2, targets)


def _padded_shape(groups: Sequence[Group]) -> tuple[int, int]:
    """Responses, each behind its prompt, and the tokens of the longest of these sequences."""
    lengths = [group.prompt_ids.size + ids.size for group in groups for ids in group.response_ids]
    return len(lengths), max(lengths)


class Load(NamedTuple):
    """What one forward call asks of a model on a device."""

    tokens: float  # that go through the layers, padding included
    scores: float  # query-key pairs per head that the kernel computes
    targets: float  # positions whose logits are computed
    masked: bool = False  # whether attention is given an explicit mask, as padding needs it
    kept_logits: bool = False  # whether they are kept for the backward pass, instead of made again in chunks


class StepSeconds(NamedTuple):
    """Seconds of a step's phases: the reference's forward pass, and the policy's forward and backward."""

    reference: float
    policy: float

    @property
    def total(self) -> float:
        """Both."""
        return self.reference + self.policy


def row_load(row: Row, shape: ModelSize, machine: Machine) -> Load:
    """The load of a packed row: scores by whole tiles on CUDA, by query blocks elsewhere."""
    work = row_work(row)
    if machine.name == "cuda":
        return Load(row.layout.length, work.scores, work.targets)
    width = shape.heads * shape.head_dim
    blocks = plan_query_blocks(row.layout, CAUSAL, width=width)
    scores = sum((block.stop - block.start + REREAD_QUERIES) * block.num_keys for block in blocks)
    return Load(work.tokens, scores + len(blocks) * START_COST / width, work.targets)


def padded_load(groups: Sequence[Group]) -> Load:
    """The load of groups as one padded batch: every response behind its prompt, as long as the longest."""
    sequences, longest = _padded_shape(groups)
    return Load(sequences * longest, sequences * longest**2, sequences * longest, True, True)


def step_seconds(
    loads: Iterable[Load],
    shape: ModelSize,
    machine: Machine,
    *,
    checkpointing: bool = False,
    keep_attention: bool = False,
    reference: bool = True,
) -> StepSeconds:
    """Predict the time of a step that runs these loads one after another.

    Without ``reference``, its values were precomputed; with ``checkpointing``, layers run again in the backward pass,
    with ``keep_attention`` without their attention.
    """
    reference_seconds = policy = 0.0
    for load in loads:
        layers = _layers_seconds(load, shape, machine, backward=False)
        product = 2.0 * shape.hidden * shape.vocabulary * load.targets / machine.matmul
        logits = shape.vocabulary * load.targets
        reference_seconds += layers + product + logits * machine.logit_forward if reference else 0.0
        policy += layers + _layers_seconds(load, shape, machine, backward=True)
        if checkpointing:
            again = load._replace(scores=0.0) if keep_attention else load
            policy += _layers_seconds(again, shape, machine, backward=False)
        # kept logits are multiplied out once and give two gradients; logits in chunks are made a second time
        policy += product * (3 if load.kept_logits else 4) + logits * (machine.logit_forward + machine.logit_backward)
        policy += _fresh_bytes(load, shape, machine) * machine.fresh
    return StepSeconds(reference_seconds, policy)


def _layers_seconds(load: Load, shape: ModelSize, machine: Machine, *, backward: bool) -> float:
    weights = shape.layer_parameters + _SCAN_SLOWNESS * shape.scan_products
    products = (4.0 if backward else 2.0) * weights * load.tokens / machine.matmul
    speed = machine.attention_backward if backward else machine.attention_forward
    speed *= machine.masked_attention if load.masked else 1.0
    attention = (10.0 if backward else 4.0) * shape.attending * shape.heads * shape.head_dim * load.scores / speed
    # besides products, two norms write three elements each, two sums one; a rotation four for queries and keys; the
    # attention's output is written once more in another order; the activation and the gate's product
    width, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    elements = shape.layers * (8 * shape.hidden + 5 * width + 4 * keys + 2 * shape.gated_intermediate)
    written = (_BACKWARD_WRITES if backward else 1.0) * elements * load.tokens
    return products + attention + written * machine.elementwise


def _fresh_bytes(load: Load, shape: ModelSize, machine: Machine) -> float:
    """Bytes that a training step maps anew: of feed-forward layers four tensors forward and four backward."""
    # the logits, their gradient, and that gradient once more with the last position put back
    logits = [(shape.vocabulary, 3)] if load.kept_logits else []
    widths = [(shape.gated_intermediate, 8 * shape.layers), *logits]
    sizes = [(count, load.tokens * width * machine.element_bytes) for width, count in widths]
    return sum((count * size for count, size in sizes if size >= machine.fresh_from), 0.0)
