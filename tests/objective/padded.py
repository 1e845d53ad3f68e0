"""The ordinary computation, independent of the package: padded batches, full logits, formulas written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from flexdpo import Group, prepare_model
from tests.conftest import strengthen

VOCABULARY = 23
PAD = 0


def tiny_gpt2(seed: int) -> Any:
    """GPT-2 in float64, which it keeps throughout; small enough to run hundreds of times."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return strengthen(model.double(), seed).eval()


def prepared(model: Any) -> Any:
    """The same weights behind shared, packed rows."""
    copy = tiny_gpt2(0)
    copy.load_state_dict(model.state_dict())
    return prepare_model(copy)


@st.composite
def random_groups(draw: st.DrawFn, ranked: bool = False) -> list[Group]:
    """One to three groups of two to four responses over few words, so that beginnings are often shared."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [one_group(rng, draw(st.integers(2, 4)), ranked, f"row {i}") for i in range(draw(st.integers(1, 3)))]


def one_group(rng: np.random.Generator, count: int, ranked: bool, name: str) -> Group:
    def words(longest: int) -> list[int]:
        return rng.integers(3, 7, rng.integers(1, longest + 1)).tolist()

    order = rng.permutation(count).tolist()
    pairs = list(itertools.combinations(order, 2))
    if not ranked:
        # some of the pairs, one of them perhaps twice
        pairs = [pairs[i] for i in rng.integers(0, len(pairs), rng.integers(1, len(pairs) + 1))]
    return Group.from_lists(words(4), [words(5) for _ in range(count)], pairs, name)


@dataclass
class Padded:
    """A padded batch under one model: log-probabilities and ``log(sum p^2)`` per token; the mask is 1 at responses."""

    logps: Tensor
    squares: Tensor
    mask: Tensor

    @property
    def sums(self) -> Tensor:
        return (self.logps * self.mask).sum(1)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def __getitem__(self, index: Any) -> Padded:
        return Padded(self.logps[index], self.squares[index], self.mask[index])


def run_padded(model: Any, sequences: list[tuple[np.ndarray, np.ndarray]]) -> Padded:
    """Run ``(prompt, response)`` sequences as one right-padded batch through the stock model."""
    longest = max(len(p) + len(r) for p, r in sequences)
    ids = torch.full((len(sequences), longest), PAD)
    attention, mask = torch.zeros(len(sequences), longest), torch.zeros(len(sequences), longest, dtype=torch.float64)
    for i, (prompt, response) in enumerate(sequences):
        ids[i, : len(prompt) + len(response)] = torch.from_numpy(np.concatenate([prompt, response]))
        attention[i, : len(prompt) + len(response)] = 1
        mask[i, len(prompt) : len(prompt) + len(response)] = 1
    logps = torch.log(torch.softmax(model(input_ids=ids, attention_mask=attention).logits[:, :-1], dim=-1))
    labels = ids[:, 1:, None]
    return Padded(logps.gather(2, labels)[..., 0], torch.log(logps.detach().exp().pow(2).sum(-1)), mask[:, 1:])


def pairs_of(groups: list[Group]) -> tuple[list[Any], list[Any]]:
    """Chosen and rejected ``(prompt, response)`` of every preference, each pair on its own."""
    chosen = [(g.prompt_ids, g.response_ids[c]) for g in groups for c, _ in g.edges]
    rejected = [(g.prompt_ids, g.response_ids[r]) for g in groups for _, r in g.edges]
    return chosen, rejected


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def odds(p: Tensor) -> Tensor:
    return p / (1 - p)


def score(t: Tensor, s: dict[str, Any]) -> Tensor:
    """``f'(exp(t))``, up to the constant that makes it 0 at ``t = 0``."""
    kind = s.get("f_divergence_type", "reverse_kl")
    ratio = torch.exp(t)
    if kind == "reverse_kl":
        return t
    if kind == "forward_kl":
        return 1 - 1 / ratio
    if kind == "js_divergence":
        return torch.log(2 * ratio / (1 + ratio))
    alpha = s["f_alpha_divergence_coef"]
    return (ratio ** (alpha - 1) - 1) / (alpha - 1)


def desensitised(batch: Padded, other: Padded, alpha: float | None) -> Tensor:
    """LD-DPO: tokens up to the shorter length of the pair count whole, the rest ``alpha``."""
    if alpha is None:
        return batch.sums
    shorter = torch.minimum(batch.lengths, other.lengths)[:, None]
    place = batch.mask.cumsum(1) * batch.mask
    weight = (alpha + (1 - alpha) * (place <= shorter).double()) * batch.mask
    return (batch.logps * weight).sum(1)


class Terms:
    """The letters of the formulas below, one value per pair: ``w`` wins and ``x`` loses."""

    def __init__(self, policy: Padded, ref: Padded, s: dict[str, Any]) -> None:
        half = len(policy.logps) // 2
        win, lose, ref_win, ref_lose = policy[:half], policy[half:], ref[:half], ref[half:]
        alpha, self.s = s.get("ld_alpha"), s
        self.beta, self.e = s["beta"], s.get("label_smoothing", 0.0)
        self.w, self.x = desensitised(win, lose, alpha), desensitised(lose, win, alpha)
        self.rw, self.rx = desensitised(ref_win, ref_lose, alpha), desensitised(ref_lose, ref_win, alpha)
        self.u, self.v = self.w - self.rw, self.x - self.rx
        self.f, self.g = score(self.u, s), score(self.v, s)
        self.m = self.beta * (self.f - self.g)
        self.n_w, self.n_x = win.lengths, lose.lengths

    def smoothed(self, x: Tensor) -> Tensor:
        return (1 - self.e) * softplus(-x) + self.e * softplus(x)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """The smoothed loss between two sorted samples."""
        return self.smoothed(self.beta * (torch.sort(a)[0] - torch.sort(b)[0]))

    @property
    def p(self) -> Tensor:
        return 1 / (1 + torch.exp(-self.m))

    @property
    def mix(self) -> Tensor:
        return torch.sigmoid(self.m / self.s["discopop_tau"])


FORMULAS: dict[str, Callable[[Terms], Tensor]] = {
    "sigmoid": lambda t: t.smoothed(t.m),
    "sigmoid_norm": lambda t: softplus(-t.beta * (t.f / t.n_w - t.g / t.n_x)),
    "hinge": lambda t: torch.where(t.m < 1, 1 - t.m, torch.zeros_like(t.m)),
    "ipo": lambda t: (t.f / t.n_w - t.g / t.n_x - 1 / (2 * t.beta)) ** 2,
    "exo_pair": lambda t: t.p * torch.log(t.p / (1 - t.e)) + (1 - t.p) * torch.log((1 - t.p) / t.e),
    "nca_pair": lambda t: softplus(-t.beta * t.u) + 0.5 * softplus(t.beta * t.u) + 0.5 * softplus(t.beta * t.v),
    "robust": lambda t: ((1 - t.e) * softplus(-t.m) - t.e * softplus(t.m)) / (1 - 2 * t.e),
    "bco_pair": lambda t: softplus(-t.beta * t.u) + softplus(t.beta * t.v),
    "sppo_hard": lambda t: (t.u - 1 / (2 * t.beta)) ** 2 + (t.v + 1 / (2 * t.beta)) ** 2,
    "aot": lambda t: t.between(t.w - t.x, t.rw - t.rx),
    "aot_unpaired": lambda t: t.between(t.u, t.v),
    "apo_zero": lambda t: 1 - torch.sigmoid(t.beta * t.u) + torch.sigmoid(t.beta * t.v),
    "apo_down": lambda t: torch.sigmoid(t.beta * t.u) + 1 - torch.sigmoid(t.beta * (t.u - t.v)),
    "discopop": lambda t: softplus(-t.m) * (1 - t.mix) + torch.exp(-t.m) * t.mix,
    "simpo": lambda t: t.smoothed(t.beta * (t.w / t.n_w - t.x / t.n_x) - t.s["simpo_gamma"]),
    "cpo": lambda t: t.smoothed(t.beta * (t.w - t.x)) - t.s["cpo_alpha"] * t.w.sum() / t.n_w.sum(),
    "orpo": lambda t: (
        -t.w / t.n_w + t.beta * torch.log(1 + odds(torch.exp(t.x / t.n_x)) / odds(torch.exp(t.w / t.n_w)))
    ),
}


def wpo_weights(policy: Padded) -> Tensor:
    half = len(policy.logps) // 2
    aligned = ((policy.logps - policy.squares) * policy.mask).sum(1) / policy.lengths
    weight = torch.exp(aligned).detach()
    return weight[:half] * weight[half:]


def padded_pair_objective(model: Any, reference: Any, groups: list[Group], s: dict[str, Any]) -> Tensor:
    """The batch loss of pairwise losses, ``sft`` and RPO's term, with weights, as an ordinary trainer computes it."""
    chosen, rejected = pairs_of(groups)
    policy = run_padded(model, chosen + rejected)
    with torch.no_grad():
        ref = run_padded(reference, chosen + rejected)
    win = policy[: len(chosen)]
    names = s["loss_type"]
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in zip(names, s.get("loss_weights") or [1.0] * len(names), strict=True):
        if name == "sft":
            total = total + weight * -(win.logps[win.mask.bool()]).mean()
            continue
        values = FORMULAS[name](Terms(policy, ref, s))
        if s.get("use_weighting"):
            values = values * wpo_weights(policy)
        total = total + weight * values.mean()
    if s.get("rpo_alpha") is not None:
        total = total + s["rpo_alpha"] * -(win.sums / win.lengths).mean()
    return total


def padded_labelled_objective(model: Any, reference: Any, groups: list[Group], s: dict[str, Any]) -> Tensor:
    """KTO and APO-zero on single labels: prompts, responses and labels in one flat list.

    For the KL, a prompt's k-th labelled response is paired with the k-th one before the prompt's own that answers
    another prompt, the end of the batch standing before its beginning.
    """
    flat = [
        (g.prompt_ids, g.response_ids[k], good)
        for g in groups
        for edge in g.edges
        for k, good in zip(edge, (True, False), strict=True)
    ]
    sequences = [(p, r) for p, r, _ in flat]
    moved, first = [], 0
    for g in groups:
        count = 2 * len(g.edges)
        before = [flat[i] for i in [*range(first - 1, -1, -1), *range(len(flat) - 1, first - 1, -1)]]
        foreign = [r for p, r, _ in before if p.tolist() != g.prompt_ids.tolist()]
        moved += [(g.prompt_ids, foreign[k % len(foreign)]) for k in range(count)]
        first += count
    policy = run_padded(model, sequences)
    with torch.no_grad():
        ref = run_padded(reference, sequences)
        kl = (run_padded(model, moved).sums - run_padded(reference, moved).sums).mean().clamp(min=0)
    t, beta = policy.sums - ref.sums, s["beta"]
    values = []
    for i, (_, _, good) in enumerate(flat):
        weight = s["desirable_weight"] if good else s["undesirable_weight"]
        if s["loss_type"] == ["kto"]:
            values.append(weight * (1 - torch.sigmoid(beta * (t[i] - kl) if good else beta * (kl - t[i]))))
        else:
            values.append(weight * (1 - torch.sigmoid(beta * t[i]) if good else torch.sigmoid(beta * t[i])))
    return torch.stack(values).mean()


def padded_plackett_luce(model: Any, reference: Any, groups: list[Group], s: dict[str, Any]) -> Tensor:
    """Minus the log-probability of each ranking: place after place, a softmax over what is left."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        wins = [sum(edge[0] == k for edge in group.edges) for k in range(len(group.response_ids))]
        order = sorted(range(len(wins)), key=lambda k: -wins[k])
        sequences = [(group.prompt_ids, group.response_ids[k]) for k in order]
        policy = run_padded(model, sequences).sums
        with torch.no_grad():
            ref = run_padded(reference, sequences).sums
        rewards = s["beta"] * (policy - ref)
        for k in range(len(order)):
            total = total - torch.log(torch.softmax(rewards[k:], dim=0)[0])
    return total / len(groups)
