"""Options that people know from TRL and that ``flexdpo train`` does not have: why, and what to do instead."""

import dataclasses
import importlib
import importlib.util
from functools import cache

_ONE_LENGTH = "max_length bounds prompt and response together, and what is longer is cut on the right; leave it out"
_ADAPTERS = (
    "the reference is the policy as it was before its first step, the adapter that it began with included; name the "
    "adapter's folder as --model_name_or_path, or give ref_model in Python"
)
_NO_LOGITS = "the full logits never exist, so there is nothing to choose; leave it out"
_NO_PADDING = "nothing is padded with tokens; leave it out"
_ENTROPY = "no text is generated in training; generate from the saved model, and leave it out"
# what has a reason of its own; earlier versions of TRL had some of them
REASONS = {
    "activation_offloading": "on a GPU, what checkpoints keep can lie in the host's memory; give "
    "--activation_checkpointing true --activation_checkpointing_kwargs '{\"offload\": true}'",
    "ignore_bias_buffers": "--ddp_broadcast_buffers false keeps all buffers of the model out of what DDP synchronises; "
    "give that instead",
    "padding_free": "rows never have padding between sequences, so it is always on; leave it out",
    "pad_token": f"{_NO_PADDING}, or set pad_token in the tokenizer's folder",
    "assistant_only_loss": "a response is learned whole, and the report names rows whose responses hold turns of the "
    "user; give each turn of the assistant as a row of its own (flexdpo.step_preferences), or leave it out",
    "completion_only_loss": "prompts are never learned, so it is always on; leave it out",
    "padding_value": _NO_PADDING,
    "label_pad_token_id": _NO_PADDING,
    "max_completion_length": _ONE_LENGTH,
    "max_target_length": _ONE_LENGTH,
    "use_logits_to_keep": _NO_LOGITS,
    "use_num_logits_to_keep": _NO_LOGITS,
    "use_liger_loss": f"log-probabilities are computed in chunks already: {_NO_LOGITS}",
    "reference_free": "name a loss without a reference: --loss_type simpo, orpo, cpo or sft",
    "force_use_ref_model": _ADAPTERS,
    "model_adapter_name": _ADAPTERS,
    "ref_adapter_name": _ADAPTERS,
    "reference_model_name": "the reference is the policy as it was before its first step; give ref_model in Python",
    "ref_model_init_kwargs": "the reference is a copy of the policy, loaded as --model_init_kwargs says; leave it out",
    "generate_during_eval": _ENTROPY,
    "is_encoder_decoder": "the models are causal ones; leave it out",
    "base_model_attribute_name": "the base model is found without its name; leave it out",
    "dataset_text_field": "preferences have no single text; name their columns with --columns prompt=...,chosen=...",
    "gradient_checkpointing_use_reentrant": "write --activation_checkpointing_kwargs '{\"use_reentrant\": false}'",
}


def reason_against(option: str, command: str) -> str | None:
    """Why a TRL option is none of a command, with the way out; ``None`` where TRL has no such option either."""
    name = option.removeprefix("--").removeprefix("no_").replace("-", "_")
    if name in REASONS:
        return REASONS[name]
    if name in _options_of_trl() and command != "flexdpo train":
        return f"{command} has nothing that it could change; leave it out"
    if name in _options_of_trl():
        return (
            "flexdpo has nothing that it could change; leave it out, or train with TRL and share prefixes there: "
            "flexdpo.trl.enable(trainer)"
        )
    return None


@cache
def _options_of_trl() -> frozenset[str]:
    """Every option of ``trl dpo``, asked from the installed TRL; none where there is none."""
    if importlib.util.find_spec("trl") is None:
        return frozenset()
    classes = ("DPOConfig", "ModelConfig", "ScriptArguments")
    trl = importlib.import_module("trl")
    return frozenset(each.name for name in classes for each in dataclasses.fields(getattr(trl, name)))
