"""Which of transformers' auto classes makes a model of a config."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)


def sees(config: Any) -> bool:
    """Whether transformers has a model of images and text with such a config."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any, *, images: bool = False) -> Any:
    """The class of causal LMs; that of models of images and text for data with images, and where there is no other."""
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees(config) and (images or not alone) else AutoModelForCausalLM
