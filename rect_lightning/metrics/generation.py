"""What a model writes by itself after a prompt, and simple measures of it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from rect_lightning.metrics.forward import check_lengths, measuring
from rect_lightning.models.encoding import encode
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad

if TYPE_CHECKING:
    from rect_lightning.data.request import EditRequest
    from rect_lightning.models import Adapter


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        prompt: The prompt's token ids.
        tokens: The new token ids, the end-of-text token among them if the model wrote one.
        ended: Whether it did.
        log_probs: Log-likelihoods, in nats, of the tokens that were asked for as the first new one.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool
    log_probs: tuple[float, ...] = ()


def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> list[str]:
    """Continue each prompt greedily, up to an end-of-text token or ``max_new_tokens``.

    The same as `continuations`, as texts without special tokens, in the order of the prompts.

    Raises:
        ValueError: As `continuations`.
    """
    found = continuations(
        adapter,
        prompts,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        show_progress=show_progress,
    )
    return [continued_text(adapter, continuation) for continuation in found]


def continuations(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    finished: Callable[[Sequence[int]], bool] = lambda new: False,
    candidates: Sequence[Sequence[int]] | None = None,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> list[Continuation]:
    """Continue each prompt greedily, up to an end-of-text token, ``max_new_tokens`` or what ``finished`` says.

    The model's own generation settings (sampling, penalties, forbidden tokens) do not count, only its end-of-text
    tokens; where it names none, the tokenizer's. In fp32 the tokens are those of one prompt at a time; in half precision
    a batch rounds differently, and near ties may fall the other way.

    Args:
        adapter: The model and its tokenizer.
        prompts: The texts to continue.
        max_new_tokens: The longest continuation, in tokens.
        finished: Whether a row, given its new tokens so far, needs no more.
        candidates: For each prompt token ids whose log-likelihood right after the prompt is wanted as well.
        tokens_per_batch: Tokens of a padded batch with its continuations; more needs more memory.
        show_progress: Whether to show a bar over the batches.

    Returns:
        One continuation a prompt, in the order given.

    Raises:
        ValueError: A prompt without tokens, or too long for the model's context; raised before the model runs.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    rows = [row.ids for row in encode(adapter.tokenizer, prompts)]
    lengths = [len(ids) + max_new_tokens if ids else 0 for ids in rows]
    check_lengths(adapter, lengths, prompts)
    ends = _ends(adapter)
    candidates = [()] * len(rows) if candidates is None else candidates
    found: list[Continuation] = [Continuation(ids, (), False) for ids in rows]
    with measuring(adapter.model):
        for batch in track(by_length(lengths, tokens_per_batch), "Generating", show=show_progress, unit="batch"):
            new, log_probs = _decode(
                adapter,
                [rows[i] for i in batch],
                [candidates[i] for i in batch],
                lambda tokens: len(tokens) == max_new_tokens or tokens[-1] in ends or finished(tokens),
            )
            for i, tokens, wanted in zip(batch, new, log_probs, strict=True):
                found[i] = Continuation(rows[i], tuple(tokens), tokens[-1] in ends, wanted)
    return found


def _decode(
    adapter: Adapter,
    rows: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    finished: Callable[[Sequence[int]], bool],
) -> tuple[list[list[int]], list[tuple[float, ...]]]:
    """The new tokens of rows that run together, of which those that are finished leave; and the candidates' likelihoods."""
    from transformers import DynamicCache

    # padded on the left: the new tokens follow the prompts' last ones
    batch = pad(rows, adapter.device, anchors=[len(row) for row in rows])
    ids, mask, position = batch.input_ids, batch.attention_mask, batch.position_ids
    cache = DynamicCache(config=adapter.model.config.get_text_config())
    new: list[list[int]] = [[] for _ in rows]
    log_probs: list[tuple[float, ...]] = []
    alive = list(range(len(rows)))
    while True:
        hidden = adapter.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # a contiguous matrix: with a slice of three dimensions torch copies the vocabulary's weight for each row
        logits = adapter.logits(hidden[:, -1].contiguous())
        if not log_probs:
            likely = logits.float().log_softmax(-1) if any(candidates) else logits
            log_probs = [tuple(row[[*ids_]].tolist()) for row, ids_ in zip(likely, candidates, strict=True)]
        for row, token in zip(alive, logits.argmax(-1).tolist(), strict=True):
            new[row].append(token)
        stay = [place for place, row in enumerate(alive) if not finished(new[row])]
        if not stay:
            return new, log_probs
        if len(stay) < len(alive):
            alive = [alive[place] for place in stay]
            kept = torch.tensor(stay, device=mask.device)
            cache.batch_select_indices(kept)
            mask, position = mask[kept], position[kept]
        ids = torch.tensor([[new[row][-1]] for row in alive], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        position = position[:, -1:] + 1


def up_to_stop(text: str, stops: Sequence[str]) -> str:
    """The text without white space around it, up to the first stop string."""
    text = text.lstrip()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=None)].rstrip()


def stopping(adapter: Adapter, stops: Sequence[str], *, least: int = 0) -> Callable[[Sequence[int]], bool]:
    """Whether new tokens, at least so many, hold a stop string after which `up_to_stop` reads nothing."""

    def finished(new: Sequence[int]) -> bool:
        if len(new) < least:
            return False
        text = str(adapter.tokenizer.decode([*new])).lstrip()
        return any(stop in text for stop in stops)

    return finished


def _ends(adapter: Adapter) -> set[int]:
    """The model's end-of-text tokens; where it names none, the tokenizer's."""
    own: Any = adapter.model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else adapter.tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def continued_text(
    adapter: Adapter, continuation: Continuation, *, first: int | None = None, special: bool = False
) -> str:
    """The new text of a continuation.

    Args:
        adapter: The model, for its tokenizer.
        continuation: What the model wrote.
        first: So many new tokens, None for all.
        special: Whether special tokens, such as that at the end of the text, stand in it.
    """
    new = continuation.tokens[:first]
    if not special and continuation.ended and len(new) == len(continuation.tokens):
        new = new[:-1]
    return _continuation(adapter, continuation.prompt, new, special=special)


def _continuation(adapter: Adapter, prompt: Sequence[int], new: Sequence[int], *, special: bool = False) -> str:
    # decoded together with the prompt, since a SentencePiece tokenizer drops the space in front of a text
    options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
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
    words, wanted = normalised_words(text), normalised_words(target)
    return bool(wanted) and words[: len(wanted)] == wanted


def normalised_words(text: str) -> list[str]:
    """The words of a text, normalised as in SQuAD: lower case, without ASCII punctuation and without a, an, the."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]
