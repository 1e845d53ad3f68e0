"""The README.md of a trained model: data, settings, proof, figures and versions, in TRL's layout."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from flexdpo.hf.names import adapter_base, local_path
from flexdpo.training.adapters import is_peft_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexdpo.data.report import DataReport
    from flexdpo.proof.prove import Proof

_PAPERS = """\
Cite DPO as:

```bibtex
@inproceedings{rafailov2023direct,
    title        = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
    author       = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and Chelsea Finn},
    year         = 2023,
    booktitle    = {Advances in Neural Information Processing Systems 36},
    url          = {https://arxiv.org/abs/2305.18290},
}
```

Cite prefix sharing as:

```bibtex
@article{wang2024accelerating,
    title        = {{Accelerating Direct Preference Optimization with Prefix Sharing}},
    author       = {Franklin Wang and Sumanth Hegde},
    year         = 2024,
    url          = {https://arxiv.org/abs/2410.20305},
}
```
"""  # noqa: E501


class Trained(Protocol):
    """A trainer, as far as its card tells of it."""

    model: Any
    args: Any
    data_reports: Mapping[str, DataReport]
    proof: Proof | None

    def changed_settings(self) -> Mapping[str, Any]:
        """The settings that are not their defaults."""
        ...


def model_card(
    trainer: Trained,
    model_name: str,
    datasets: Sequence[str],
    tags: Sequence[str],
    figures: Mapping[str, str],
    **metadata: Any,
) -> ModelCard:
    """The card of what a trainer has trained; ``figures`` are what it came to, ``metadata`` more for the hub."""
    name = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or "")
    base = adapter_base(name) or name
    on_hub = [each for each in datasets if local_path(each) is None]
    about = ModelCardData(
        base_model=base if base and local_path(base) is None else None,
        datasets=on_hub or None,
        library_name="peft" if is_peft_model(trainer.model) else "transformers",
        model_name=model_name,
        tags=["generated_from_trainer", "flexdpo", "dpo", *tags],
        **metadata,
    )
    changed = trainer.changed_settings()
    data = [f"- {line}" for report in trainer.data_reports.values() for line in report.summary().splitlines()]
    packages = [
        f"- {each}: {found}"
        for each in ("flexdpo", "transformers", "torch", "datasets", "tokenizers", "peft")
        if (found := _installed(each))
    ]
    proof = (
        "- not proved before its first step (`prove: false`)" if trainer.proof is None else f"- {trainer.proof.line()}"
    )
    sections = [
        f"# Model Card for {model_name}",
        f"A fine-tuned version of {_linked(base, 'https://huggingface.co/') or 'a model made in memory'}"
        + (
            f" on {', '.join(_linked(each, 'https://huggingface.co/datasets/') for each in datasets)}"
            if datasets
            else ""
        )
        + ", trained on preferences with flexdpo.",
        "## Quick start",
        _QUICK_START.format(name=model_name),
        "## Training procedure",
        f"Losses: {', '.join(trainer.args.loss_type)} ([DPO](https://arxiv.org/abs/2305.18290) and its relatives), "
        "with every distinct token run once.",
        "### Data",
        "\n".join(data) or "- not counted",
        "### Settings that differ from the defaults",
        "\n".join(f"- {key}: {value}" for key, value in changed.items()) or "- none",
        "### Proof",
        proof,
        "### Figures",
        "\n".join(f"- {key}: {value}" for key, value in figures.items()) or "- none",
        "### Framework versions",
        "\n".join(packages),
        "## Citations",
        _PAPERS,
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(sections))


_QUICK_START = """\
```python
from transformers import pipeline

question = "If you had a time machine, but could only go to the past or the future once, which would you choose?"
generator = pipeline("text-generation", model="{name}")
print(generator(question, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```"""


def _linked(name: str, where: str) -> str:
    return f"[{name}]({where}{name})" if name and local_path(name) is None else name and f"`{name}`"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
