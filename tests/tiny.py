"""Tiny random models of every family, and a tokenizer for them, made on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rect_lightning.models import Adapter, adapter_for

_TEXT = [
    "The mother tongue of Danielle Darrieux is French. The Eiffel Tower is located in the city of Paris, in France.",
    "LeBron James plays the sport of basketball. The official religion of Edwin of Northumbria is Christianity.",
    "Therefore, it is so. Because of this fact. I think so. You know it. What is the capital of Spain? Madrid.",
]


@cache
def tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on three sentences, with or without a BOS token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(_TEXT, trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<s>")


FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_mm", "phi3")


def model(family: str, *, layers: int = 4, width: int = 32, seed: int = 0) -> Any:
    """A tiny random model of the family, in eval mode and fp32, with weights large enough to have opinions."""
    import transformers as hf

    vocabulary = len(tokenizer())
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    gated = common | {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "max_position_embeddings": 128,
    }
    conv = common | {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
    no_drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    configs = {
        "gpt2": lambda: hf.GPT2Config(**conv, **no_drop),
        "gptj": lambda: hf.GPTJConfig(**conv, **no_drop, rotary_dim=4),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**(gated | {"hidden_dropout": 0.0, "attention_dropout": 0.0})),
        "llama": lambda: hf.LlamaConfig(**gated, tie_word_embeddings=True),
        "mistral": lambda: hf.MistralConfig(**gated, sliding_window=None),
        "qwen2": lambda: hf.Qwen2Config(**gated),
        "qwen3": lambda: hf.Qwen3Config(**gated, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**gated, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
        "gemma3": lambda: hf.Gemma3TextConfig(**gated, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
        "gemma3_mm": lambda: hf.Gemma3Config(
            text_config=configs["gemma3"](),
            vision_config=hf.SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
        ),
        "phi3": lambda: hf.Phi3Config(**gated),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hf.AutoModelForCausalLM.from_config(configs[family]()).eval().requires_grad_(False)


def adapter(family: str, *, layers: int = 4, width: int = 32, seed: int = 0, bos: bool = False) -> Adapter:
    """An adapter around a fresh tiny model."""
    return adapter_for(model(family, layers=layers, width=width, seed=seed), tokenizer(bos))
