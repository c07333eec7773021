"""What each number means, one line a name: the legend of every table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "efficacy/probability": "the new target is likelier than the true one after the rewrite prompt "
        "(log-likelihood per token; ES of Meng et al. 2022)",
        "efficacy/magnitude": "P(new) - P(true) after the rewrite prompt, P the geometric mean over tokens "
        "(EM of Meng et al. 2022)",
        "efficacy/exact": "every token of the new target is the likeliest after the rewrite prompt, teacher-forced "
        "(Meng et al. 2023)",
        "efficacy/token": "share of the new target's tokens that are the likeliest after the rewrite prompt, "
        "teacher-forced (Mitchell et al. 2022)",
        "efficacy/generated": "the greedy continuation of the rewrite prompt begins with the words of the new target "
        "(both normalised as in SQuAD, Rajpurkar et al. 2016)",
        "efficacy/wild": "asked in an instruction (model.wild), the model answers with the new target and nothing else, "
        "written freely up to its own stop (both normalised as in SQuAD; after Yang et al. 2025)",
        "efficacy/wild_begins": "the answer of efficacy/wild begins with the words of the new target",
        "generalisation/probability": "efficacy/probability, after the paraphrases (PS of Meng et al. 2022)",
        "generalisation/magnitude": "efficacy/magnitude, after the paraphrases (PM of Meng et al. 2022)",
        "generalisation/exact": "efficacy/exact, after the paraphrases",
        "generalisation/token": "efficacy/token, after the paraphrases",
        "generalisation/wild": "efficacy/wild, asked the paraphrases",
        "generalisation/wild_begins": "efficacy/wild_begins, asked the paraphrases",
        "locality/probability": "a neighbour's answer is likelier than the new target (NS of Meng et al. 2022)",
        "locality/magnitude": "P(answer) - P(new) after a neighbour's prompt (NM of Meng et al. 2022)",
        "locality/exact": "every token of a neighbour's answer is the likeliest, teacher-forced",
        "locality/token": "share of a neighbour's answer's tokens that are the likeliest, teacher-forced",
        "locality/unchanged": "share of the places of a neighbour's answer where the likeliest token is the one of the "
        "model before the edits, right or wrong (Mitchell et al. 2022)",
        "score/probability": "harmonic mean of efficacy, generalisation and locality /probability "
        "(S of Meng et al. 2022)",
    }
)
"""Name to one-line definition. Each is a mean over the prompts of a request, then over the requests that have any.

Meng et al. 2022 is ROME (arXiv 2202.05262, section 3.3), Meng et al. 2023 MEMIT (arXiv 2210.07229), Mitchell et al.
2022 MEND (arXiv 2110.11309), Yang et al. 2025 WILD (arXiv 2502.11177). The names with ``wild`` are there if it is on.
"""
