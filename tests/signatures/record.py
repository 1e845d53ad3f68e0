"""Which APIs of torch the package uses, and their signatures in releases that are not installed.

``torch.json`` beside this file was made from the Python sources of the releases' wheels, unpacked and not installed::

    pip download torch==2.15.0 --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --python-version 3.11
    unzip torch-2.15.0-*.whl 'torch/*.py' 'torch/*.pyi' 'torchgen/*.yaml' -d sources
    python -m tests.signatures.record 2.15.0 sources

It holds every name that may differ between releases: what is private, what is in a namespace that torch calls a
prototype, and every function written in Python that the package calls with keywords.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[2] / "flexdpo"
RECORD = Path(__file__).with_name("torch.json")
# torch's own documentation calls these prototypes or leaves them out
UNSTABLE = ("torch.nn.attention.", "torch.fx.", "torch.distributed.fsdp.", "torch.distributed.tensor.")


class Use(NamedTuple):
    """One mention of a name of torch in the package.

    Attributes:
        name: Dotted, as torch documents it.
        place: File and line.
        call: The call, where it is one.
    """

    name: str
    place: str
    call: ast.Call | None


@cache
def uses(package: Path = PACKAGE) -> list[Use]:
    """Every mention of a torch API in the package's source."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _imported(tree)
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        where = path.relative_to(package.parent)
        for node in ast.walk(tree):
            dotted = _dotted(node, names) if isinstance(node, ast.Attribute | ast.Name) else None
            if dotted is not None and id(node) not in inner:
                name = re.sub(r"(\.__\w+__)+$", "", dotted)
                found.append(Use(name, f"{where}:{node.lineno}", calls.get(id(node))))
    return found


def _imported(tree: ast.AST) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    # a class of ours has its base's constructors, unless it has one of its own
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and len(node.bases) == 1]
    derived = [node for node in classes if _member(node, ["__init__"]) is None]
    found = {node.name: _dotted(node.bases[0], names) for node in derived}
    return names | {name: base for name, base in found.items() if base is not None}


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, names)) is not None:
        return f"{base}.{node.attr}"
    return None


def may_differ(use: Use, installed: Any) -> bool:
    """Whether a name is private, a prototype, or called with keywords, which releases rename, add and remove.

    Args:
        use: The mention.
        installed: The object of this name, ``None`` where the installed torch has none.
    """
    private = any(part.startswith("_") and not part.startswith("__") for part in use.name.split("."))
    # operators, made in C++, keep their arguments
    keywords = use.call is not None and bool(use.call.keywords) and not isinstance(installed, types.BuiltinFunctionType)
    return private or use.name.startswith(UNSTABLE) or keywords


# --- reading a release's sources -------------------------------------------------------------------------------------


def signature_in(root: Path, name: str) -> str | None:
    """Parameters of a name in a release's sources, ``""`` for what has none, ``None`` where it does not exist."""
    if name.startswith("torch.ops.aten."):
        return _operator(root, name.removesuffix(".default").rpartition(".")[2])
    if _module(root, name) is not None:
        return ""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = _module(root, ".".join(parts[:cut]))
        if module is not None:
            break
    else:
        return None
    tree = ast.parse(module.read_text(encoding="utf-8"))
    if parts[cut:] == ["patch"]:
        # a config's patch takes its settings
        return ", ".join(["*", *(f"{setting}=None" for setting in _assigned(tree))])
    node = _member(tree, parts[cut:])
    if node is not None:
        return _parameters(node)
    owner = _member(tree, parts[cut:-1])
    bases = [_dotted(base, _imported(tree)) for base in owner.bases] if isinstance(owner, ast.ClassDef) else []
    if any(bases):
        # what a class has from the one it is made of
        home, rest = next(filter(None, bases)), parts[-1:]
    else:
        package = parts[:cut] if module.stem == "__init__" else parts[: cut - 1]
        home, rest = _imported_from(root, tree, parts[cut], package), parts[cut + 1 :]
    return None if home is None else signature_in(root, ".".join([home, *rest]))


def _imported_from(root: Path, tree: ast.Module, name: str, package: list[str]) -> str | None:
    """Where a module has a name from that it does not define itself."""
    for child in _statements(tree):
        for alias in child.names if isinstance(child, ast.ImportFrom) else ():
            parents = package[: len(package) - child.level + 1] if child.level else []
            source = ".".join([*parents, *filter(None, [child.module])])
            if (alias.asname or alias.name) == name:
                return f"{source}.{alias.name}"
            file = _module(root, source) if alias.name == "*" else None
            if file is not None and _member(ast.parse(file.read_text(encoding="utf-8")), [name]) is not None:
                return f"{source}.{name}"
    # torch takes all of its C++ part in
    return f"torch._C.{name}" if package == ["torch"] else None


def _module(root: Path, name: str) -> Path | None:
    base = root / name.replace(".", "/")
    # type stubs where there is nothing else: the sources are what runs
    candidates = (base / "__init__.py", base.with_suffix(".py"), base / "__init__.pyi", base.with_suffix(".pyi"))
    return next((path for path in candidates if path.is_file()), None)


def _member(node: ast.AST, path: list[str]) -> ast.AST | None:
    if not path:
        return node
    found = None
    for child in _statements(node):
        overload = any("overload" in ast.unparse(each) for each in getattr(child, "decorator_list", ()))
        if getattr(child, "name", None) == path[0] and not overload:
            found = child
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == path[0] for target in targets):
            found = child
    return None if found is None else _member(found, path[1:])


def _statements(node: ast.AST) -> list[ast.stmt]:
    """The statements of a module or class, those under its conditions included."""
    found: list[ast.stmt] = []
    for child in [*getattr(node, "body", ()), *getattr(node, "orelse", ())]:
        found += _statements(child) if isinstance(child, ast.If | ast.Try) else [child]
    return found


def _assigned(node: ast.AST) -> list[str]:
    targets = [child.target for child in _statements(node) if isinstance(child, ast.AnnAssign)]
    targets += [target for child in _statements(node) if isinstance(child, ast.Assign) for target in child.targets]
    return sorted({target.id for target in targets if isinstance(target, ast.Name) and target.id[0] != "_"})


def _parameters(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef):
        return _plain(node)
    if not isinstance(node, ast.ClassDef):
        return ""
    constructor = _member(node, ["__init__"])
    if isinstance(constructor, ast.FunctionDef):
        return _plain(constructor)
    # named tuples, dataclasses and typed dictionaries: their fields
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)]
    typed = any("TypedDict" in ast.unparse(base) for base in node.bases)
    names = [f"{ast.unparse(each.target)}{'' if each.value is None and not typed else '=None'}" for each in fields]
    return ", ".join(["*", *names] if typed and names else names)


def _plain(function: ast.FunctionDef) -> str:
    """Names and kinds only; ``None`` stands for every default."""
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for argument in (arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if each is None else ast.Constant(None) for each in arguments.kw_defaults]
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    return ast.unparse(arguments)


def _operator(root: Path, name: str) -> str | None:
    text = (root / "torchgen/packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    schema = re.search(rf"^- func: {name}\((.*)\) ->", text, re.MULTILINE)
    if schema is None:
        return None
    words = [part.split(" ")[-1] for part in schema.group(1).split(", ")]
    return ", ".join(f"{word.split('=')[0]}=None" if "=" in word else word for word in words)


def main(version: str, root: str) -> None:
    """Write a release's signatures into the record, and drop the names that the package no longer uses."""
    from tests.signatures.test_torch import names_that_may_differ

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    names = names_that_may_differ()
    found = {version: {name: signature_in(Path(root), name) for name in names}}
    kept = {release: {name: old[name] for name in names if name in old} for release, old in record.items()}
    RECORD.write_text(json.dumps(dict(sorted((kept | found).items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
