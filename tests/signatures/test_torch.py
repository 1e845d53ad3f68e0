"""Every call of a torch API that may differ between releases fits the oldest torch supported and the newest."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from typing import Any

import pytest
import torch

from flexdpo import Group, Row
from flexdpo.attention import flex
from flexdpo.attention.inputs import AttentionInputs
from flexdpo.attention.mask_mods import CAUSAL
from flexdpo.attention.row_mask import row_mask_for
from tests.signatures.record import RECORD, Use, may_differ, uses

RECORDED: dict[str, dict[str, str | None]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
INSTALLED = torch.__version__.split("+")[0]


def installed(name: str) -> Any:
    """The object of this name; ``None`` where the installed torch has none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def names_that_may_differ() -> list[str]:
    return sorted({use.name for use in uses() if may_differ(use, installed(use.name))})


def signature(parameters: str) -> inspect.Signature:
    scope: dict[str, Any] = {}
    exec(f"def recorded({parameters}): ...", scope)
    return inspect.signature(scope["recorded"])


def misfit(use: Use, parameters: str) -> str | None:
    """What is wrong with a call under these parameters, as far as its text tells."""
    call = use.call
    assert call is not None
    keywords = {each.arg: None for each in call.keywords if each.arg is not None}
    splatted = any(each.arg is None for each in call.keywords)
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    bind = signature(parameters).bind_partial if splatted or starred else signature(parameters).bind
    try:
        bind(*([] if starred else [None] * len(call.args)), **keywords)
    except TypeError as error:
        return f"{use.place}: {use.name}({parameters}): {error}"
    return None


def test_the_oldest_and_the_newest_release_are_recorded() -> None:
    assert min(RECORDED) == "2.11.0"
    assert max(RECORDED) >= "2.15.0"


def test_every_name_that_may_differ_is_recorded() -> None:
    """A new one is added by running ``tests/signatures/record.py`` on the sources of every release."""
    for release in RECORDED.values():
        assert set(names_that_may_differ()) <= set(release)


@pytest.mark.parametrize("release", RECORDED)
def test_every_name_exists(release: str) -> None:
    missing = {name for name in names_that_may_differ() if RECORDED[release][name] is None}
    assert not missing


@pytest.mark.parametrize("release", RECORDED)
def test_every_call_fits(release: str) -> None:
    recorded = RECORDED[release]
    calls = [use for use in uses() if use.call is not None and recorded.get(use.name) is not None]
    assert len(calls) > 10
    assert [wrong for use in calls if (wrong := misfit(use, recorded[use.name] or ""))] == []


def test_a_call_with_an_argument_that_the_oldest_does_not_have_is_found() -> None:
    name = "torch.nn.attention.varlen.varlen_attn"
    call = ast.parse("varlen_attn(q, k, v, a, b, 1, 1, window_size=(-1, 0), enable_gqa=True)", mode="eval").body
    assert isinstance(call, ast.Call)
    use = Use(name, "here", call)
    assert "unexpected keyword argument 'enable_gqa'" in str(misfit(use, RECORDED["2.11.0"][name] or ""))
    assert misfit(use, RECORDED["2.15.0"][name] or "") is None


@pytest.mark.skipif(INSTALLED not in RECORDED, reason="this torch is not among those recorded")
def test_the_record_says_what_the_installed_torch_says() -> None:
    for name, parameters in RECORDED[INSTALLED].items():
        found = installed(name)
        assert (found is None) == (parameters is None), name
        if inspect.isfunction(found) and name.rpartition(".")[2] != "patch":
            mine, theirs = signature(parameters or ""), inspect.signature(found)
            assert [(p.name, p.kind) for p in mine.parameters.values()] == [
                (p.name, p.kind) for p in theirs.parameters.values()
            ], name
        if name.startswith("torch.ops.aten."):
            schema = getattr(found, "default", found)._schema
            assert list(signature(parameters or "").parameters) == [argument.name for argument in schema.arguments]
        if hasattr(found, "__required_keys__"):
            assert list(signature(parameters or "").parameters) == list(found.__annotations__)


# --- calls whose arguments are put together as they are made ---------------------------------------------------------


@pytest.mark.parametrize("release", RECORDED)
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks"])
def test_flex_attention_gets_what_it_takes(release: str, extras: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.nn.attention.flex_attention"
    seen = []

    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        seen.append(signature(RECORDED[release][f"{module}.flex_attention"] or "").bind(*args, **kwargs).arguments)
        aux = torch.zeros(args[0].shape[:3])
        return (args[0], type("Aux", (), {"lse": aux})()) if "return_aux" in kwargs else args[0]

    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(flex, "_require_cpu_forward", lambda *args: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    row = Row.from_groups([Group.from_lists([1, 2], [[3], [4]])])
    row_mask = row_mask_for(row.layout, CAUSAL, "flex")
    query = torch.zeros(1, 2, row.layout.length, 16)
    softcap, sinks = (5.0 if extras == "softcap" else None), (torch.zeros(2) if extras == "sinks" else None)
    flex.run_flex(AttentionInputs(query, query, query, 0.5, softcap, sinks), row_mask)
    assert {"query", "key", "value", "block_mask", "scale"} <= set(seen[0])


@pytest.mark.parametrize("release", RECORDED)
def test_varlen_attn_gets_what_it_takes(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexdpo.attention import torch_varlen

    parameters = RECORDED[release]["torch.nn.attention.varlen.varlen_attn"] or ""
    seen = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Any:
        seen.append(signature(parameters).bind(*args, **kwargs).arguments)
        return args[0]

    varlen_attn.__signature__ = signature(parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(torch_varlen, "require_flash", lambda query: None)
    query, key, starts = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    sequences = torch_varlen.Sequences(starts, starts.clone(), 3, 3)
    torch_varlen.torch_varlen(query, key, key, sequences, window=2, scaling=0.5)
    (arguments,) = seen
    assert (arguments["window_size"], arguments["scale"]) == ((1, 0), 0.5)
    assert arguments.get("enable_gqa", True) is True
    assert ("enable_gqa" in arguments) == (release != "2.11.0")
