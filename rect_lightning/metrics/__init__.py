"""Measuring edits: how likely targets are, whether edits took and what they cost."""

from rect_lightning.metrics.definitions import DEFINITIONS
from rect_lightning.metrics.editing import (
    SCORES,
    EditMetrics,
    Pair,
    RequestScores,
    check_requests,
    evaluate,
    request_metrics,
)
from rect_lightning.metrics.generation import (
    Continuation,
    begins_with,
    continuations,
    continued_text,
    generate,
    generated_exact,
    generation_entropy,
    normalised_words,
    stopping,
    up_to_stop,
)
from rect_lightning.metrics.perplexity import perplexity
from rect_lightning.metrics.scoring import TargetScore, score_targets
from rect_lightning.metrics.wild import FreeAnswer, Wild, free_answers

__all__ = [
    "DEFINITIONS",
    "SCORES",
    "Continuation",
    "EditMetrics",
    "FreeAnswer",
    "Pair",
    "RequestScores",
    "TargetScore",
    "Wild",
    "begins_with",
    "check_requests",
    "continuations",
    "continued_text",
    "evaluate",
    "free_answers",
    "generate",
    "generated_exact",
    "generation_entropy",
    "normalised_words",
    "perplexity",
    "request_metrics",
    "score_targets",
    "stopping",
    "up_to_stop",
]
