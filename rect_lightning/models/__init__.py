"""Loading a model, and one adapter a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.gemma import Gemma, Gemma3Multimodal
from rect_lightning.models.gpt2 import GPT2
from rect_lightning.models.gpt_neox import GPTNeoX
from rect_lightning.models.gptj import GPTJ
from rect_lightning.models.llama import Llama
from rect_lightning.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILIES: tuple[type[Adapter], ...] = (GPT2, GPTJ, GPTNeoX, Llama, Gemma, Gemma3Multimodal)

__all__ = ["FAMILIES", "Adapter", "Source", "adapter_for"]


def adapter_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Adapter:
    """The adapter of the model's family, chosen by ``config.model_type``.

    Raises:
        ValueError: No family serves this model type; the message says how to add one.
    """
    model_type = model.config.model_type
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(model, tokenizer)
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(
        f"No adapter for model type {model_type!r} (known: {known}). To add one, subclass "
        "rect_lightning.models.Adapter in a file of its own, name where the family keeps its blocks, down projections "
        "and final norm, and list the class in rect_lightning/models/__init__.py."
    )
