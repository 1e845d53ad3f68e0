"""Learning from responses that are labelled good or bad one by one: KTO and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from flexdpo.errors import FlexdpoError
from flexdpo.layout.groups import Group
from flexdpo.layout.row import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flexdpo.layout.row import Row


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
    """The labelled responses of a row, ``N`` in all, and its unrelated ones."""

    responses: Tensor  # response index, ``[N]`` int64; a response with several labels stands here as often
    desirable: Tensor  # its label, ``[N]`` bool
    unrelated: Tensor  # response indices of the unrelated ones, ``[U]`` int64


def labels_of(group: Group) -> list[tuple[int, bool]]:
    """Return ``(response, desirable)`` for everything a group labels, by its labels or else by its edges."""
    if isinstance(group, LabelledGroup) and group.labels:
        return [(k, label) for k, label in enumerate(group.labels) if label is not None]
    return [(k, desirable) for edge in group.edges for k, desirable in zip(edge, (True, False), strict=True)]


def labelled_responses(row: Row) -> Labelled:
    """Number the labelled and the unrelated responses of a row's groups through the row."""
    labels: list[tuple[int, bool]] = []
    unrelated: list[int] = []
    for group, first in row.numbered_groups():
        labels += [(first + k, desirable) for k, desirable in labels_of(group)]
        if isinstance(group, LabelledGroup):
            unrelated += [first + k for k in group.unrelated]
    device = row.edges.device
    return Labelled(
        on_device([k for k, _ in labels], torch.int64, device),
        on_device([desirable for _, desirable in labels], torch.bool, device),
        on_device(unrelated, torch.int64, device),
    )


def with_unrelated_responses(groups: Sequence[Group]) -> list[LabelledGroup]:
    """Give every labelled response's prompt a response to another prompt of the batch, for KTO's estimate of the KL.

    The first labelled response of a group gets the nearest one before it in the batch that belongs to another prompt,
    the second the one before that, and so on; before the first comes the last. Behind the shared prompt each costs its
    own tokens only.

    Raises ``FlexdpoError`` if the batch holds one prompt only, whose own responses say nothing about others.
    """
    labelled = [[k for k, _ in labels_of(group)] for group in groups]
    prompts = [group.prompt_key for group in groups]
    responses = [
        (prompts[number], groups[number].response_ids[k]) for number, members in enumerate(labelled) for k in members
    ]
    found, first = [], 0
    for group, prompt, members in zip(groups, prompts, labelled, strict=True):
        before = [*responses[:first][::-1], *responses[first:][::-1]]
        foreign = [response for other, response in before if other != prompt]
        if members and not foreign:
            raise FlexdpoError(
                f"loss_type 'kto' estimates the KL from responses to other prompts, but the batch has none for "
                f"{group.name}: all its {len(responses)} labelled responses answer the same prompt; use a larger "
                "per_device_train_batch_size, or loss_type 'apo_zero_unpaired'"
            )
        added = [foreign[place % len(foreign)] for place in range(len(members))]
        labels, unrelated = (group.labels, group.unrelated) if isinstance(group, LabelledGroup) else ((), ())
        count = len(group.response_ids)
        found.append(
            LabelledGroup(
                group.prompt_ids,
                (*group.response_ids, *added),
                group.edges,
                group.name,
                labels=(*labels, *[None] * len(added)) if labels else (),
                unrelated=(*unrelated, *range(count, count + len(added))),
                images=group.images,
                image_token_id=group.image_token_id,
            )
        )
        first += len(members)
    return found


def kto_loss(
    logratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: a desirable response gains, and an undesirable one loses, against how far the policy has moved on average.

    ``logratios`` ``[N]`` are policy minus reference in nats; ``kl`` estimates ``KL(policy || reference)`` in nats, at
    least 0, a scalar without gradient (:func:`kto_kl`); ``beta`` is risk aversion, and pull towards the reference.

    Returns ``[N]``.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, the default KTO loss.
    """
    one = torch.ones_like(logratios)
    signs = torch.where(desirable, one, -one)
    weights = torch.where(desirable, desirable_weight * one, undesirable_weight * one)
    return weights * torch.sigmoid(-signs * beta * (logratios - kl))


def apo_zero_unpaired_loss(
    logratios: Tensor, desirable: Tensor, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero on single labels: KTO with the reference point at 0, so that no KL need be estimated.

    The arguments and the result are those of :func:`kto_loss`.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, term by term.
    """
    return kto_loss(logratios, desirable, logratios.new_zeros(()), beta, desirable_weight, undesirable_weight)


def kto_kl(unrelated_logratios: Tensor) -> Tensor:
    """Estimate the KL from responses to other prompts, as a mean in nats without gradient; may still be negative.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306 (``z_0`` there; the loss takes it at least 0).
    """
    return unrelated_logratios.detach().mean()
