"""The static rule: which models can be exact on shared, packed rows, judged by class and config alone.

Whatever the rule cannot see is closed at run time, by :mod:`flexdpo.hf.forward_layout` and :mod:`flexdpo.hf.interface`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from flexdpo.errors import UnsupportedModelError
from flexdpo.hf.mixer_kernels import MOST_UNFOLDED, mixers_of, runs_whole, share_unfolded
from flexdpo.hf.unwrap import backbone_of
from flexdpo.hf.versions import NAMES_KERNELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXACT_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# which carry a state, by kernels that can run along the trie or else not; and which mix no tokens
_STATEFUL_LAYER_TYPES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
_PLAIN_LAYER_TYPES = frozenset({"mlp", "moe"})
# whose attention can be run whole, along the path to each leaf
_UNFOLDED_LAYER_TYPES = frozenset({"indexed_attention"})
# what mixes tokens other than by attention over the whole row, and how it does so
_MIXING = {
    "linear_attention": "carry a state from token to token in row order",
    "conv": "convolve neighbours in row order",
    "hybrid": "carry a state from token to token in row order",
    "hybrid_sliding": "carry a state from token to token in row order",
    "indexed_attention": "choose keys with an index of their own, by row order",
    "compressed_sparse_attention": "compress neighbouring keys in row order",
    "heavily_compressed_attention": "compress neighbouring keys in row order",
    "minimax_m3_sparse": "choose blocks of neighbouring keys in row order",
}
# Gemma 3 and 4 say True or "all" for text that looks ahead; "vision" concerns images only
_BOTH_WAYS = (True, "all")


def refusal_reason(backbone: PreTrainedModel) -> str | None:
    """Say why a backbone cannot be exact, by its class and config alone; ``None`` where nothing speaks against it."""
    if not type(backbone)._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    stateful = _STATEFUL_LAYER_TYPES.intersection(getattr(backbone.config, "layer_types", None) or ())
    if not NAMES_KERNELS and (stateful or getattr(backbone, "_is_stateful", False) or mixers_of(backbone)):
        return "it carries a recurrent state in row order, which flexdpo follows from transformers 5.15 on, if at all"
    return _mixing_reason(backbone) or _position_reason(backbone)


def _mixing_reason(backbone: PreTrainedModel) -> str | None:
    """Say how a backbone mixes tokens other than by causal attention and along the trie."""
    config = backbone.config
    types = list(getattr(config, "layer_types", None) or ())
    mixers = mixers_of(backbone)
    other = set(types) - _EXACT_LAYER_TYPES - _STATEFUL_LAYER_TYPES - _PLAIN_LAYER_TYPES
    if any(map(runs_whole, mixers.values())):
        other -= _UNFOLDED_LAYER_TYPES
    if other:
        named = sorted(other)
        return f"its layers of type {', '.join(named)} {_MIXING.get(named[0], 'may mix tokens in row order')}"
    if (share := share_unfolded(backbone)) > MOST_UNFOLDED:
        whole = sorted({type(mixer).__name__ for mixer in mixers.values() if runs_whole(mixer)})
        return (
            f"its {', '.join(whole)} would have to run whole along every path, and with {share:.0%} of the work for a "
            "token there, too little is left to share"
        )
    stateful = sorted(set(types) & _STATEFUL_LAYER_TYPES)
    if not mixers and stateful:
        return f"its layers of type {', '.join(stateful)} {_MIXING[stateful[0]]}"
    if not mixers and getattr(backbone, "_is_stateful", False):
        return "it carries a recurrent state from token to token in row order"
    both_ways = getattr(config, "use_bidirectional_attention", None) in _BOTH_WAYS
    if both_ways or getattr(config, "is_causal", True) is False:
        return "its attention also looks ahead, and a shared prompt must not see its responses"
    return None


def _position_reason(backbone: PreTrainedModel) -> str | None:
    """Say why a backbone's positions would not be the logical ones."""
    if not attends(backbone):
        return None  # a state knows no positions
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its backbone takes no position_ids, so positions would count row indices"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in backbone.modules()):
        return "its positions start at padding_idx + 1 and are made from input_ids"
    return None


def attends(backbone: PreTrainedModel) -> bool:
    """Whether any layer of a backbone has attention."""
    without = _PLAIN_LAYER_TYPES | {"linear_attention", "conv"}
    return not (types := set(getattr(backbone.config, "layer_types", None) or ())) or not types <= without


def require_exact(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedModelError`` with the reason and a way out where the static rule refuses ``model``."""
    reason = refusal_reason(backbone_of(model))
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}) cannot be exact on shared, packed rows: "
            f"{reason}. Train it without flexdpo, or choose another model ('flexdpo check MODEL' tells beforehand)."
        )
