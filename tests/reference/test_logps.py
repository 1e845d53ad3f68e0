"""Precomputed reference log-probabilities: the ordinary values, once each, whatever interrupts; and caches gone bad."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from flexdpo import FlexdpoError, Group, Row, pack, prepare_model, response_logps
from flexdpo.objective.logps import ResponseLogps, pair_sums
from flexdpo.reference.cache import (
    ReferenceCache,
    ReferenceIdentity,
    response_key,
)
from flexdpo.reference.fingerprints import model_fingerprint
from flexdpo.reference.logps import PrecomputeReport, PrecomputeSettings, precompute_reference
from tests.conftest import build_model, odd_groups, random_ids

IDENTITY = ReferenceIdentity("model-a", "tokenizer-a", (("max_length", 64),))


def dataset(seed: int = 0) -> list[Group]:
    """Odd groups, two turns of one conversation, a shared system prompt, a repeated response and a repeated prompt."""
    rng = np.random.default_rng(seed)
    system, question = random_ids(rng, 12), random_ids(rng, 6)
    first = Group.from_lists(system + question, [random_ids(rng, 7), random_ids(rng, 3)], name="turn 1")
    answered = system + question + first.response_ids[0].tolist()
    return [
        *odd_groups(rng),
        first,
        Group.from_lists(answered + random_ids(rng, 4), [random_ids(rng, 5), random_ids(rng, 9)], name="turn 2"),
        Group.from_lists(system + random_ids(rng, 5), [random_ids(rng, 4), random_ids(rng, 6)], name="other question"),
        Group(first.prompt_ids, (first.response_ids[1], np.array(random_ids(rng, 5))), ((1, 0),), "same prompt"),
        # one response begins with the other, and the second prompt continues the first
        Group.from_lists([5, 6], [[7, 8, 9], [7, 8]], name="nested"),
        Group.from_lists([5, 6, 7], [[8, 9], [8]], name="cut elsewhere"),
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return prepare_model(build_model("gpt2", "flexdpo"))


def filled(
    folder: Path, groups: list[Group], run: Callable[[Row], ResponseLogps], **settings: Any
) -> tuple[ReferenceCache, PrecomputeReport]:
    cache = ReferenceCache(folder, IDENTITY)
    settings = {"min_shared": 4, "progress": False, "max_tokens_per_row": 64, **settings}
    return cache, precompute_reference(cache, groups, run, PrecomputeSettings(**settings))


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_tokens_per_row": None}, {"min_shared": 10_000}, {"pad_to_multiple_of": 16}, {"clusters_per_row": 1}],
    ids=str,
)
def test_values_are_the_ordinary_ones(model: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    groups = dataset()
    cache, report = filled(tmp_path, groups, lambda row: response_logps(model, row), **settings)
    stock = build_model("gpt2")
    for group in groups:
        for got, response in zip(cache.sums(group), group.response_ids, strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]))[None]
            with torch.no_grad():
                logps = stock(input_ids=ids).logits[0, :-1].log_softmax(-1)
            want = logps.gather(1, ids[0, 1:, None])[-response.size :].sum()
            assert got == pytest.approx(float(want), rel=1e-9)
    distinct = {response_key(g.prompt_ids, r) for g in groups for r in g.response_ids}
    assert report.responses == len(distinct) < sum(len(g.response_ids) for g in groups)
    assert report.found == 0


def test_relatives_save_more_tokens_than_training_does(model: Any, tmp_path: Path) -> None:
    groups = dataset()
    training = sum(row.num_tokens for row in pack(groups, 64))
    cache, report = filled(tmp_path, groups, lambda row: response_logps(model, row))
    assert report.tokens_run < training
    assert len(cache.values) == report.responses
    # the targets are the response tokens alone, although prompts run as branches of one trie
    seen: list[int] = []
    filled(tmp_path / "again", groups, lambda row: (seen.append(len(row.labels)), response_logps(model, row))[1])
    assert sum(seen) <= sum(response.size for group in groups for response in group.response_ids)


def test_what_ld_needs(model: Any, tmp_path: Path) -> None:
    groups = dataset()
    cache, report = filled(tmp_path, groups, lambda row: response_logps(model, row), with_beginnings=True)
    row = Row.from_groups(groups)
    with torch.no_grad():
        want = pair_sums(response_logps(model, row), row, 0.3)
    got = [pair for group in groups for pair in cache.pair_sums(group, 0.3)]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-9, atol=1e-9)
    assert len(cache.values) > report.responses
    plain, _ = filled(tmp_path / "plain", groups, lambda row: response_logps(model, row))
    with pytest.raises(
        FlexdpoError, match=r"^pair: the cache .* has no reference log-probability for a response of 7 t"
    ):
        plain.pair_sums(groups[0], 0.3)


def test_a_second_start_computes_nothing(model: Any, tmp_path: Path) -> None:
    groups = dataset()
    first, _ = filled(tmp_path, groups, lambda row: response_logps(model, row))

    def never(row: Row) -> ResponseLogps:
        raise AssertionError("a row was run again")

    again, report = filled(tmp_path, groups[::-1], never)
    assert (report.rows_run, report.tokens_run, report.found) == (0, 0, report.responses)
    assert [again.sums(g) for g in groups] == [first.sums(g) for g in groups]


def test_evaluation_data_only_adds_what_is_new(model: Any, tmp_path: Path) -> None:
    groups = dataset()
    filled(tmp_path, groups[:6], lambda row: response_logps(model, row))
    _, report = filled(tmp_path, groups, lambda row: response_logps(model, row))
    assert 0 < report.found < report.responses
    assert report.tokens_unshared <= sum(group.unshared_tokens for group in groups[6:])


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_continues_with_the_same_values(tmp_path: Path, stop: int) -> None:
    model = prepare_model(build_model("gpt2", "flexdpo").float())
    groups = dataset()
    whole, report = filled(tmp_path / "whole", groups, lambda row: response_logps(model, row))
    assert report.rows_run > 3
    done = 0

    def interrupted(row: Row) -> ResponseLogps:
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return response_logps(model, row)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cut", groups, interrupted)
    continued, rest = filled(tmp_path / "cut", groups, lambda row: response_logps(model, row))
    assert rest.rows_run == report.rows_run - stop
    # bit for bit, though float32 sums depend on what shares a row
    assert [continued.sums(g) for g in groups] == [whole.sums(g) for g in groups]


# a process of its own that begins with all that is imported here
FORK = multiprocessing.get_context("fork")


def test_a_killed_run_keeps_what_it_had_written(model: Any, tmp_path: Path) -> None:
    groups, left = dataset(), 2

    def run(row: Row) -> ResponseLogps:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return response_logps(model, row)

    process = FORK.Process(target=filled, args=(tmp_path / "cut", groups, run), kwargs={"save_every_s": 0.0})
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    whole, report = filled(tmp_path / "whole", groups, lambda row: response_logps(model, row))
    continued, rest = filled(tmp_path / "cut", groups, lambda row: response_logps(model, row))
    assert rest.rows_run == report.rows_run - 2
    assert [continued.sums(g) for g in groups] == [whole.sums(g) for g in groups]


def test_other_data_does_not_follow_an_old_plan(model: Any, tmp_path: Path) -> None:
    def stops_at_once(row: Row) -> ResponseLogps:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, dataset(0), stops_at_once)
    cache, report = filled(tmp_path, dataset(1), lambda row: response_logps(model, row))
    assert report.found == 0
    assert len(cache.values) == report.responses


# --- several processes -----------------------------------------------------------------------------------------------


def test_processes_share_the_rows(model: Any, tmp_path: Path) -> None:
    groups = dataset()
    whole, alone = filled(tmp_path / "whole", groups, lambda row: response_logps(model, row))
    caches = [ReferenceCache(tmp_path / "shared", IDENTITY) for _ in range(3)]
    forwards = [0, 0, 0]
    reports = []
    for index, cache in enumerate(caches):

        def run(row: Row, index: int = index) -> ResponseLogps:
            forwards[index] += 1
            return response_logps(model, row)

        reports.append(
            precompute_reference(
                cache,
                groups,
                run,
                PrecomputeSettings(
                    min_shared=4,
                    max_tokens_per_row=64,
                    progress=False,
                    process_index=index,
                    num_processes=3,
                    equal_forwards=True,
                ),
            )
        )
    assert sum(report.rows_run for report in reports) == alone.rows_run
    assert sum(report.tokens_run for report in reports) == alone.tokens_run
    # sharded weights are gathered by all, so all must run as often
    assert len(set(forwards)) == 1
    assert len({report.rows_run for report in reports}) > 1
    for cache in caches:
        cache.reload()
        assert [cache.sums(g) for g in groups] == [whole.sums(g) for g in groups]


# --- whose values they are -------------------------------------------------------------------------------------------


def test_every_weight_counts() -> None:
    model = build_model("llama")
    before = model_fingerprint(model)
    assert model_fingerprint(build_model("llama")) == before
    weight = model.model.layers[1].mlp.up_proj.weight.data
    old = weight[3, 5].item()
    weight[3, 5] = np.nextafter(old, 10.0)
    assert model_fingerprint(model) != before
    weight[3, 5] = old
    assert model_fingerprint(model) == before
    weight[[0, 1]] = weight[[1, 0]]
    assert model_fingerprint(model) != before
    assert model_fingerprint(build_model("llama").to(torch.bfloat16)) != before


def test_numbers_and_functions_that_modules_keep_count() -> None:
    """What is neither a weight nor a buffer, nor plain: tensors, arrays, an activation that is no module."""
    model = build_model("llama")
    activation: Any = model.model.layers[0].mlp.act_fn
    activation.scale, activation.limits, activation.step = torch.ones(2), np.ones(2), np.float32(1)
    activation.function = torch.nn.functional.silu
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    changes = {"scale": torch.zeros(2), "limits": np.zeros(2), "step": np.float32(2), "function": torch.relu}
    for name, value in changes.items():
        kept = getattr(activation, name)
        setattr(activation, name, value)
        assert model_fingerprint(model) != before, name
        setattr(activation, name, kept)
    model.gradient_checkpointing_enable()
    assert model_fingerprint(model.train()) == before


def test_odd_sizes_and_places_have_fingerprints() -> None:
    storage = torch.arange(40, dtype=torch.uint8)
    plain, moved = torch.nn.Module(), torch.nn.Module()
    plain.register_buffer("x", storage[3:16].clone())
    moved.register_buffer("x", storage[3:16])
    assert model_fingerprint(plain) == model_fingerprint(moved)
    moved.x = storage[3:17][:13] + (torch.arange(13) == 12)
    assert model_fingerprint(plain) != model_fingerprint(moved)


def test_an_adapter_counts_while_it_is_switched_on() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_model("llama"), config)

    def both() -> tuple[str, str]:
        with model.disable_adapter():
            return model_fingerprint(model), ""
        raise AssertionError

    on = model_fingerprint(model)
    off, _ = both()
    assert on != off
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    assert model_fingerprint(model) != on
    assert both()[0] == off
    moved = model_fingerprint(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert model_fingerprint(model) != moved
    assert both()[0] == off


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0})]
)
def test_a_config_counts_and_where_it_lies_does_not(tmp_path: Path, name: str, value: Any) -> None:
    model = build_model("llama").float()
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    assert model_fingerprint(load(tmp_path)) == before
    assert model_fingerprint(load(tmp_path, attn_implementation="sdpa")) == before
    assert model_fingerprint(load(tmp_path, **{name: value})) != before
    # and so does what a module keeps of it
    model.model.norm.variance_epsilon = 1e-3
    assert model_fingerprint(model) != before


def test_a_folder_for_every_identity(tmp_path: Path) -> None:
    others = [
        IDENTITY,
        ReferenceIdentity("model-b", "tokenizer-a", (("max_length", 64),)),
        ReferenceIdentity("model-a", "tokenizer-b", (("max_length", 64),)),
        ReferenceIdentity("model-a", "tokenizer-a", (("max_length", 65),)),
    ]
    assert len({identity.folder_in(tmp_path) for identity in others}) == 4


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (
            ReferenceIdentity("model-b", "tokenizer-a"),
            "of another model: model-a where this run has model-b; give another",
        ),
        (
            ReferenceIdentity("model-a", "tokenizer-b"),
            "of another tokenizer: tokenizer-a where this run has tokenizer-b",
        ),
        (
            ReferenceIdentity("model-a", "tokenizer-a", (("max_length", 32),)),
            r"of another settings: \{'max_length': 64\} where this run has \{'max_length': 32\}",
        ),
    ],
)
def test_a_cache_of_another_run(tmp_path: Path, identity: ReferenceIdentity, message: str) -> None:
    ReferenceCache(tmp_path, IDENTITY)
    with pytest.raises(FlexdpoError, match=message):
        ReferenceCache(tmp_path, identity)


@pytest.fixture
def written(model: Any, tmp_path: Path) -> Path:
    filled(tmp_path / "cache", dataset(), lambda row: response_logps(model, row))
    (part,) = (tmp_path / "cache").glob("part-*.safetensors")
    return part


def test_a_truncated_part(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-9])
    with pytest.raises(FlexdpoError, match=r"part-0-000000\.safetensors is truncated, damaged or not a file of a ref"):
        ReferenceCache(written.parent, IDENTITY)
    written.unlink()
    assert len(ReferenceCache(written.parent, IDENTITY).values) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"weight": t["sums"]}, "it holds weight"),
        (lambda t: {**t, "sums": t["sums"].astype(np.float32)}, "its values are not those that were written"),
        (lambda t: {**t, "sums": t["sums"][:-1]}, "its values are not those that were written"),
        (lambda t: {**t, "sums": t["sums"] * np.nan}, "its values are not those that were written"),
    ],
)
def test_a_foreign_part(written: Path, change: Any, message: str) -> None:
    save_file(change(load_file(written)), written)
    with pytest.raises(
        FlexdpoError, match=rf"part-0-000000.* \({message}\); delete it, and what it held is computed again"
    ):
        ReferenceCache(written.parent, IDENTITY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_part_of_a_dtype_that_numpy_lacks(dtype: torch.dtype, written: Path) -> None:
    values = {name: torch.from_numpy(value) for name, value in load_file(written).items()}
    safetensors.torch.save_file({**values, "sums": values["sums"].to(dtype)}, written)
    with pytest.raises(FlexdpoError, match=r"truncated, damaged or not a file of a reference cache"):
        ReferenceCache(written.parent, IDENTITY)


@pytest.mark.parametrize("name", ["part-0-000000", "plan"])
def test_one_bit_is_noticed_wherever_it_flips(written: Path, name: str) -> None:
    path = written.parent / f"{name}.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FlexdpoError, match=rf"{name}.* \(its values are not those that were written\); delete it"):
            precompute_reference(ReferenceCache(written.parent, IDENTITY), dataset(1), never_run)


def never_run(row: Row) -> ResponseLogps:
    raise AssertionError("a row was run")


def test_a_foreign_plan(written: Path) -> None:
    shutil.copy(written, written.parent / "plan.safetensors")
    cache = ReferenceCache(written.parent, IDENTITY)
    with pytest.raises(FlexdpoError, match=r"plan\.safetensors is truncated, damaged or .* \(it holds keys, sums\)"):
        precompute_reference(cache, dataset(5), lambda row: None, PrecomputeSettings(progress=False))  # type: ignore[arg-type, return-value]


def test_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FlexdpoError, match=r"is no reference cache: it has no identity\.json but 'notes\.txt'; give an em"
    ):
        ReferenceCache(tmp_path, IDENTITY)
    for content in ("{", "[]", json.dumps({"model": "model-a"})):
        (tmp_path / "identity.json").write_text(content)
        with pytest.raises(
            FlexdpoError, match=r"identity\.json is truncated, damaged or not a file of a reference cache"
        ):
            ReferenceCache(tmp_path, IDENTITY)


def test_processes_that_open_a_new_cache_at_once(tmp_path: Path) -> None:
    together = FORK.Barrier(3)

    def claim() -> None:
        for number in range(200):
            together.wait(60)
            ReferenceCache(tmp_path / str(number), IDENTITY)

    processes = [FORK.Process(target=claim) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 200
    assert {entry.name for entry in tmp_path.glob("*/*")} == {"identity.json"}


def test_a_claim_that_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / ".identity.json.0123").write_text("{")
    ReferenceCache(tmp_path, IDENTITY)
    assert ReferenceCache(tmp_path, IDENTITY).identity == IDENTITY


def test_an_example_without_a_value(tmp_path: Path) -> None:
    group = Group.from_lists([3], [[4], [5]], name="row 6")
    with pytest.raises(
        FlexdpoError, match=r"^row 6: the cache .* has no reference log-probability for a response of 1"
    ):
        ReferenceCache(tmp_path, IDENTITY).sums(group)


def test_a_sequence_that_fits_no_row(model: Any, tmp_path: Path) -> None:
    with pytest.raises(
        FlexdpoError, match=r"turn 2 has a sequence of 3\d tokens but rows have room for 32; raise max_tok"
    ):
        filled(
            tmp_path,
            dataset()[4:6],
            lambda row: response_logps(model, row),
            max_tokens_per_row=33,
            pad_to_multiple_of=4,
        )


def test_a_damaged_reference(tmp_path: Path) -> None:
    model = prepare_model(build_model("gpt2", "flexdpo"))
    model.transformer.ln_f.bias.data[0] = float("nan")
    with pytest.raises(FlexdpoError, match=r"^pair: the log-probability of a response under the reference is nan"):
        filled(tmp_path, dataset()[:1], lambda row: response_logps(model, row))
    assert len(ReferenceCache(tmp_path, IDENTITY).values) == 0


@pytest.mark.slow
def test_the_built_in_example_saves_at_least_what_training_saves(tmp_path: Path) -> None:
    from flexdpo.example.stdlib import read_standard_library
    from flexdpo.example.task import build_task
    from flexdpo.objective.logps import sum_targets

    pairs = build_task(read_standard_library(), 0).train
    groups = [Group.from_lists(p.prompt_ids, [p.chosen_ids, p.rejected_ids], name=p.name) for p in pairs]

    def counted(row: Row) -> ResponseLogps:
        # tokens are counted whatever their values are
        return sum_targets(torch.zeros(len(row.labels)), row)

    _, report = filled(tmp_path, groups, counted, min_shared=128, max_tokens_per_row=2048)
    assert report.tokens_unshared == sum(group.unshared_tokens for group in groups)
    assert report.tokens_run <= sum(row.num_tokens for row in pack(groups))
    _, again = filled(tmp_path, groups, counted, min_shared=128, max_tokens_per_row=2048)
    assert (again.rows_run, again.found) == (0, 2 * len(groups))
