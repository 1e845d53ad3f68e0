"""The policy and its reference: loading and adapters."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexdpo.data.images import is_processor, tokenizer_of
from flexdpo.data.tokenize import require_special_tokens
from flexdpo.dropin.share import is_shared
from flexdpo.errors import FlexdpoError, first_line, quoted
from flexdpo.hf.auto import auto_class, sees
from flexdpo.hf.forward_layout import ATTN_IMPLEMENTATION
from flexdpo.hf.names import adapter_base, require_saved, why_unreachable
from flexdpo.hf.unwrap import unwrap_model
from flexdpo.training import distribution

if TYPE_CHECKING:
    from torch import nn

    from flexdpo.config import DPOConfig

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_POSITION_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "positions_embed"})


def load_parts(model: Any, processing_class: Any, args: DPOConfig, *, images: bool = False) -> tuple[Any, Any]:
    """The policy and its tokenizer or processor: loaded where they are names, and checked against each other.

    ``images`` says whether the data hold some: then a model that sees is loaded whole, and its processor with it.
    """
    if isinstance(model, str):
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        revision = {name: init_kwargs[name] for name in ("revision",) if name in init_kwargs}
        trusted = {"trust_remote_code": args.trust_remote_code or init_kwargs.get("trust_remote_code", False)}
        images = images and sees(load_config(model, **trusted, **revision))
        load = load_processor if images else load_tokenizer
        processing_class = processing_class or load(model, **trusted, **revision)
        model = load_model(model, images=images, **{**init_kwargs, **trusted})
    elif args.model_init_kwargs:
        raise FlexdpoError(
            f"model_init_kwargs={args.model_init_kwargs} has no effect on a model that is loaded already; give the "
            "model's name, or load it with them"
        )
    base = unwrap_model(model)
    if processing_class is None:
        name = base.config._name_or_path
        if not name:
            raise FlexdpoError(
                "the model was made in memory, so give its tokenizer, or its processor, as processing_class="
            )
        load = load_processor if images and sees(base.config) else load_tokenizer
        processing_class = load(name, trust_remote_code=args.trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase) and not is_processor(processing_class):
        raise FlexdpoError(
            f"processing_class must be a tokenizer, or a processor with an image processor, got "
            f"{type(processing_class).__name__}"
        )
    require_special_tokens(tokenizer_of(processing_class))
    require_vocabulary(base, tokenizer_of(processing_class))
    return model, processing_class


def load_model(
    name_or_path: str, *, trust_remote_code: bool = False, images: bool = False, **init_kwargs: Any
) -> PreTrainedModel:
    """Load a causal LM from a local folder or the hub; ``prepare_model`` decides later whether it can be exact.

    With ``images``, or where a model has no other class, with the parts that see.

    In float32 unless ``dtype`` says otherwise, as in TRL: at a learning rate of 1e-6, most updates of a bfloat16 weight
    round to nothing. A folder with an adapter is loaded on the model that it names, ready to be trained on.
    """
    if (base := adapter_base(name_or_path)) is not None:
        init_kwargs.pop("revision", None)  # the adapter's
        whole = load_model(base, trust_remote_code=trust_remote_code, images=images, **init_kwargs)
        return _with_adapter(whole, name_or_path)
    dtype = init_kwargs.setdefault("dtype", torch.float32)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise FlexdpoError(f"dtype {dtype!r} is none of torch's; use float32, bfloat16, float16 or auto")
    requested = init_kwargs.pop("attn_implementation", ATTN_IMPLEMENTATION)
    if requested != ATTN_IMPLEMENTATION:
        raise FlexdpoError(
            f"model_init_kwargs asks for attn_implementation={requested!r}; packed rows need "
            f"{ATTN_IMPLEMENTATION!r}, so leave it out"
        )
    where = {name: init_kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in init_kwargs}
    loader = auto_class(load_config(name_or_path, trust_remote_code=trust_remote_code, **where), images=images)
    try:
        model: PreTrainedModel
        model, found = loader.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, output_loading_info=True, **init_kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError, RuntimeError) as error:
        raise FlexdpoError(
            f"cannot load a causal LM from {name_or_path!r} ({type(error).__name__}: {first_line(error)}); save it "
            "again, or name another"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise FlexdpoError(
            f"{name_or_path} has no weights for {quoted(missing[:5])}{' and others' if len(missing) > 5 else ''} "
            f"({len(missing)} of {type(model).__name__}'s), which would begin at random; save the whole model there"
        )
    return model


def _with_adapter(model: PreTrainedModel, name: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise FlexdpoError(
            f"{name} holds an adapter, which needs the peft package; pip install 'flexdpo[peft]'"
        ) from error
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=True)
    except Exception as error:  # each kind has conditions of its own, and errors for them
        raise FlexdpoError(
            f"cannot load the adapter in {name} on {type(model).__name__} ({type(error).__name__}: "
            f"{first_line(error)}); save it again, or name another"
        ) from error


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, with a model or alone, or the hub; it needs an EOS and a pad token."""
    base = adapter_base(name_or_path)
    if base is not None and not any((Path(name_or_path) / name).is_file() for name in _TOKENIZER_FILES):
        name_or_path = base
    require_saved(name_or_path, "config.json", *_TOKENIZER_FILES, revision=kwargs.get("revision"))
    tokenizer: PreTrainedTokenizerBase = _from_name(
        AutoTokenizer, "a tokenizer", name_or_path, trust_remote_code=trust_remote_code, **kwargs
    )
    require_special_tokens(tokenizer)
    return tokenizer


def load_processor(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Load the processor of a model that sees, from a folder, with a model or alone, or the hub."""
    base = adapter_base(name_or_path)
    if base is not None and not any((Path(name_or_path) / name).is_file() for name in _PROCESSOR_FILES):
        name_or_path = base
    require_saved(name_or_path, "config.json", *_PROCESSOR_FILES, revision=kwargs.get("revision"))
    try:
        processor = _from_name(
            AutoProcessor, "a processor", name_or_path, trust_remote_code=trust_remote_code, **kwargs
        )
    except FlexdpoError as error:
        missing = [package for package in ("PIL", "torchvision") if find_spec(package) is None]
        hint = f"; here is no {quoted(missing)}, which processors of pictures or video may need" if missing else ""
        raise FlexdpoError(f"{error}{hint}") from error
    if not is_processor(processor):
        raise FlexdpoError(
            f"the data hold images, and {name_or_path} has no processor that reads them; save its AutoProcessor there, "
            "or give it as processing_class"
        )
    require_special_tokens(tokenizer_of(processor))
    return processor


def load_config(name_or_path: str, **kwargs: Any) -> Any:
    """Load a model's config from a folder or the hub, an adapter's model's; the weights stay where they are."""
    if (base := adapter_base(name_or_path)) is not None:
        kwargs.pop("revision", None)  # the adapter's
        name_or_path = base
    require_saved(name_or_path, "config.json", revision=kwargs.get("revision"))
    return _from_name(AutoConfig, "a model's config", name_or_path, **kwargs)


def _from_name(loader: Any, what: str, name_or_path: str, **kwargs: Any) -> Any:
    unreachable = why_unreachable(name_or_path)
    try:
        # where nothing can be reached, only the local cache can help
        return loader.from_pretrained(name_or_path, local_files_only=bool(unreachable), **kwargs)
    except Exception as error:  # files of others hold anything, and each reader has errors of its own
        why = (
            f"it is no folder here, and {unreachable}"
            if unreachable
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise FlexdpoError(
            f"cannot load {what} from {name_or_path!r}: {why}; give a folder that save_pretrained wrote, or another "
            "name"
        ) from error


def require_own(model: nn.Module) -> None:
    """Refuse a model that shares prefixes for other people's loops: it would be packed twice."""
    if is_shared(model):
        raise FlexdpoError(
            f"this {type(unwrap_model(model)).__name__} shares prefixes already (flexdpo.share_prefixes), and "
            "flexdpo's own training shares them itself; call flexdpo.unshare(model), or leave share_prefixes out"
        )


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids a model can embed and predict; a ``FlexdpoError`` if it is none to be trained here."""
    require_own(model)
    is_known = type(model).__module__.startswith("transformers.")  # others may have a head and not name it
    if is_known and model.get_output_embeddings() is None and not model.can_generate():
        raise FlexdpoError(
            f"{type(model).__name__} predicts no tokens, it has no language-model head; load it as a causal LM, such "
            "as with AutoModelForCausalLM.from_pretrained"
        )
    rows = [sys.maxsize]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        # an adapter's layer has other sizes
        part = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        rows.append(getattr(part, "num_embeddings", getattr(part, "out_features", sys.maxsize)))
    return min(rows)


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str = "model") -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings."""
    rows = vocabulary(model)
    if len(tokenizer) > rows:
        raise FlexdpoError(
            f"the tokenizer has {len(tokenizer)} tokens but the {what} embeds {rows}; use the tokenizer that it was "
            f"made with, or call resize_token_embeddings({len(tokenizer)}) on it"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Most positions a learned position table of the model has, or ``None`` where it has no such table."""
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]
    return min(tables, default=None)


def require_positions(limit: int | None, longest: int) -> None:
    """Refuse sequences that reach beyond a learned position table, which could only be an index error later."""
    if limit is not None and longest > limit:
        raise FlexdpoError(
            f"the longest example has {longest} tokens but the model has {limit} positions; set max_length to at most "
            f"{limit}"
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A reference model: the policy as it is now, without gradients and in evaluation mode."""
    with distribution.gathered(list(model.parameters())):
        reference = copy.deepcopy(model)
    return reference.requires_grad_(False).eval()


def model_name(model: str | nn.Module) -> str:
    """A short name for messages and folders."""
    config = getattr(model, "config", None)
    named = model if isinstance(model, str) else getattr(config, "_name_or_path", "")
    return Path(named or getattr(config, "model_type", type(model).__name__)).name
