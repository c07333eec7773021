"""What a model writes by itself after a prompt, and simple measures of it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log2
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rect_lightning.metrics.forward import check_lengths, measuring
from rect_lightning.models.encoding import encode
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from rect_lightning.data.request import EditRequest
    from rect_lightning.models import Adapter


def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> list[str]:
    """Continue each prompt greedily, up to an end-of-text token or ``max_new_tokens``.

    The model's own generation settings (sampling, penalties, forbidden tokens) do not count, only its end-of-text
    tokens; where it names none, the tokenizer's. In fp32 the texts are those of one prompt at a time; in half precision
    a batch rounds differently, and near ties may fall the other way.

    Args:
        adapter: The model and its tokenizer.
        prompts: The texts to continue.
        max_new_tokens: The longest continuation, in tokens.
        tokens_per_batch: Tokens of a padded batch with its continuations; more needs more memory.
        show_progress: Whether to show a bar over the batches.

    Returns:
        The new text alone, without special tokens, in the order of the prompts.

    Raises:
        ValueError: A prompt without tokens, or too long for the model's context; raised before the model runs.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    rows = [row.ids for row in encode(adapter.tokenizer, prompts)]
    lengths = [len(ids) + max_new_tokens if ids else 0 for ids in rows]
    check_lengths(adapter, lengths, prompts)
    batches = by_length(lengths, tokens_per_batch)
    texts = [""] * len(rows)
    with measuring(adapter.model), _greedy(adapter, max_new_tokens) as config:
        ends = set(config.eos_token_id)
        for batch in track(batches, "Generating", show=show_progress, unit="batch"):
            longest = len(rows[batch[0]])
            # padded on the left: the new tokens follow the prompts' last ones
            inputs = pad([rows[i] for i in batch], adapter.device, anchors=[len(rows[i]) for i in batch])
            model: Any = adapter.model
            output = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                generation_config=config,
            )
            for i, new in zip(batch, output[:, longest:].tolist(), strict=True):
                length = next((n for n, token in enumerate(new) if token in ends), len(new))
                texts[i] = _continuation(adapter, rows[i], new[:length])
    return texts


@contextmanager
def _greedy(adapter: Adapter, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """Plain greedy settings, in the place of the model's own.

    `generate` fills what a config leaves open from the model's own, so the latter is set aside as well.
    """
    from transformers import GenerationConfig

    model: PreTrainedModel = adapter.model
    own: GenerationConfig = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else adapter.tokenizer.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # padding is masked, and cut off after the end: any token will do
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own


def _continuation(adapter: Adapter, prompt: Sequence[int], new: Sequence[int]) -> str:
    # decoded together with the prompt, since a SentencePiece tokenizer drops the space in front of a text
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, text = (adapter.tokenizer.decode(ids, **options) for ids in ([*prompt], [*prompt, *new]))
    return str(text[len(before) :])


def generation_entropy(texts: Sequence[str]) -> float:
    """Fluency of generated texts: low where a broken model repeats itself.

    The mean over texts of ``(2/3 H2 + 4/3 H3) / 2`` with ``Hn = -sum_k f(k) log2 f(k)`` over the frequencies ``f`` of a
    text's n-grams (Meng et al. 2022, arXiv 2202.05262, GE), in bits. The public code takes the words of NLTK and the
    prompt with its continuation of up to 100 tokens; here words and single punctuation marks are found by a regular
    expression, and the texts are what the caller gives. A text too short for an n-gram has ``Hn = 0``.

    Raises:
        ValueError: There is no text.
    """
    if not texts:
        raise ValueError("generation_entropy needs at least one text.")
    return fmean(_entropy(words, 2) / 3 + _entropy(words, 3) * 2 / 3 for words in map(_words, texts))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return -sum(count / total * log2(count / total) for count in counts)


def generated_exact(adapter: Adapter, requests: Sequence[EditRequest]) -> float:
    """``efficacy/generated``: the share of requests whose prompt the model continues with the new target.

    The model writes greedily and freely, at least 20 tokens and 8 more than the longest target, so that no word of a
    target is cut short. For several processes or for single answers use `generate` and `begins_with`.

    Raises:
        ValueError: There is no request, or as `generate`.
    """
    if not requests:
        raise ValueError("generated_exact needs at least one request.")
    prompts, targets = [request.text for request in requests], [request.target_new for request in requests]
    longest = max(len(row.target_ids) for row in encode(adapter.tokenizer, prompts, targets))
    texts = generate(adapter, prompts, max_new_tokens=max(20, longest + 8))
    return fmean(begins_with(text, target) for text, target in zip(texts, targets, strict=True))


def begins_with(text: str, target: str) -> bool:
    """Whether a text's first words are the target's, both normalised as in SQuAD (Rajpurkar et al. 2016).

    Normalised: lower case, without ASCII punctuation, without a, an, the, white space as word boundary. "the French
    language" begins with "French", "Frenchman" does not. A target of which nothing is left begins no text.
    """
    words, wanted = _normalised(text), _normalised(target)
    return bool(wanted) and words[: len(wanted)] == wanted


def _normalised(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]
