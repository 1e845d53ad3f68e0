"""``flexdpo env``: versions and devices, for bug reports."""

import importlib.metadata
import os
import platform

from flexdpo.commands.options import OptionParser

_PACKAGES = (
    "flexdpo", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "trl",
    "bitsandbytes", "deepspeed", "flash-attn",
)  # fmt: skip


def parser() -> OptionParser:
    """The options: none."""
    return OptionParser(prog="flexdpo env", description="Print versions and devices, to be pasted into a bug report.")


def run(argv: list[str]) -> int:
    """Run ``flexdpo env`` with the words after it."""
    parser().read(argv)
    import torch

    rows = {"platform": platform.platform(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            rows[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows[name] = "not installed"
    rows["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    count = torch.cuda.device_count()
    rows["CUDA"] = f"{torch.version.cuda}, {count} devices" if torch.cuda.is_available() else "no device"
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        rows[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 1e9:.0f} GB, sm_{about.major}{about.minor}"
    rows |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("FLEXDPO_")}
    print("\n".join(f"- {name}: {value}" for name, value in rows.items()))
    return 0
