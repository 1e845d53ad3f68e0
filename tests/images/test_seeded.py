"""What could go wrong with images, seeded: the comparison must see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import flexdpo
from flexdpo import Row, prepare_model
from flexdpo.dropin import images as batch_images
from flexdpo.hf import images as model_images
from flexdpo.hf import interface
from flexdpo.layout import images as row_images
from flexdpo.layout.images import ImageKeys
from tests.hf.equivalence import Run, gradient_error, logit_error
from tests.images.models import KINDS, make_model
from tests.images.runs import batch_run, example_groups, packed_run, padded_batch, stock_run


def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal placeholders of different images are one token."""
    monkeypatch.setattr(ImageKeys, "first", lambda *_: 0)


def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of Gemma 3 are left out."""
    monkeypatch.setattr(interface, "_has_blocks", lambda _: False)


def counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of text go on behind an image as behind text."""

    def positions(part: Any, ids: torch.Tensor, layout: flexdpo.RowLayout) -> torch.Tensor:
        return layout.position_ids.expand(3, *layout.position_ids.shape)

    monkeypatch.setattr(model_images, "rope_positions", positions)
    counted = lambda part, ids, real, *_: (real.long().cumsum(1) - 1).clamp(min=0).expand(3, *ids.shape)  # noqa: E731
    monkeypatch.setattr(batch_images, "rope_index", counted)


def exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are encoded for each other's prompts."""
    joined = row_images.joined_inputs

    def reversed_order(inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return joined([inputs[1], inputs[0], *inputs[2:]])

    monkeypatch.setattr(row_images, "joined_inputs", reversed_order)
    monkeypatch.setattr(batch_images, "joined_inputs", reversed_order)


BUGS = {"merged": ("llava", merged), "one way": ("gemma3", one_way), "counted on": ("qwen2_vl", counted_on),
        "exchanged": ("internvl", exchanged)}  # fmt: skip


def require_seen(got: Run, want: Run) -> None:
    assert logit_error(got, want) > 1e-3
    assert gradient_error(got, want) > 1e-3


@pytest.mark.parametrize("bug", BUGS)
def test_a_packed_row_shows_it(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seed = BUGS[bug]
    model, groups = make_model(name), example_groups(KINDS[name])
    want = stock_run(model, KINDS[name], groups)
    prepare_model(model)
    rows: Callable[[], list[Row]] = lambda: flexdpo.pack(groups)  # noqa: E731
    if bug == "merged":
        # tries of several groups, which begin alike but for the image
        rows = lambda: [row_of_one_trie(groups)]  # noqa: E731
    require_exact(packed_run(model, rows(), len(groups)), want)
    seed(monkeypatch)
    require_seen(packed_run(model, rows(), len(groups)), want)


def row_of_one_trie(groups: list[flexdpo.Group]) -> Row:
    keys = ImageKeys()
    sequences = [keys.sequences(group) if group.images else group.sequences for group in groups]
    trie = flexdpo.Trie.from_sequences([ids for each in sequences for ids in each])
    return Row.from_tries(groups, [trie])


def require_exact(got: Run, want: Run) -> None:
    assert max(logit_error(got, want), gradient_error(got, want)) < 1e-5


@pytest.mark.parametrize("bug", BUGS)
def test_a_padded_batch_shows_it(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seed = BUGS[bug]
    model, groups = make_model(name), example_groups(KINDS[name])
    batch = padded_batch(model, KINDS[name], groups)
    want = batch_run(model, batch)
    flexdpo.share_prefixes(model, min_gain=1, min_prefix=1)
    require_exact(batch_run(model, batch), want)
    seed(monkeypatch)
    require_seen(batch_run(model, batch), want)


def test_positions_that_do_not_follow_from_what_is_shared_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gave a token other positions in other rows would be found out before it runs."""
    model, kind = make_model("qwen2_vl"), KINDS["qwen2_vl"]
    batch = padded_batch(model, kind, example_groups(kind))
    asked = batch_images.rope_index
    by_row = lambda part, ids, *rest: asked(part, ids, *rest) + torch.arange(len(ids))[:, None]  # noqa: E731
    monkeypatch.setattr(batch_images, "rope_index", by_row)
    sharing = flexdpo.share_prefixes(model, min_gain=1, min_prefix=1)
    batch_run(model, batch)
    assert sharing.stats.passed_through == {"position_ids": 1}
