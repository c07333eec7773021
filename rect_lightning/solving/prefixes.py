"""Texts put before a prompt, so that a key or a target value does not depend on one context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import encode

_OPENINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Context prefixes: given, or sampled from the model."""

    templates: list[str] | None = None
    """Templates with ``{}`` where the prompt goes, such as ``"{}"`` and ``"I think so. {}"``; sampled if not given."""
    count: int = 5
    """How many to sample of each length, besides the bare prompt."""
    lengths: tuple[int, ...] = (10,)
    """Tokens to sample after the opening of a prefix, a word or two; in public code the opening counts towards it."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if self.count < 0 or min(self.lengths, default=1) < 1:
            raise ValueError(f"prefixes need count >= 0 and lengths >= 1; got {self.count} and {self.lengths}.")
        if self.templates is not None:
            wrong = [t for t in self.templates if t.count("{}") != 1]
            if wrong or not self.templates or self.templates[0] != "{}":
                raise ValueError(
                    "prefixes.templates must start with the bare '{}' and hold '{}' exactly once each; "
                    f"got {wrong or self.templates}."
                )
            sampling = ("count", "lengths", "seed")
            idle = [name for name in sampling if getattr(self, name) != getattr(type(self), name)]
            if idle:
                raise ValueError(
                    f"prefixes.templates are given, so none is sampled and {' and '.join(idle)} would change nothing; "
                    "leave these out, or sample with prefixes.templates null."
                )

    def resolve(self, adapter: Adapter) -> tuple[str, ...]:
        """The templates, the bare ``"{}"`` first."""
        if self.templates is not None:
            return tuple(self.templates)
        generator = torch.Generator().manual_seed(self.seed)
        sampled = [t for n in self.lengths for t in sample_prefixes(adapter, self.count, n, generator)]
        return ("{}", *sampled)


@torch.no_grad()
def sample_prefixes(
    adapter: Adapter, count: int, length: int, generator: torch.Generator, *, top_k: int = 5
) -> list[str]:
    """Let the model go on from five common openings, as ROME and MEMIT do, choosing among its ``top_k`` next tokens."""
    tokenizer = adapter.tokenizer
    texts = []
    for i in range(count):
        opening = _OPENINGS[i % len(_OPENINGS)]
        ids = torch.tensor([encode(tokenizer, [opening])[0].ids], device=adapter.device)
        for _ in range(length):
            logits = adapter.logits(adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1])
            ids = torch.cat([ids, _pick(logits.float().cpu(), top_k, generator).to(ids.device)], dim=1)
        text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
        # braces would be taken for the prompt's place, line breaks end the context
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return texts


def _pick(logits: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    best = logits.topk(min(top_k, len(logits)))
    choice = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
    return best.indices[choice][None]
