"""Check that imports inside the package point down its layers only, and in no circle between files."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# a module may import from its own layer and from those before it
# fmt: off
LAYERS = [
    "errors", "layout", "attention", "mixing", "hf", "dropin", "trl", "objective", "reference", "proof", "effects",
    "config", "data", "example", "show", "training", "estimate", "bench", "runs", "commands", "cli", "__main__",
]
# fmt: on
# what `import flexdpo` must not need
HEAVY = {"datasets", "trl", "peft", "matplotlib"}
AT_IMPORT = {"errors", "layout", "attention", "mixing", "hf", "dropin", "objective", "proof", "__init__"}


ROOT = Path(__file__).parents[1] / "flexdpo"


def layer_of(module: str) -> str:
    """The layer of ``flexdpo.<layer>.<module>``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(tree: ast.AST, *, top_level_only: bool) -> list[tuple[int, str]]:
    """Line and name of every absolute import; with ``top_level_only`` those that run when the module is imported."""
    nodes = tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return found


def circles(root: Path) -> list[str]:
    """Files that import each other, round and round, be it in a function or for a type alone."""
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    reached: dict[str, set[str]] = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        names = {name for node in froms for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names))}
        reached[module] = {str(name) for name in names if name in files}
    for middle in files:
        for others in reached.values():
            if middle in others:
                others.update(reached[middle])
    found = {frozenset(other for other in others if module in reached[other]) for module, others in reached.items()}
    return [f"a circle of imports: {', '.join(sorted(circle))}" for circle in found if circle]


def faults(root: Path) -> list[str]:
    """Every import that points up, and every heavy one that would run at ``import flexdpo``."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        layer = layer_of(module)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if layer != "__init__" and layer not in LAYERS:
            wrong.append(f"{path}: {layer} is in no layer; place it in {Path(__file__).name}")
            continue
        for line, name in imported_modules(tree, top_level_only=False):
            other = layer_of(name) if name.startswith("flexdpo.") else None
            if other in LAYERS and layer != "__init__" and LAYERS.index(other) > LAYERS.index(layer):
                wrong.append(f"{path}:{line}: {layer} imports {name}, which is above it")
        for line, name in imported_modules(tree, top_level_only=True):
            if layer in AT_IMPORT and name.split(".")[0] in HEAVY:
                wrong.append(f"{path}:{line}: import flexdpo must not need {name}")
    return wrong + circles(root)


if __name__ == "__main__":
    found = faults(ROOT)
    print("\n".join(found) or "imports point down, in no circle")
    sys.exit(bool(found))
