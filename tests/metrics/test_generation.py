from __future__ import annotations

import logging
import warnings
from math import log2
from types import SimpleNamespace

import pytest
import torch

from rect_lightning.metrics import (
    Continuation,
    begins_with,
    continuations,
    continued_text,
    generate,
    generated_exact,
    generation,
    generation_entropy,
)
from tests.metrics.naive import greedy
from tests.tiny import adapter as tiny_adapter

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    "I think",
    "LeBron James plays the sport of",
    "What is the capital of Spain? Madrid. What is the capital of France?",
    "You",
]


def texts(adapter, prompts, new_tokens, ends=()):
    sequences = [greedy(adapter, prompt, new_tokens, ends) for prompt in prompts]
    return [adapter.tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("tokens_per_batch", [1, 8192])
def test_texts_are_those_of_one_prompt_at_a_time(family, bos, tokens_per_batch):
    adapter = tiny_adapter(family, bos=bos)
    new = generate(adapter, PROMPTS, max_new_tokens=12, tokens_per_batch=tokens_per_batch)
    assert new == texts(adapter, PROMPTS, 12, ends=(0,))
    assert all(new)


@pytest.mark.parametrize("own", [True, False])
def test_stops_at_every_end_of_text_token(tiny, own):
    """Those of the model's settings where it has some, else the tokenizer's."""
    sequences = [greedy(tiny, prompt, 12) for prompt in PROMPTS]
    ends = [sequences[0][4], sequences[2][0]] if own else [sequences[0][4]]
    expected = texts(tiny, PROMPTS, 12, ends)
    assert any(expected)
    assert expected != texts(tiny, PROMPTS, 12)
    if own:
        tiny.model.generation_config.eos_token_id = ends
        assert generate(tiny, PROMPTS, max_new_tokens=12) == expected
        assert expected[2] == ""
    else:
        tiny.model.generation_config.eos_token_id = None
        tiny.tokenizer = _WithEnd(tiny.tokenizer, ends[0])
        assert generate(tiny, PROMPTS, max_new_tokens=12) == expected


class _WithEnd:
    """The tokenizer with another end-of-text token."""

    def __init__(self, tokenizer, end):
        self.tokenizer, self.eos_token_id = tokenizer, end

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)


def test_the_models_own_settings_do_not_count_and_come_back(tiny):
    expected = generate(tiny, PROMPTS)
    own = tiny.model.generation_config
    own.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=3.0, num_beams=2, min_length=40)
    own.update(suppress_tokens=[greedy(tiny, PROMPTS[0], 1)[0]], no_repeat_ngram_size=1, max_length=10)
    assert generate(tiny, PROMPTS) == expected
    assert tiny.model.generation_config is own
    assert own.temperature == 5.0


def test_nothing_is_said(tiny, capfd):
    tiny.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, pad_token_id=None)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(tiny, PROMPTS, max_new_tokens=3)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []
    assert capfd.readouterr() == ("", "")


def test_the_space_before_a_word_is_kept(tiny_tokenizer):
    """A SentencePiece-like decoder strips the first space of a text; the continuation's has to stay."""
    from rect_lightning.metrics.generation import _continuation

    class Stripping(_WithEnd):
        def decode(self, *args, **kwargs):
            return self.tokenizer.decode(*args, **kwargs).lstrip(" ")

    adapter = SimpleNamespace(tokenizer=Stripping(tiny_tokenizer, 0))
    prompt, new = tiny_tokenizer("The city of")["input_ids"], tiny_tokenizer(" Paris")["input_ids"]
    assert _continuation(adapter, prompt, new) == " Paris"


def test_bad_input_is_refused_before_the_model_runs(tiny):
    tiny.backbone.register_forward_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="context is 128"):
        generate(tiny, ["I think", "so " * 20], max_new_tokens=120)
    with pytest.raises(ValueError, match="No token"):
        generate(tiny, [""])
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny, ["I think"], max_new_tokens=0)


def test_a_row_that_is_finished_leaves_and_the_others_go_on(tiny):
    """Whatever is said of a row, its tokens are those of the plain model up to there."""
    lengths = {tuple(greedy(tiny, prompt, 1)): n for n, prompt in enumerate(PROMPTS, 2)}
    found = continuations(
        tiny, PROMPTS, max_new_tokens=12, finished=lambda new: len(new) == lengths.get(tuple(new[:1]), 12)
    )
    expected = [greedy(tiny, prompt, 12) for prompt in PROMPTS]
    expected = [tokens[: lengths[tuple(tokens[:1])]] for tokens in expected]
    assert len({len(tokens) for tokens in expected}) > 1
    assert [[*c.tokens] for c in found] == expected
    assert not any(c.ended for c in found)


def test_how_likely_a_first_token_is(tiny):
    found = continuations(tiny, PROMPTS[:3], max_new_tokens=2, candidates=[[3, 7], [], [5]])
    for prompt, ids, continuation in zip(PROMPTS, [[3, 7], [], [5]], found, strict=False):
        inputs = torch.tensor([tiny.tokenizer(prompt)["input_ids"]])
        log_probs = tiny.model(inputs).logits[0, -1].log_softmax(-1)
        assert continuation.log_probs == pytest.approx(log_probs[ids].tolist(), abs=1e-5)


def test_texts_of_a_continuation(tiny):
    tokens = greedy(tiny, PROMPTS[0], 6)
    tiny.model.generation_config.eos_token_id = 0
    end = Continuation((5,), (*tokens, 0), True)
    text = tiny.tokenizer.decode(tokens)
    assert continued_text(tiny, end) == text
    assert continued_text(tiny, end, special=True) == text + "<|endoftext|>"
    assert continued_text(tiny, end, first=2, special=True) == tiny.tokenizer.decode(tokens[:2])


def test_no_prompts(tiny):
    assert generate(tiny, []) == []


def test_entropy_by_hand():
    # a b a b a: bigrams ab 2, ba 2; trigrams aba 2, bab 1
    h3 = -(2 / 3) * log2(2 / 3) - (1 / 3) * log2(1 / 3)
    assert generation_entropy(["a b a b a"]) == pytest.approx((2 / 3 * 1 + 4 / 3 * h3) / 2)
    # "so , so": punctuation is a word of its own; bigrams 2 different, trigrams 1
    assert generation_entropy(["so, so"]) == pytest.approx(2 / 3 * 1 / 2)
    assert generation_entropy(["a b a b a", "so, so"]) == pytest.approx(((1 + 2 * h3) / 3 + 1 / 3) / 2)


def test_entropy_of_repetition_and_of_nothing_is_zero():
    assert generation_entropy(["is is is is is is"]) == 0
    assert generation_entropy(["", "one"]) == 0
    with pytest.raises(ValueError, match="at least one text"):
        generation_entropy([])


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (" French, and", "French", True),
        (" the french language", "French", True),
        (" Frenchman", "French", False),
        (" not French", "French", False),
        (" The United  States of", "the united states", True),
        (" United Kingdom", "United States", False),
        (" United", "United States", False),
        (" U.S. Army", "US", True),
        ("", "French", False),
        (" anything", "The", False),
    ],
)
def test_begins_with(text, target, expected):
    assert begins_with(text, target) is expected


def test_generated_exact_is_the_share_of_hits(tiny, monkeypatch):
    said = {"A is": " the French one.", "B is": " Rome", "C is": " Parisian", "D is": " not it"}
    monkeypatch.setattr(generation, "generate", lambda adapter, prompts, **kwargs: [said[p] for p in prompts])
    targets = {"A is": "French", "D is": "it", "B is": "Milan", "C is": "Paris"}
    requests = [SimpleNamespace(text=p, target_new=t) for p, t in targets.items()]
    assert generated_exact(tiny, requests) == 1 / 4
    assert generated_exact(tiny, [*requests, SimpleNamespace(text="B is", target_new="Rome")]) == 2 / 5
    with pytest.raises(ValueError, match="at least one request"):
        generated_exact(tiny, [])


def test_generated_exact_writes_enough_for_a_long_target(tiny, monkeypatch):
    long = " ".join(["so"] * 30)
    (needed,) = {len(tiny.tokenizer(f" {long}")["input_ids"])}
    assert needed > 20
    widths = []
    generate_ = generation.generate

    def spy(adapter, prompts, **kwargs):
        widths.append(kwargs["max_new_tokens"])
        return generate_(adapter, prompts, **kwargs)

    monkeypatch.setattr(generation, "generate", spy)
    generated_exact(tiny, [SimpleNamespace(text="I think", target_new=long)])
    assert widths == [needed + 8]


def test_gradients_are_not_barred(tiny):
    generate(tiny, PROMPTS[:1])
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
