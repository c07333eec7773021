"""Measuring edits: how likely targets are, whether edits took and what they cost."""

from rect_lightning.metrics.definitions import DEFINITIONS
from rect_lightning.metrics.editing import EditMetrics, Pair, RequestScores, check_requests, evaluate, request_metrics
from rect_lightning.metrics.generation import begins_with, generate, generated_exact, generation_entropy
from rect_lightning.metrics.perplexity import perplexity
from rect_lightning.metrics.scoring import TargetScore, score_targets

__all__ = [
    "DEFINITIONS",
    "EditMetrics",
    "Pair",
    "RequestScores",
    "TargetScore",
    "begins_with",
    "check_requests",
    "evaluate",
    "generate",
    "generated_exact",
    "generation_entropy",
    "perplexity",
    "request_metrics",
    "score_targets",
]
