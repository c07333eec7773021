from __future__ import annotations

import logging
from math import exp, inf

import pytest
import torch

from rect_lightning.metrics import forward, perplexity
from tests.tiny import adapter as tiny_adapter

TEXT = "The Eiffel Tower is located in the city of Paris, in France. LeBron James plays the sport of basketball. " * 3


def plain(adapter, chunks):
    """From the model's own loss, one chunk at a time."""
    total = scored = 0
    for chunk in chunks:
        ids = torch.tensor([chunk])
        with torch.no_grad():
            total += adapter.model(ids, labels=ids).loss.double().item() * (len(chunk) - 1)
        scored += len(chunk) - 1
    return exp(total / scored)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("context", "tokens_per_batch"), [(16, 40), (16, 4096), (128, 4096), (2, 7)])
def test_agrees_with_the_models_own_loss(family, context, tokens_per_batch):
    adapter = tiny_adapter(family)
    ids = adapter.tokenizer(TEXT)["input_ids"]
    chunks = [ids[i : i + context] for i in range(0, len(ids), context)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    value = perplexity(adapter, TEXT, context=context, tokens_per_batch=tokens_per_batch)
    assert value == pytest.approx(plain(adapter, chunks), rel=1e-5)


@pytest.mark.parametrize("context", [16, 2])
def test_each_chunk_starts_with_the_bos_token(context):
    adapter = tiny_adapter("llama", bos=True)
    bos, *ids = adapter.tokenizer(TEXT)["input_ids"]
    assert bos == 1
    chunks = [[bos, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]
    assert perplexity(adapter, TEXT, context=context) == pytest.approx(plain(adapter, chunks), rel=1e-5)
    assert sum(len(chunk) - 1 for chunk in chunks) == len(ids)


def test_limit_counts_tokens_of_the_text():
    for bos in (False, True):
        adapter = tiny_adapter("gpt2", bos=bos)
        ids = adapter.tokenizer(TEXT)["input_ids"][: 21 + bos]
        assert perplexity(adapter, TEXT, context=64, limit=21) == pytest.approx(plain(adapter, [ids]), rel=1e-5)


def test_a_last_chunk_of_one_token_is_left_out(tiny):
    ids = tiny.tokenizer(TEXT)["input_ids"]
    value = perplexity(tiny, TEXT, context=8, limit=17)
    assert value == pytest.approx(plain(tiny, [ids[:8], ids[8:16]]), rel=1e-5)


def test_logits_come_in_slices(tiny, monkeypatch):
    whole = perplexity(tiny, TEXT, context=32)
    sizes = []
    tiny.model.get_output_embeddings().register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    monkeypatch.setattr(forward, "LOGITS_PER_SLICE", 10 * tiny.model.config.vocab_size)
    assert perplexity(tiny, TEXT, context=32) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == 10


def test_a_text_longer_than_the_tokenizers_limit_is_no_matter_for_a_warning(tiny):
    tiny.tokenizer.model_max_length, before = 16, tiny.tokenizer.model_max_length
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        perplexity(tiny, TEXT, context=16)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        tiny.tokenizer.model_max_length = before
    assert records == []


def test_a_broken_model_has_infinite_perplexity(tiny):
    head = tiny.model.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: out * 1e6)
    assert perplexity(tiny, TEXT, context=16) == inf


def test_bad_input_is_refused_before_the_model_runs(tiny):
    tiny.backbone.register_forward_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="context must be from 2 to 128"):
        perplexity(tiny, TEXT, context=512)
    with pytest.raises(ValueError, match="context must be from 2"):
        perplexity(tiny, TEXT, context=1)
    with pytest.raises(ValueError, match="limit"):
        perplexity(tiny, TEXT, context=16, limit=0)
    for nothing in ("", "a"):
        with pytest.raises(ValueError, match="Nothing to score"):
            perplexity(tiny, nothing, context=16)
