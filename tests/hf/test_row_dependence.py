"""What a model takes from the longest position of its batch or from row indices, on both sides of every threshold."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexdpo import (
    FlexdpoError,
    Group,
    Row,
    Trie,
    UnsupportedModelError,
    make_train_step,
    pack,
    prepare_model,
    share_prefixes,
)
from flexdpo.hf.row_dependence import LengthLimits, length_limits, limits_of
from flexdpo.hf.unwrap import backbone_of
from flexdpo.objective.logps import response_logps
from tests.hf.architectures import build_model, zoo
from tests.hf.equivalence import Float64, Run, example_groups, gradient_error, logit_error, packed_run, unpacked_run

LIMIT = 24
TOLERANCE = 1e-9


def rope_of(kind: str, name: str) -> dict[str, Any]:
    config = zoo()[name].config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = {"short_factor": [1.0] * (head_dim // 2), "long_factor": [3.0] * (head_dim // 2)}
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
        "longrope": {"factor": 4.0, "original_max_position_embeddings": LIMIT, **factors},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LIMIT,
        },
        "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    }
    return {"rope_type": kind, "rope_theta": 10000.0, **settings[kind]}


def build(kind: str, name: str = "llama") -> Any:
    positions = LIMIT if kind == "dynamic" else 4 * LIMIT
    extra = {"original_max_position_embeddings": LIMIT} if name == "phi3" else {}
    return build_model(name, rope_parameters=rope_of(kind, name), max_position_embeddings=positions, **extra)


def groups_about(limit: int) -> list[Group]:
    """Sequences of one token less than the limit, exactly as many, one more and far more; some of one prompt."""
    prompt = list(range(20, 30))
    short, exact, above = (list(range(30, 30 + limit - 10 + more)) for more in (-1, 0, 1))
    return [
        Group.from_lists(prompt, [short, [99, *exact[1:]]]),
        Group.from_lists(prompt, [exact, [98, *above], [98, *above[:3], 97], above], [(0, 1)]),
        *example_groups(),
    ]


def row_about(model: Any) -> Row:
    return Row.from_groups(groups_about(LIMIT), pad_to_multiple_of=16, limits=length_limits(backbone_of(model)).limits)


def split_run(model: Any, row: Row, limits: tuple[int, ...]) -> Run:
    """The packed run, read at the paths of tries that are split at the limits."""
    paths, start = [], 0
    for group in row.groups:
        trie = Trie.from_sequences(group.sequences, limits=limits)
        paths += [torch.from_numpy(path + start) for path in trie.paths]
        start += len(trie)
    logits = model(**row.inputs()).logits[0]
    model.zero_grad()
    chosen = [logits[path] for path in paths]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in chosen]
    torch.stack([(w * each).sum() / each.shape[-1] for w, each in zip(weights, chosen, strict=True)]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Run([each.detach() for each in chosen], gradients)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "longrope", "llama3", "proportional"])
def test_packed_equals_unpacked_across_every_threshold(kind: str, name: str) -> None:
    if kind not in {"default", *ROPE_INIT_FUNCTIONS}:
        pytest.skip(f"transformers {transformers.__version__} has no {kind} frequencies")
    model = build(kind, name)
    row = row_about(model)
    with Float64():
        want = unpacked_run(model, row)
        prepare_model(model)
        got = split_run(model, row, limits_of(model).limits)
    assert limits_of(model).limits == ((LIMIT,) if kind == "longrope" else ())
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE


def test_the_models_that_come_with_two_sets() -> None:
    model = build("longrope", "phi3")
    row = row_about(model)
    with Float64():
        want = unpacked_run(model, row)
        got = split_run(prepare_model(model), row, (LIMIT,))
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE


def test_the_two_sets_differ() -> None:
    """The comparison can fail: with the frequencies of the longest sequence for all, the row is far off."""
    model = build("longrope")
    row = row_about(model)
    with Float64():
        want = unpacked_run(model, row)
        prepare_model(model)
        row.layout.longest.clamp_(min=LIMIT + 1)
        row.layout.shortest.clamp_(min=LIMIT + 1)
        assert logit_error(split_run(model, row, (LIMIT,)), want) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_set_for_every_length(name: str) -> None:
    model = build("dynamic", name)
    assert length_limits(backbone_of(model)) == LengthLimits((LIMIT,), LIMIT)
    fits = Row.from_groups([Group.from_lists(range(20, 30), [range(30, 44), range(50, 60)])])
    with Float64():
        want = unpacked_run(model, fits)
        got = packed_run(prepare_model(model), fits)
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE
    with pytest.raises(UnsupportedModelError, match=rf"beyond {LIMIT} .* set max_length to at most {LIMIT}"):
        model(**row_about(model).inputs())


def test_a_shared_prompt_on_both_sides() -> None:
    model = prepare_model(build("longrope"))
    with pytest.raises(FlexdpoError, match=rf"more than {LIMIT} tokens share a prompt .* limits=\({LIMIT},\)"):
        model(**Row.from_groups(groups_about(LIMIT)).inputs())


def test_log_probabilities_do_not_depend_on_the_rows() -> None:
    model = prepare_model(build("longrope"))
    groups = groups_about(LIMIT)
    with torch.no_grad():
        one, *rest = (
            {g.name: s for row in pack(groups, most, limits=(LIMIT,), sharing=sharing) for g, s in sums_of(model, row)}
            for most, sharing in ((None, "group"), (80, "group"), (200, "step"))
        )
    for other in rest:
        for name, sums in one.items():
            torch.testing.assert_close(other[name], sums, rtol=0, atol=1e-6)


def sums_of(model: Any, row: Row) -> Any:
    counts = [len(group.response_ids) for group in row.groups]
    named = [Group(g.prompt_ids, g.response_ids, g.edges, str(g.sequences)) for g in row.groups]
    return zip(named, response_logps(model, row).sums.split(counts), strict=True)


def test_the_step_splits_what_lies_on_both_sides() -> None:
    model = build("longrope").train()
    step = make_train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), max_tokens_per_row=128)
    assert step(groups_about(LIMIT)).loss.item() == pytest.approx(0.6931472, abs=1e-6)


def test_temperature_by_position() -> None:
    """Llama 4 counts row indices; the documents here reach beyond several steps of its temperature."""
    model = build_model("llama4_text", floor_scale=4, attn_temperature_tuning=True, attn_scale=0.5)
    row = Row.from_groups(example_groups(), pad_to_multiple_of=16)
    with Float64():
        want = unpacked_run(model, row)
        got = packed_run(prepare_model(model), row)
    assert logit_error(got, want) < TOLERANCE
    assert gradient_error(got, want) < TOLERANCE


def test_activated_lora() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(UnsupportedModelError, match="'default' is an activated LoRA"):
        prepare_model(peft.get_peft_model(build_model("llama"), config))


class OnTop(torch.nn.Module):
    """A norm with something after it."""

    def __init__(self, norm: torch.nn.Module, after: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.after = norm, after

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(states).flatten(0, 1)).view_as(states)


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.seen += len(states)
        return states


def with_norm_before(after: type[torch.nn.Module]) -> tuple[Any, Row]:
    model = build_model("llama").train()
    sizes = () if after is Counting else (model.config.hidden_size,)
    model.model.norm = OnTop(model.model.norm, after(*sizes).double())
    return model, Row.from_groups(example_groups())


@pytest.mark.parametrize("shared", [False, True])
def test_statistics_of_the_batch_are_refused(shared: bool) -> None:
    model, row = with_norm_before(torch.nn.BatchNorm1d)
    inputs = row.inputs()
    if shared:
        share_prefixes(model, min_prefix=1)
        ids = torch.arange(20, 40).repeat(3, 1)
        ids[:, -1] = torch.tensor([51, 52, 53])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    else:
        prepare_model(model)
    with pytest.raises(UnsupportedModelError, match=r"norm\.after.*statistics of the batch.*eval mode"):
        model(**inputs)


def test_statistics_of_a_module_put_in_later_are_refused() -> None:
    """Which buffers there are is looked up anew for every row."""
    model, row = build_model("llama").train(), Row.from_groups(example_groups())
    prepare_model(model)(**row.inputs())
    model.model.norm = OnTop(model.model.norm, torch.nn.BatchNorm1d(model.config.hidden_size).double())
    with pytest.raises(UnsupportedModelError, match=r"changes model\.norm\.after\.num_batches_tracked while"):
        model(**row.inputs())


@pytest.mark.parametrize("after", [torch.nn.BatchNorm1d, Counting])
def test_buffers_that_change_no_result_are_accepted(after: type[torch.nn.Module]) -> None:
    model, row = with_norm_before(after)
    if after is not Counting:
        model.model.norm.eval()
    with Float64():
        want = unpacked_run(model, row)
        prepare_model(model)
        for _ in range(2):
            assert logit_error(packed_run(model, row), want) < TOLERANCE
