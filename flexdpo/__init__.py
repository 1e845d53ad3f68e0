"""flexdpo: preference training of Hugging Face models that runs every distinct token once, exactly.

Importing the package registers ``attn_implementation="flexdpo"`` with transformers. Names are loaded when they are
asked for, so that only those that need torch, transformers or datasets bring them along.
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING, Any

from flexdpo.errors import FlexdpoError, UnsupportedModelError
from flexdpo.hf.on_import import register_when_imported as _register_when_imported

if TYPE_CHECKING:
    from flexdpo.attention.generator import attend, block_mask, mask_mod
    from flexdpo.attention.remembered import keep_attention
    from flexdpo.attention.score_mods import alibi_score_mod, logical_score_mod, softcap_score_mod
    from flexdpo.config import DPOConfig
    from flexdpo.data.load import load_preference_dataset
    from flexdpo.data.mixture import load_mixture
    from flexdpo.data.regroup import regroup_by_prompt
    from flexdpo.data.tokenize import tokenize_preferences
    from flexdpo.data.turns import step_preferences
    from flexdpo.dropin.share import share_prefixes, sharing_stats, unshare
    from flexdpo.estimate.estimate import estimate_dataset
    from flexdpo.estimate.settings import EstimateSettings
    from flexdpo.hf.compilation import compile_decoder_layers
    from flexdpo.hf.prepare import prepare_model
    from flexdpo.hf.randomness import disable_dropout
    from flexdpo.layout.groups import Group
    from flexdpo.layout.packing import pack
    from flexdpo.layout.row import Row, RowLayout
    from flexdpo.layout.trie import Trie
    from flexdpo.objective.logps import response_logps
    from flexdpo.proof.probe import ParityReport, parity_probe
    from flexdpo.proof.prove import Proof, prove
    from flexdpo.show.draw import draw
    from flexdpo.training.batch import PackingCollator
    from flexdpo.training.train_step import make_train_step
    from flexdpo.training.trainer import DPOTrainer

__version__ = "0.1.0"

__all__ = [
    "DPOConfig", "DPOTrainer", "EstimateSettings", "FlexdpoError", "Group", "PackingCollator", "ParityReport", "Proof",
    "Row", "RowLayout", "Trie", "UnsupportedModelError", "alibi_score_mod", "attend", "block_mask",
    "compile_decoder_layers", "disable_dropout", "draw", "estimate_dataset", "keep_attention", "load_mixture",
    "load_preference_dataset", "logical_score_mod", "make_train_step", "mask_mod", "pack", "parity_probe",
    "prepare_model", "prove", "regroup_by_prompt", "response_logps", "share_prefixes", "sharing_stats",
    "softcap_score_mod", "step_preferences", "tokenize_preferences", "unshare",
]  # fmt: skip

_LAZY = {
    "attention.generator": "attend block_mask mask_mod", "attention.remembered": "keep_attention",
    "attention.score_mods": "alibi_score_mod logical_score_mod softcap_score_mod", "config": "DPOConfig",
    "data.load": "load_preference_dataset", "data.mixture": "load_mixture", "data.regroup": "regroup_by_prompt",
    "data.tokenize": "tokenize_preferences", "data.turns": "step_preferences",
    "dropin.share": "share_prefixes sharing_stats unshare", "estimate.estimate": "estimate_dataset",
    "estimate.settings": "EstimateSettings", "hf.compilation": "compile_decoder_layers",
    "hf.prepare": "prepare_model", "hf.randomness": "disable_dropout", "layout.groups": "Group",
    "layout.packing": "pack", "layout.row": "Row RowLayout", "layout.trie": "Trie",
    "objective.logps": "response_logps", "proof.probe": "ParityReport parity_probe", "proof.prove": "Proof prove",
    "show.draw": "draw", "training.batch": "PackingCollator", "training.train_step": "make_train_step",
    "training.trainer": "DPOTrainer",
}  # fmt: skip
_MODULE_OF = {name: f"flexdpo.{module}" for module, names in _LAZY.items() for name in names.split()}

_register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "trl":
        return _importlib.import_module("flexdpo.trl")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flexdpo' has no attribute {name!r}")
    value = globals()[name] = getattr(_importlib.import_module(_MODULE_OF[name]), name)
    return value
