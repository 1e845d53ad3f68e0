import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from flexdpo import FlexdpoError, Group
from flexdpo.bench import variants
from flexdpo.bench.bench import profile_table, run_bench
from flexdpo.bench.profiles import find_profiles, load_profiles
from flexdpo.bench.settings import BenchSettings
from flexdpo.bench.timing import SAT_OUT, Times, layer_times, measure, paired_ratio
from flexdpo.bench.variants import (
    Packed,
    Padded,
    PaddedLabels,
    Trl,
    Variant,
    Varlen,
    document_bounds,
    pack_pairs,
    within_documents,
)
from flexdpo.cli import main
from flexdpo.commands import bench as command
from flexdpo.estimate.costs import StepSeconds, Work, padded_work, row_work
from flexdpo.estimate.model_shapes import HYBRIDS, SHAPES, build_model, shape_config
from flexdpo.hf.checkpointing import enable_checkpointing
from flexdpo.training.model_size import ModelSize
from tests.attention.test_varlen import replace_varlen_attn

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=97,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)
SMALL = ModelSize.of(CONFIG)


def pairs(count: int, seed: int = 0) -> list[Group]:
    return load_profiles()["tldr"].scaled(0.1).pairs(count, np.random.default_rng(seed), SMALL.vocabulary)


# --- profiles and shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", load_profiles())
def test_lengths_follow_the_profile(name: str) -> None:
    profile = load_profiles()[name]
    drawn = profile.pairs(2000, np.random.default_rng(0), 50)
    prompts = [group.prompt_ids.size for group in drawn]
    responses = [ids.size for group in drawn for ids in group.response_ids]
    assert np.median(prompts) == pytest.approx(profile.median_prompt, rel=0.06)
    assert np.median(responses) == pytest.approx(profile.median_response, rel=0.06)
    assert max(prompts) <= profile.max_prompt
    assert max(len(ids) for group in drawn for ids in group.sequences) <= profile.max_length
    # responses part at their first token, so that only the prompt is shared
    assert all(group.response_ids[0][0] != group.response_ids[1][0] for group in drawn)


def test_the_same_seed_draws_the_same_pairs() -> None:
    first, second = pairs(5), pairs(5)
    assert all(np.array_equal(a.prompt_ids, b.prompt_ids) for a, b in zip(first, second, strict=True))


def test_a_shape_counts_its_own_layers() -> None:
    model = build_model(CONFIG, CPU, torch.float32)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert linear == SMALL.layer_parameters
    assert set(SHAPES) == {"tiny", "llama-160m", "llama-1b", "llama-8b", "qwen3-0.6b"}
    assert set(HYBRIDS) == {"qwen3-next-tiny", "lfm2-tiny", "granite-h-tiny"}
    assert ModelSize.of(shape_config("llama-8b")).layer_parameters + 2 * 4096 * 128256 == pytest.approx(
        8.03e9, rel=0.001
    )


# --- the count of multiplications ------------------------------------------------------------------------------------


def test_work_of_a_pair_by_hand() -> None:
    # 300 prompt tokens: blocks 0-2; chosen 100: blocks 2-3; rejected 100: blocks 3-3 (tokens 400-499)
    group = Group.from_lists([1] * 300, [[2] * 100, [3] * 100])
    (shared,) = pack_pairs([group], True, None, 1)
    # every block of 128 sees all before it: 1 + 2 + 3 + 4 tiles
    assert row_work(shared) == Work(500, 10 * 128**2, 200)
    (apart,) = pack_pairs([group], False, None, 1)
    # the second copy begins at token 400, in block 3, which ends the first copy's reach
    assert row_work(apart) == Work(800, (10 + 2 + 3 + 4) * 128**2, 200)
    assert padded_work([group]) == Work(800, 2 * 10 * 128**2, 800)
    assert padded_work([group], labels_only=True) == Work(800, 2 * 10 * 128**2, 200)


def test_flops_of_a_step_by_hand() -> None:
    work, shape = Work(10, 100, 5), SMALL
    linear, attention, head = 2 * shape.layer_parameters * 10, 4 * 2 * 4 * 8 * 100, 2 * 32 * 97 * 5
    assert work.forward_flops(shape) == linear + attention + head
    training = work.training_flops(shape, checkpointing=False, head_passes=4)
    assert training == 3 * linear + 3.5 * attention + 4 * head
    again = work.training_flops(shape, checkpointing=True, head_passes=3)
    assert again == 4 * linear + 4.5 * attention + 3 * head


# --- the variants compute the same thing -----------------------------------------------------------------------------


def by_documents(query, key, value, documents, scaling=None):
    """Causal attention document by document, in place of CUDA's kernel."""
    outputs = []
    for start, stop in zip(documents.boundaries[:-1], documents.boundaries[1:], strict=True):
        part = [x[:, :, start:stop] for x in (query, key, value)]
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs.append(attend(*part, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def all_variants(model, batches):
    return {
        "padded": Padded(model, batches, CPU),
        "padded, labels only": PaddedLabels(model, batches, CPU),
        "packed": Packed(model, batches, CPU, shared=False),
        "shared": Packed(model, batches, CPU, shared=True),
        "padded rows": Packed(model, batches, CPU, shared=True, pad_to_multiple_of=128),
        "varlen": Varlen(model, batches, CPU),
        "shared, along root paths": Packed(model, batches, CPU, shared=True, impl="varlen"),
    }


def result_of(variant, model):
    variant.enter()
    model.zero_grad()
    reference = variant.reference(0)
    loss = variant.policy(0, reference - torch.tensor([[0.5], [0.1]]))
    return reference, loss, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_variants_give_the_same_values_and_gradients(checkpointing: bool, monkeypatch) -> None:
    replace_varlen_attn(monkeypatch)
    monkeypatch.setattr(variants, "within_documents", by_documents)
    model = build_model(CONFIG, CPU, torch.float64)
    if checkpointing:
        enable_checkpointing(model)
    found = {name: result_of(variant, model) for name, variant in all_variants(model, [pairs(4)]).items()}
    want = found.pop("padded")
    assert want[1] == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * -(0.1 - 0.5)))), rel=1e-6)
    for got in found.values():
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)


def test_an_arm_needs_no_other_before_it(monkeypatch) -> None:
    replace_varlen_attn(monkeypatch)
    monkeypatch.setattr(variants, "within_documents", by_documents)
    batches = [pairs(4)]
    losses = []
    for name in all_variants(build_model(CONFIG, CPU, torch.float64), batches):
        model = build_model(CONFIG, CPU, torch.float64)
        losses.append(result_of(all_variants(model, batches)[name], model)[1])
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_budget_splits_rows_and_changes_no_loss(shared: bool) -> None:
    model, batch = build_model(CONFIG, CPU, torch.float64), pairs(6)
    budget = max(group.unshared_tokens for group in batch) + 20
    split = Packed(model, [batch], CPU, shared=shared, max_tokens_per_row=budget)
    assert len(split.rows[0]) > 1
    got, want = (result_of(variant, model) for variant in (split, Packed(model, [batch], CPU, shared=shared)))
    # best fit may change the order of pairs, never a pair's two sides
    torch.testing.assert_close(got[0].sort(dim=1).values, want[0].sort(dim=1).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)


def test_trl_gives_the_same_loss_on_the_same_pairs() -> None:
    model, batch = build_model(CONFIG, CPU, torch.float32), pairs(3)
    trl, shared = Trl(model, [batch], CPU), Packed(model, [batch], CPU, shared=True)
    trl.enter()
    # the policy is its own reference there, so the loss is ln 2; its gradients tell more
    loss = trl.policy(0, trl.reference(0))
    shared.enter()
    model.zero_grad()
    want = shared.policy(0, shared.reference(0))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    theirs = dict(trl.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_padded_batch_that_does_not_fit_is_halved(monkeypatch) -> None:
    model, batch = build_model(CONFIG, CPU, torch.float64), pairs(4)
    variant = Padded(model, [batch], CPU)
    want = result_of(variant, model)
    original = Padded.logps

    def small_memory(self, part):
        # both sides of a pair
        if len(part[0]) > 2:
            raise torch.OutOfMemoryError
        return original(self, part)

    monkeypatch.setattr(Padded, "logps", small_memory)
    got = result_of(variant, model)
    assert variant.pairs_at_once == 1
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-8)


def test_the_baseline_within_documents_hands_torch_one_tensor_of_bounds(monkeypatch) -> None:
    (row,) = pack_pairs(pairs(3), False, None, 1)
    seen = replace_varlen_attn(monkeypatch, self_attention=True)
    heads = [torch.randn(1, count, row.input_ids.shape[1], 8, dtype=torch.float64) for count in (4, 2, 2)]
    documents = document_bounds(row)
    torch.testing.assert_close(within_documents(*heads, documents, 0.3), by_documents(*heads, documents, 0.3))
    assert seen == ["self-attention"]


# --- timing ----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_measurements_made_side_by_side() -> None:
    # the machine is three times slower in the second round, for both
    def times(*batches: list[float]) -> Times:
        return Times([[StepSeconds(each, each) if each else SAT_OUT for each in batch] for batch in batches])

    slow, fast = times([1, 3, 0], [8, 8, 8]), times([0.5, 1.5, 9], [2, 2, 2])
    ratio = paired_ratio(slow, fast, "total")
    # 2 and 4, weighted by the fast variant's median times of 3 and 4 seconds
    assert ratio["median"] == pytest.approx((2 * 3 + 4 * 4) / 7)
    assert slow.quartiles("policy")["median"] == pytest.approx(2 + 8)


class Recorder(Variant):
    def __init__(self, name: str, log: list[str], *, slow: bool = False) -> None:
        self.name, self.log, self.slow = name, log, slow

    def enter(self) -> None:
        pass

    def reference(self, batch: int) -> torch.Tensor:
        self.log.append(f"{self.name}{batch}")
        return torch.zeros(2, 1)

    def policy(self, batch: int, reference: torch.Tensor) -> torch.Tensor:
        return reference.sum()


def test_variants_alternate_and_slow_ones_sit_out() -> None:
    log: list[str] = []
    variants = [Recorder("a", log, slow=True), Recorder("b", log)]
    times = measure(variants, torch.nn.Linear(1, 1), 2, CPU, rounds=9, seconds=9)
    # once each to warm up, then round by round, in both orders
    both, quick = ["a0", "b0", "a1", "b1"], ["b0", "b1"]
    assert log == ["a0", "b0", *both, *quick, *both, *quick * 5, *both]
    assert [step is SAT_OUT for step in times["a"].steps[0]] == [False, True, False, *[True] * 5, False]
    assert all(step is not SAT_OUT for step in times["b"].steps[1])


def test_a_layers_backward_runs_once_for_each_forward() -> None:
    """A compiled kernel refuses a second one: its buffers are gone."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.runs = 0
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.runs += 1
            assert ctx.runs == 1
            return gradient

    heads = [torch.randn(3, requires_grad=True)]
    assert all(time >= 0 for time in layer_times(Once.apply, heads, CPU))


def test_no_round_begins_after_the_time_is_up() -> None:
    log: list[str] = []
    measure([Recorder("a", log)], torch.nn.Linear(1, 1), 1, CPU, rounds=50, seconds=1e-9)
    assert len(log) == 1 + 4


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_every_figure(tmp_path, capsys) -> None:
    target = tmp_path / "out.json"
    words = "--device cpu --profile tldr --scale 0.05 --model tiny --pairs 2 --batches 1 --rounds 3 --seconds 1"
    assert (
        command.run([*words.split(), "--baseline", "padded", "padded_labels", "packed", "trl", "--json", str(target)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "tldr" in printed
    assert "efficiency" in printed
    result = json.loads(target.read_text())
    assert {"versions", "device", "date", "threads"} <= set(result["environment"])
    assert result["environment"]["versions"]["torch"] == torch.__version__
    figures = result["profiles"]["tldr"]
    assert set(figures["variants"]) == {"padded", "padded_labels", "packed", "shared", "trl"}
    for baseline in ("padded", "padded_labels", "packed", "trl"):
        speed = figures["speedups"][baseline]["total"]
        assert speed["efficiency"] == pytest.approx(speed["median"] / speed["ideal"])
        assert figures["speedups"][baseline]["policy"]["median"] > 0
    variant = figures["variants"]["shared"]
    assert variant["pairs_per_second"] == pytest.approx(2 / variant["seconds"]["total"]["median"])
    assert figures["variants"]["packed"]["tokens"] > variant["tokens"]
    assert [row["layout"] for row in figures["kernels"]] == ["packed", "shared"]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in figures["kernels"])
    assert profile_table("tldr", figures) in printed


def test_the_command_explains_itself(capsys) -> None:
    assert main(["bench", "--help"]) == 0
    assert "--baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "tdlr"], "--profile 'tdlr' is unknown; did you mean 'tldr'"),
        (["--model", "lama-1b"], "the shape 'lama-1b' is unknown; did you mean 'llama-1b'"),
        (["--baseline", "pakced"], "--baseline 'pakced' is unknown; did you mean 'packed'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", "cpu", "--baseline", "varlen"], "varlen is a kernel for CUDA; use --device cuda"),
        (["--pairs", "0"], "--pairs must be above 0, got 0"),
        (["--dtype", "float8"], "--dtype 'float8' is unknown"),
        (
            ["--json", "no/such/folder/out.json"],
            "cannot be written: No such file or directory; name a file in a folder",
        ),
    ],
)
def test_wrong_options_are_named(words: list[str], message: str) -> None:
    with pytest.raises(FlexdpoError, match=message):
        command.run(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(FlexdpoError, match="torch sees no CUDA device"):
        BenchSettings(device="cuda")


def test_find_profiles_knows_all_six() -> None:
    assert [profile.name for profile in find_profiles("all")] == list(load_profiles())
    assert len(load_profiles()) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_variants_agree_on_a_gpu() -> None:
    settings = BenchSettings(device="cuda", profile="hh_rlhf", pairs=4, batches=1, rounds=3, seconds=5)
    result = run_bench(settings, report=lambda _: None)
    assert set(result["profiles"]["hh_rlhf"]["variants"]) == {"padded", "padded_labels", "packed", "varlen", "shared"}
    kernels = [row["kernel"] for row in result["profiles"]["hh_rlhf"]["kernels"]]
    assert kernels == ["varlen_attn", "flexdpo", "flexdpo", "varlen_attn"]
    device, shape = torch.device("cuda"), ModelSize.of(shape_config("tiny"))
    model = build_model(shape_config("tiny"), device, torch.bfloat16)
    batches = [load_profiles()["hh_rlhf"].pairs(4, np.random.default_rng(0), shape.vocabulary)]
    values = []
    for variant in (
        Padded(model, batches, device),
        PaddedLabels(model, batches, device),
        Varlen(model, batches, device),
    ):
        variant.enter()
        values.append(variant.reference(0))
    along = Packed(model, batches, device, shared=True, impl="varlen")
    along.enter()
    values.append(along.reference(0))
    shared = Packed(model, batches, device, shared=True, pad_to_multiple_of=128)
    shared.enter()
    for other in values:
        torch.testing.assert_close(shared.reference(0), other, rtol=0.02, atol=0.5)
