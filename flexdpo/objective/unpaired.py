"""Learning from responses that are labelled good or bad one by one: KTO and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group, numbered
from flexdpo.layout.row import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class LabelledGroup(Group):
    """A group whose responses are labelled one by one."""

    # for each response, whether it is desirable; ``None`` for responses that are not learned from. Empty where the
    # edges label them: each edge makes its chosen end desirable and its rejected end undesirable.
    labels: tuple[bool | None, ...] = ()
    # responses that belong to other prompts. They are run behind this one only to estimate how far the policy has
    # moved, and never learned from.
    unrelated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and len(self.labels) != len(self.response_ids):
            raise FlexdpoError(
                f"{self.name}: {len(self.labels)} labels for {len(self.response_ids)} responses; give one for each"
            )
        if self.labels and self.edges:
            raise FlexdpoError(f"{self.name}: has both labels and preferences; keep one of them")
        for k in self.unrelated:
            if not 0 <= k < len(self.response_ids):
                raise FlexdpoError(
                    f"{self.name}: unrelated response {k} is missing, the group has responses 0 to "
                    f"{len(self.response_ids) - 1}"
                )
            if self.labels and self.labels[k] is not None:
                raise FlexdpoError(f"{self.name}: response {k} is unrelated to the prompt and labelled; label it None")


class Labelled(NamedTuple):
    """The labelled responses of some groups, ``N`` in all, and the unrelated ones, numbered through; int64."""

    responses: Tensor  # ``[N]``; one with several labels stands here as often
    desirable: Tensor  # the label of each, ``[N]`` bool
    chosen: Tensor  # those that are desirable
    rejected: Tensor  # and those that are not
    unrelated: Tensor  # ``[U]``


def labels_of(group: Group) -> list[tuple[int, bool]]:
    """Return ``(response, desirable)`` for everything a group labels, by its labels or else by its edges."""
    if isinstance(group, LabelledGroup) and group.labels:
        return [(k, label) for k, label in enumerate(group.labels) if label is not None]
    return [(k, desirable) for edge in group.edges for k, desirable in zip(edge, (True, False), strict=True)]


def labelled_responses(groups: Sequence[Group], device: torch.device) -> Labelled:
    """Number the labelled and the unrelated responses of some groups."""
    labels = [(first + k, label) for group, first in numbered(groups) for k, label in labels_of(group)]
    labelled = [(group, first) for group, first in numbered(groups) if isinstance(group, LabelledGroup)]
    return Labelled(
        on_device([k for k, _ in labels], torch.int64, device),
        on_device([label for _, label in labels], torch.bool, device),
        on_device([k for k, label in labels if label], torch.int64, device),
        on_device([k for k, label in labels if not label], torch.int64, device),
        on_device([first + k for group, first in labelled for k in group.unrelated], torch.int64, device),
    )


def with_unrelated_responses(groups: Sequence[Group]) -> list[LabelledGroup]:
    """Give every labelled response's prompt a response to another prompt of the batch, for KTO's estimate of the KL.

    The first labelled response of a group gets the nearest one before it in the batch that belongs to another prompt,
    the second the one before that, and so on; before the first comes the last. Behind the shared prompt each costs its
    own tokens only.

    Raises ``FlexdpoError`` if the batch holds one prompt only, whose own responses say nothing about others.
    """
    labelled = [[group.response_ids[k] for k, _ in labels_of(group)] for group in groups]
    responses = [(group.prompt_key, each) for group, own in zip(groups, labelled, strict=True) for each in own]
    found, first = [], 0
    for group, own in zip(groups, labelled, strict=True):
        before = (responses[first:] + responses[:first])[::-1]
        foreign = [response for prompt, response in before if prompt != group.prompt_key]
        if own and not foreign:
            raise FlexdpoError(
                f"loss_type 'kto' estimates the KL from responses to other prompts, but the batch has none for "
                f"{group.name}: all its {len(responses)} labelled responses answer the same prompt; use a larger "
                "per_device_train_batch_size, or loss_type 'apo_zero_unpaired'"
            )
        added = [foreign[place % len(foreign)] for place in range(len(own))]
        labels, unrelated = (group.labels, group.unrelated) if isinstance(group, LabelledGroup) else ((), ())
        count = len(group.response_ids)
        changed = {
            "response_ids": (*group.response_ids, *added),
            "labels": (*labels, *[None] * len(added)) if labels else (),
            "unrelated": (*unrelated, *range(count, count + len(added))),
        }
        found.append(LabelledGroup(**vars(group) | changed))
        first += len(own)
    return found


def kto_loss(logratios: Tensor, desirable: Tensor, kl: Tensor | float, beta: float, weights: Sequence[float]) -> Tensor:
    """KTO: a desirable response gains, and an undesirable one loses, against how far the policy has moved on average.

    ``logratios`` ``[N]`` are policy minus reference in nats; ``kl`` estimates ``KL(policy || reference)`` in nats, at
    least 0, a scalar without gradient (:func:`kto_kl`); ``beta`` is risk aversion, and pull towards the reference;
    ``weights`` are those of desirable and of undesirable responses. Returns ``[N]``.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, the default KTO loss. With a KL of 0 it is APO-zero on single
    labels: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, term by term.
    """
    one = torch.ones_like(logratios)
    signs, weight = (torch.where(desirable, good * one, bad * one) for good, bad in ((1.0, -1.0), weights))
    return weight * torch.sigmoid(-signs * beta * (logratios - kl))


def kto_kl(unrelated_logratios: Tensor) -> Tensor:
    """The KL (``z_0`` of arXiv:2402.01306), a mean over responses to other prompts without gradient; may be below 0."""
    return unrelated_logratios.detach().mean()
