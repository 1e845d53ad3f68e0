"""Tokenizers and model configs by name, without any weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexdpo.data.tokenize import require_special_tokens
from flexdpo.errors import FlexdpoError, first_line
from flexdpo.training.model_loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def find_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, with or without a model in it, or from the hub.

    Raises:
        FlexdpoError: if there is none.
    """
    path = Path(name_or_path).expanduser()
    alone = any((path / name).exists() for name in _TOKENIZER_FILES)
    if not alone and (path.exists() or _looks_local(name_or_path)):
        # says what is missing there
        return load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    from transformers import AutoTokenizer

    where, unreachable = _where(name_or_path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **where
        )
    except (OSError, ValueError, KeyError) as error:
        raise FlexdpoError(
            f"cannot load a tokenizer from {name_or_path!r}: {unreachable or first_line(error)}"
        ) from error
    require_special_tokens(tokenizer)
    return tokenizer


def find_config(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Load a model's config from a folder or the hub; the weights stay where they are.

    Raises:
        FlexdpoError: if there is none.
    """
    from transformers import AutoConfig

    path = Path(name_or_path).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise FlexdpoError(f"{name_or_path} has no config.json, so it is no saved model")
    if not path.exists() and _looks_local(name_or_path):
        raise FlexdpoError(f"{name_or_path} is not a folder with a saved model")
    where, unreachable = _where(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **where, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise FlexdpoError(
            f"cannot load a model's config from {name_or_path!r}: {unreachable or first_line(error)}"
        ) from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _where(name: str) -> tuple[dict[str, Any], str]:
    """Where to look for a name, and why the hub cannot be asked; without it only the local cache can help.

    The library would retry the network for half a minute for each file first.
    """
    if Path(name).expanduser().exists():
        return {}, ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return {}, ""  # an answer, or a name no hub can have: the loader says the same in better words
    except Exception as error:  # each HTTP client that the hub library may use has errors of its own
        why = f"it is no folder here, and the hub cannot be reached ({type(error).__name__}: {first_line(error)})"
        return {"local_files_only": True}, why
    return {}, ""
