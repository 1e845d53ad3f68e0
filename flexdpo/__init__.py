"""flexdpo: preference training of Hugging Face models that runs every distinct token once, exactly.

Importing the package registers ``attn_implementation="flexdpo"`` with transformers.
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING, Any

from flexdpo.dropin.share import share_prefixes, sharing_stats, unshare
from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.prepare import prepare_model
from flexdpo.hf.prepare import register as _register
from flexdpo.hf.randomness import disable_dropout
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import pack
from flexdpo.layout.row import Row, RowLayout
from flexdpo.layout.trie import Trie
from flexdpo.objective.logps import response_logps
from flexdpo.proof.probe import ParityReport, parity_probe
from flexdpo.proof.prove import Proof, prove

if TYPE_CHECKING:
    from flexdpo.config import DPOConfig
    from flexdpo.data.regroup import regroup_by_prompt
    from flexdpo.data.tokenize import load_preference_dataset, tokenize_preferences
    from flexdpo.estimate.estimate import EstimateSettings, estimate_dataset
    from flexdpo.training.batch import PackingCollator
    from flexdpo.training.train_step import make_train_step
    from flexdpo.training.trainer import DPOTrainer

__version__ = "0.1.0"

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "EstimateSettings",
    "FlexdpoError",
    "Group",
    "PackingCollator",
    "ParityReport",
    "Proof",
    "Row",
    "RowLayout",
    "Trie",
    "UnsupportedModelError",
    "disable_dropout",
    "estimate_dataset",
    "load_preference_dataset",
    "make_train_step",
    "pack",
    "parity_probe",
    "prepare_model",
    "prove",
    "regroup_by_prompt",
    "response_logps",
    "share_prefixes",
    "sharing_stats",
    "tokenize_preferences",
    "unshare",
]

# the trainer brings transformers.Trainer and datasets along, so it is loaded when it is asked for
_LAZY = {
    "DPOConfig": "flexdpo.config",
    "DPOTrainer": "flexdpo.training.trainer",
    "EstimateSettings": "flexdpo.estimate.estimate",
    "PackingCollator": "flexdpo.training.batch",
    "estimate_dataset": "flexdpo.estimate.estimate",
    "load_preference_dataset": "flexdpo.data.tokenize",
    "make_train_step": "flexdpo.training.train_step",
    "regroup_by_prompt": "flexdpo.data.regroup",
    "tokenize_preferences": "flexdpo.data.tokenize",
}

_register()


def __getattr__(name: str) -> Any:
    if name == "trl":
        return _importlib.import_module("flexdpo.trl")
    if name not in _LAZY:
        raise AttributeError(f"module 'flexdpo' has no attribute {name!r}")
    return getattr(_importlib.import_module(_LAZY[name]), name)
