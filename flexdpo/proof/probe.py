"""The parity probe: does a model give on a packed row what it gives one sequence at a time?

It runs the model four ways: packed, unpacked with the model's own stock attention, unpacked once more in another batch
and from embeddings that are rounded otherwise, and packed under a mask that is wrong on purpose. The third gives the
noise, the last one the scale: a model passes when its packed run is as near to the unpacked run as noise explains, and
far nearer than the wrong one. Compared are the logits of every token and the gradient that arrives at every token's
embedding, so that both the forward and the backward of every layer take part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.draws import being_asked
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION
from flexdpo.hf.mixer_kernels import SCAN_CHUNK, mixer_class, mixers_of
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.randomness import disable_dropout
from flexdpo.hf.row_dependence import length_limits
from flexdpo.hf.rules import refusal_reason
from flexdpo.hf.unwrap import backbone_of, unwrap_model
from flexdpo.layout.groups import Group
from flexdpo.layout.row import Row, RowLayout
from flexdpo.mixing.kernels import CONVOLUTION, FUSED, STEPS
from flexdpo.proof.rounding import CoarsestRounding, rounded_otherwise, token_error
from flexdpo.proof.tiny_models import tiny_model

Verdict = Literal["exact", "wrong", "refused", "inconclusive"]
# logits ``[L, V]`` of every token of every sequence, and gradients at the embeddings of the row, ``[S, H]``
_Outcome = tuple[Tensor, Tensor]

# how many times the measured noise an error may be, since another kernel rounds in other places; and what it may always
# be, in units of the dtype's rounding, since noise that measures 0 is luck
NOISE_FACTOR, ROUNDINGS = 6.0, 4.0
# of the error under a wrong mask: exact models stay below 1e-5, wrong ones above 0.2
_ACCEPTED_SHARE = 1e-4
# how often the noise is drawn where layers carry a state, and how far draws may differ: a scan hands
# a rounding on
_SCAN_DRAWS, _SCAN_SPREAD = 4, 10.0


@dataclass(frozen=True)
class ParityReport:
    """What the probe measured.

    Errors are the largest difference to the unpacked run, relative to the largest entry there, of the logits and of the
    gradients at the embeddings.
    """

    # ``"refused"``: a check stopped the model; ``"inconclusive"``: not even a wrong mask made a difference
    verdict: Verdict
    reason: str = ""  # why it is not exact
    value_error: float = float("nan")  # packed
    gradient_error: float = float("nan")
    # unpacked in another batch; the largest of several draws where layers carry a state
    value_noise: float = float("nan")
    gradient_noise: float = float("nan")
    wrong_value_error: float = float("nan")  # packed, under the wrong mask
    wrong_gradient_error: float = float("nan")
    tokens: int = 0  # longest sequence of the probe, prompt and response
    # largest length at which the model changes what it does: a window or chunk of its attention, a limit of its rotary
    # frequencies; 0 where it has none. Where the probe does not reach beyond, a tiny copy of the model was probed too,
    # whose thresholds are short
    threshold: int = 0
    seconds: float = 0.0  # wall time

    @property
    def exact(self) -> bool:
        """Whether packed rows give the ordinary result."""
        return self.verdict == "exact"


@torch.inference_mode(False)  # gradients are compared
def parity_probe(model: nn.Module, *, max_tokens: int = 2048, seed: int = 0) -> ParityReport:
    """Run a model packed, unpacked with its own stock attention and packed under a wrong mask, and compare.

    The model is prepared for packed rows if it was not; its weights, gradients and training mode stay as they are.

    ``model`` is a ``PreTrainedModel``, or a ``PeftModel`` around one, on any device; half precision makes comparisons
    blunter. The longest sequence, prompt and response, has at most ``max_tokens``, and is a little longer than the
    model's largest threshold where this and its position limit allow. ``seed`` chooses the random tokens. A model that
    is refused gets a report too, not an error; ``FlexdpoError`` if it is none of Hugging Face's.
    """
    started = time.perf_counter()
    base = unwrap_model(model)
    try:
        if (reason := refusal_reason(backbone_of(base))) is not None:
            raise UnsupportedModelError(reason)
        report = _compare(model, max_tokens, seed)
        if report.exact and report.threshold >= report.tokens:
            report = _with_short_thresholds(base, report, seed)
    except UnsupportedModelError as error:
        report = ParityReport("refused", str(error))
    return replace(report, seconds=time.perf_counter() - started)


def _with_short_thresholds(base: Any, report: ParityReport, seed: int) -> ParityReport:
    """The report, or that of a tiny copy with short thresholds where the copy is not exact."""
    try:
        copy = tiny_model(base.config, seed=seed)
    except Exception:
        # a model class may say anything about a config that was cut; the report names the threshold
        return report
    found = _compare(copy, 2048, seed)
    if found.exact:
        return report
    return replace(found, reason=f"{found.reason} (on a tiny copy whose thresholds are short)")


def _compare(model: nn.Module, max_tokens: int, seed: int) -> ParityReport:
    base = unwrap_model(model)
    limits = length_limits(backbone_of(base))
    threshold = max(_largest_window(base), *(limit for limit in limits.limits if limit != limits.open_end), 0)
    # beyond the threshold, within what the model and the caller allow
    limit = getattr(backbone_of(base).config, "max_position_embeddings", None) or max_tokens
    length = max(min(threshold + 24, limit, max_tokens), 24)
    if limits.open_end is not None:
        length = min(length, limits.open_end)
    stateful = bool(mixers_of(backbone_of(base)))
    row = _probe_row(base, length, seed, limits.limits, stateful=stateful).to(base.device)
    # every token sees all that stand before it in the row: responses and documents mix
    layout = row.layout
    ends = torch.full_like(layout.subtree_end, layout.length)
    leaking = RowLayout(
        layout.position_ids, ends, layout.num_tokens, layout.multiplicity, layout.shortest, layout.longest
    )
    with _without_dropout(model), torch.enable_grad():
        with stock_attention(base), CoarsestRounding() as rounding:
            want = _unpacked(model, row)
        noise = _noise(model, row, want, rounding.eps, 0)
        prepare_model(model, impl=getattr(base, "_flexdpo_impl", "auto"))
        packed = _errors(_packed(model, row, layout), want)
        wrong = _errors(_packed(model, row, leaking), want)
        for draw in range(1, _SCAN_DRAWS if stateful else 1):
            loud = (_SCAN_SPREAD * noise[0], _SCAN_SPREAD * noise[1])
            # more draws only where they may still decide
            if _judge(packed, noise, wrong, rounding.eps)[0] == _judge(packed, loud, wrong, rounding.eps)[0]:
                break
            again = _noise(model, row, want, rounding.eps, draw)
            noise = (max(noise[0], again[0]), max(noise[1], again[1]))
    verdict, reason = _judge(packed, noise, wrong, rounding.eps)
    longest = max(sequence.size for group in row.groups for sequence in group.sequences)
    return ParityReport(verdict, reason, *packed, *noise, *wrong, tokens=longest, threshold=threshold)


def _noise(model: nn.Module, row: Row, want: _Outcome, rounding: float, draw: int) -> tuple[float, float]:
    """How far the unpacked run moves in another batch, from embeddings that are rounded otherwise."""
    with stock_attention(unwrap_model(model)):
        return _errors(_unpacked(model, row, rounding=rounding, draw=draw), want)


def _judge(
    packed: tuple[float, float], noise: tuple[float, float], wrong: tuple[float, float], rounding: float
) -> tuple[Verdict, str]:
    """The verdict and its reason, from errors of logits and of gradients."""
    for what, error, floor, scale in zip(("logits", "gradients"), packed, noise, wrong, strict=True):
        explained = max(NOISE_FACTOR * floor, ROUNDINGS * rounding)
        # what rounding alone may do, so that a mask without effect is not taken for proof
        if not scale > 2 * max(floor, rounding):
            return "inconclusive", "not even a wrong mask changes the result, so its weights show nothing"
        if not error <= min(explained, max(_ACCEPTED_SHARE * scale, 2 * floor)):
            return "wrong", (
                f"its packed run differs from its unpacked run: {what} by {error:.1e}, where rounding explains "
                f"{explained:.1e} and a wrong mask makes {scale:.1e}"
            )
    return "exact", ""


def _largest_window(base: Any) -> int:
    config = backbone_of(base).config
    # Llama 4 scales its queries from floor_scale on
    names = ("sliding_window", "attention_chunk_size", "floor_scale", "mamba_chunk_size", "chunk_size")
    sizes = (getattr(config, name, None) for name in names)
    # the delta rules' chunks are in no config, and the scan of Mamba 1 has none
    kinds = (mixer_class(type(mixer)) for mixer in mixers_of(backbone_of(base)).values())
    plain = {CONVOLUTION, "selective_scan_fn", *FUSED, *STEPS}
    chunked = any(kind is None or not kind.understood or not kind.names <= plain for kind in kinds)
    return max(size for size in (*sizes, SCAN_CHUNK if chunked else 0) if isinstance(size, int))


def _probe_row(base: Any, length: int, seed: int, limits: Sequence[int], *, stateful: bool = False) -> Row:
    """Three documents and some padding: a pair, a trie of depth three, and segments of one token each.

    Where layers carry a state, more prompts of many lengths, some just too long for a chunk with their responses: a
    scan then pads some, which must not touch the state.
    """
    generator = np.random.default_rng(seed)
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    low = 8 if vocabulary > 32 else 0  # special tokens come first and, for images and the like, last

    def tokens(count: int) -> Any:
        return generator.integers(low, vocabulary - low, count).tolist()

    response = length // 3
    prompt = length - response
    stem = tokens(response // 3)
    twig = stem + tokens(response // 3)
    one, other = low, low + 1
    groups = [
        Group.from_lists(tokens(prompt), [tokens(response), tokens(response - 2)]),
        Group.from_lists(
            tokens(prompt - 3),
            [twig + tokens(response // 3), tokens(response), stem + tokens(response // 2), twig + tokens(2)],
            [(0, 1)],
        ),
        Group.from_lists([one], [[one, one, other], [one, other], [other]], [(0, 1)]),
    ]
    if stateful:
        nearly = () if length <= SCAN_CHUNK else (SCAN_CHUNK - 1, SCAN_CHUNK - 2)
        responses = [[one, *tokens(3)], [other, *tokens(2)]]
        groups += [Group.from_lists(tokens(n), responses, [(0, 1)]) for n in (4, 8, *nearly)]
    return Row.from_groups(groups, pad_to_multiple_of=16, limits=limits)


def path_of(row: Row, response: int) -> Tensor:
    """Row indices of a whole sequence, prompt included: the last token of a response and its ancestors."""
    last = int(row.response_paths[response][-1])
    return (row.subtree_end[0, : last + 1] > last).nonzero()[:, 0]


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Run in train mode, as in training, with everything random at 0 and gradients at the embeddings alone."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    put_back = disable_dropout(model)
    model.train()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        put_back()
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def stock_attention(base: Any) -> Iterator[None]:
    """Give the backbone the attention that transformers would choose for it."""
    backbone: Any = backbone_of(base)
    before = backbone.config._attn_implementation
    stock = backbone.get_correct_attn_implementation(None) if before == ATTN_IMPLEMENTATION else before
    if stock == "sdpa" and getattr(backbone.config, "attn_logit_softcapping", None) is not None:
        stock = "eager"  # some versions choose SDPA and leave the softcap out
    try:
        if stock != before:
            backbone.set_attn_implementation(stock)
        yield
    finally:
        if stock != before:
            backbone.set_attn_implementation(before)


def _run(
    model: Any, inputs: dict[str, Any], paths: dict[int, Any], rounding: float = 0.0, draw: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Logits at paths of the first row, and their gradient at what the embedding put out, cut off from its weights.

    What arrives there passed through every layer.
    """
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        if being_asked():
            return output
        leaf = output.detach()
        leaf = (rounded_otherwise(leaf, rounding, draw) if rounding else leaf).requires_grad_()
        captured.append(leaf)
        # some models scale what they get in place, which a leaf does not allow
        return leaf.clone()

    handle = unwrap_model(model).get_input_embeddings().register_forward_hook(capture)
    try:
        found = model(**inputs).logits[0]
    finally:
        handle.remove()
    if len(captured) != 1:
        raise FlexdpoError(
            f"the model used its input embedding {len(captured)} times in one forward; the parity probe needs once"
        )
    logits, scores = [found[path] for path in paths.values()], []
    for seed, each in zip(paths, logits, strict=True):
        # every logit is weighed at random: the gradient then says on what each of them depends
        weights = torch.randn(each.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(each)
        scores.append((weights * each).sum() / each.shape[-1])
    # not autograd.grad, which reentrant checkpoints do not know
    torch.stack(scores).sum().backward()
    return [each.detach() for each in logits], captured[0].grad[0]  # type: ignore[index]


def _unpacked(model: Any, row: Row, *, rounding: float = 0.0, draw: int = 0) -> _Outcome:
    """One sequence at a time; with ``rounding`` beside another one, which is padded, and rounded otherwise."""
    logits, gradients = [], {}
    for number, sequence in enumerate(sequence for group in row.groups for sequence in group.sequences):
        ids = torch.from_numpy(sequence)[None].to(row.input_ids.device)
        inputs = beside_another(ids) if rounding else {"input_ids": ids}
        one, gradients[number] = _run(model, {**inputs, "use_cache": False}, {number: slice(None)}, rounding, draw)
        logits += one
    return torch.cat(logits), summed_by_token(gradients, row)


def beside_another(ids: Tensor) -> dict[str, Tensor]:
    """A sequence ``[1, L]`` as the first of a padded batch of two, whose second is a third as long."""
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, max(1, ids.shape[1] // 3) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _packed(model: Any, row: Row, layout: RowLayout) -> _Outcome:
    paths = {response: path_of(row, response) for response in range(row.num_responses)}
    logits, gradient = _run(model, {**row.inputs(), "attention_mask": layout}, paths)
    return torch.cat(logits), gradient[: row.num_tokens]


def summed_by_token(gradients: dict[int, Tensor], row: Row) -> Tensor:
    """Add the gradients ``[L, H]`` of sequences of a row at the tokens that they share, ``[S, H]``."""
    paths = torch.cat([path_of(row, response) for response in gradients])
    values = torch.cat([*gradients.values()])
    total = values.new_zeros(row.num_tokens, values.shape[-1])
    return total.index_add_(0, paths.to(total.device), values)


def _errors(got: _Outcome, want: _Outcome) -> tuple[float, float]:
    return token_error([(got[0], want[0])]), token_error([(got[1], want[1])])
