"""The functions of the running Python's standard library: real text that every installation has."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from flexdpo.errors import FlexdpoError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# packages that are not the standard library, and test suites: some distributions strip the tests, and most of their
# bodies are runs of assertions that fit any test function
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test"})
_CONTEXT_CHARACTERS = 500
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class SourceFunction:
    """One function, cut into the code that leads up to it, its head and its body.

    All three are whole lines, shifted left by the indentation of the ``def``, so that a body looks the same whether
    the function stands in a class or not.
    """

    module: str  # path of the file below the library's folder, for instance "json/decoder.py"
    name: str
    context: str  # lines before the function, up to about 500 characters; empty at the top of a file
    head: str  # decorators, signature and, where there is a docstring, its first line as a docstring of its own
    body: str  # the statements, without the docstring
    parameters: frozenset[str]  # their names, ``self`` and ``cls`` left out

    def uses_parameter(self, text: str) -> bool:
        """Whether ``text`` names at least one of the function's parameters."""
        return not self.parameters.isdisjoint(_IDENTIFIER.findall(text))


@dataclass(frozen=True)
class StandardLibrary:
    """What was read of the standard library, in the order of the modules' names."""

    texts: dict[str, str]  # source text by module
    functions: tuple[SourceFunction, ...]  # those that have a body besides their docstring
    unreadable: tuple[str, ...]  # modules that could not be decoded or parsed


def read_standard_library(root: Path | None = None, *, progress: bool = False) -> StandardLibrary:
    """Read every module of the running Python's standard library, or of the folder ``root``, tests left out.

    Raises:
        FlexdpoError: if the folder holds no readable Python source, as in a Python that ships bytecode only.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts: dict[str, str] = {}
    functions: list[SourceFunction] = []
    unreadable: list[str] = []
    files = sorted((path.relative_to(root).as_posix(), path) for path in _source_files(root))
    for module, path in tqdm(files, desc="Reading the standard library", unit=" files", disable=not progress):
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in somebody else's code
                tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            unreadable.append(module)
            continue
        texts[module] = text
        functions.extend(_functions_of(module, text, tree))
    if not functions:
        raise FlexdpoError(
            f"no Python source found below {root}: the built-in example reads the standard library's .py files; "
            "use a Python that ships them, or train on your own data with --dataset_name"
        )
    return StandardLibrary(texts, tuple(functions), tuple(unreadable))


def _source_files(root: Path) -> Iterator[Path]:
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and path.name not in _SKIPPED_FOLDERS:
            yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _functions_of(module: str, text: str, tree: ast.Module) -> Iterator[SourceFunction]:
    lines = text.splitlines(keepends=True)
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _cut_function(module, lines, node)
            if function is not None:
                yield function


def _statements(block: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Every statement of a block and of the blocks within, in order; expressions, most of a tree, are not visited."""
    for node in block:
        yield node
        for inner in ("body", "handlers", "cases", "orelse", "finalbody"):
            children = getattr(node, inner, None)
            if isinstance(children, list):  # a lambda's or a conditional expression's body is a node
                yield from _statements(children)


def _cut_function(module: str, lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> SourceFunction | None:
    """Cut one function out of its file; None where head and body share a line or there is no body."""
    start, indent = _first_line(node), node.col_offset
    docstring = ast.get_docstring(node, clean=True)
    if docstring is None:
        head_end, body_start = _first_line(node.body[0]) - 1, _first_line(node.body[0])
        summary = ""
    else:
        head_end, body_start = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) + 1
        first = docstring.strip().split("\n", 1)[0].strip()
        summary = f'    """{first}"""\n'
    head = _shifted(lines[start - 1 : head_end], indent)
    body = _shifted(lines[body_start - 1 : node.end_lineno], indent).strip("\n")
    if head_end < node.lineno or not body.strip():
        return None
    context = _shifted(_lines_before(lines, start - 1), indent)
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    names = frozenset(parameter.arg for parameter in parameters) - {"self", "cls"}
    return SourceFunction(module, node.name, context, head + summary, body + "\n", names)


def _first_line(node: ast.stmt) -> int:
    """Line of a statement's beginning, its decorators included, counted from 1."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _lines_before(lines: list[str], end: int) -> list[str]:
    start, characters = end, 0
    while start > 0 and characters < _CONTEXT_CHARACTERS:
        start -= 1
        characters += len(lines[start])
    return lines[start:end]


def _shifted(lines: list[str], indent: int) -> str:
    """Join lines after taking up to ``indent`` blanks away on the left; a blank line becomes a bare newline."""
    shifted = []
    for line in lines:
        blanks = len(line) - len(line.lstrip(" \t"))
        shifted.append(line[min(blanks, indent) :].rstrip() + "\n")
    return "".join(shifted)
