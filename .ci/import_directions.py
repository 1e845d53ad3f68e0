"""Check that imports inside the package point down its layers only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# a module may import from its own layer and from those before it
# fmt: off
LAYERS = [
    "errors", "layout", "attention", "hf", "dropin", "trl", "objective", "reference", "proof", "config", "data",
    "example",
    "show", "training", "estimate", "bench", "runs", "commands", "cli", "__main__",
]
# fmt: on
# what `import flexdpo` must not need
HEAVY = {"datasets", "trl", "peft", "matplotlib"}
AT_IMPORT = {"errors", "layout", "attention", "hf", "dropin", "objective", "proof", "__init__"}


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
    return wrong


if __name__ == "__main__":
    found = faults(Path(__file__).parents[1] / "flexdpo")
    print("\n".join(found) or "imports point down")
    sys.exit(bool(found))
