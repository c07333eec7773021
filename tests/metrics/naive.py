"""The plain Hugging Face model, one prompt at a time, without padding: what every measurement has to agree with."""

from __future__ import annotations

import torch


def target_log_probs(adapter, prompt, target):
    """Log-probability, id and likeliest id of each token of the target."""
    start = len(adapter.tokenizer(prompt)["input_ids"])
    ids = adapter.tokenizer(f"{prompt} {target}")["input_ids"]
    assert ids[:start] == adapter.tokenizer(prompt)["input_ids"], "the test needs a prompt that its target leaves alone"
    with torch.no_grad():
        log_probs = adapter.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [(log_probs[i - 1, ids[i]].item(), ids[i], log_probs[i - 1].argmax().item()) for i in range(start, len(ids))]


def greedy(adapter, prompt, new_tokens, ends=()):
    """Ids of the greedy continuation, the whole text run anew for each token."""
    ids = adapter.tokenizer(prompt)["input_ids"]
    new = []
    while len(new) < new_tokens:
        with torch.no_grad():
            token = adapter.model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in ends:
            break
        new.append(token)
    return new
