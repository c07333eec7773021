from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rect_lightning.metrics import TargetScore, forward, score_targets
from tests.metrics.naive import target_log_probs
from tests.tiny import adapter as tiny_adapter

PAIRS = [
    ("The mother tongue of Danielle Darrieux is", "French"),
    ("The mother tongue of Danielle Darrieux is", "English"),
    ("The mother tongue of Danielle Darrieux is", "French or English, it is unknown"),
    ("I think", "so"),
    ("LeBron James plays the sport of", "basketball"),
    ("LeBron James plays the sport of", "a zither, François"),
    ("What is the capital of Spain?", "Madrid"),
    ("I think", "so"),
    ("The", "mother tongue of Danielle Darrieux"),
]
PROMPTS, TARGETS = zip(*PAIRS, strict=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 4096])
def test_scores_are_those_of_the_plain_model(family, bos, tokens_per_batch):
    adapter = tiny_adapter(family, bos=bos)
    scores = score_targets(adapter, PROMPTS, TARGETS, tokens_per_batch=tokens_per_batch)
    for (prompt, target), score in zip(PAIRS, scores, strict=True):
        log_probs, ids, likeliest = zip(*target_log_probs(adapter, prompt, target), strict=True)
        assert score.log_prob == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-5)
        assert score.target == ids
        assert score.predicted == likeliest
    assert len({len(score.target) for score in scores}) > 2


def test_slices_of_the_vocabulary_projection_change_nothing(tiny, monkeypatch):
    whole = score_targets(tiny, PROMPTS, TARGETS)
    monkeypatch.setattr(forward, "LOGITS_PER_SLICE", 3 * tiny.model.config.vocab_size)
    sizes = []
    tiny.model.get_output_embeddings().register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    sliced = score_targets(tiny, PROMPTS, TARGETS)
    assert max(sizes) <= 3
    assert len(sizes) > 1
    assert [s.predicted for s in sliced] == [s.predicted for s in whole]
    assert [s.log_prob for s in sliced] == pytest.approx([s.log_prob for s in whole], abs=1e-6)


def test_only_what_is_needed_is_run(tiny):
    rows, states = [], []
    tiny.backbone.register_forward_hook(
        lambda m, args, kwargs, out: rows.extend(kwargs["attention_mask"].sum(1).tolist()), with_kwargs=True
    )
    tiny.model.get_output_embeddings().register_forward_hook(lambda m, args, out: states.append(len(args[0])))
    one = len(tiny.tokenizer("I think")["input_ids"])
    so, it = (len(tiny.tokenizer(f" {t}")["input_ids"]) for t in ("so", "it"))
    assert so == it == 1
    score_targets(tiny, ["I think"] * 3, ["so", "it", "so"])
    assert rows == [one]
    assert states == [1]
    rows.clear()
    score_targets(tiny, ["The", "The mother tongue"], ["mother", "of Danielle"])
    assert rows == [len(tiny.tokenizer("The mother tongue of Danielle")["input_ids"]) - 1]


def test_log_softmax_is_fp32_in_a_bf16_model():
    adapter = tiny_adapter("llama")
    adapter.model.bfloat16()
    (score,) = score_targets(adapter, ["I think"], ["so"])
    ids = torch.tensor([adapter.tokenizer("I think so")["input_ids"]])
    with torch.no_grad():
        logits = adapter.model(ids).logits[0, -2]
    assert logits.dtype == torch.bfloat16
    expected = logits.double().log_softmax(-1)[ids[0, -1]].item()
    assert score.log_prob == pytest.approx(expected, abs=1e-5)
    assert abs(logits.log_softmax(-1)[ids[0, -1]].item() - expected) > 1e-4, "bf16 would not have been noticed"


def test_dropout_is_off_and_modes_come_back():
    adapter = tiny_adapter("gpt2")
    expected = score_targets(adapter, PROMPTS, TARGETS)
    adapter.model.transformer.drop.p = 0.5
    adapter.model.train()
    adapter.model.transformer.h[1].eval()
    assert score_targets(adapter, PROMPTS, TARGETS) == expected
    assert adapter.model.training
    assert adapter.model.transformer.drop.training
    assert not adapter.model.transformer.h[1].training


def test_properties_of_a_score():
    score = TargetScore(-1.0, target=(1, 2, 3, 4), predicted=(1, 2, 0, 4))
    assert not score.exact
    assert score.token_accuracy == 0.75
    assert TargetScore(-1.0, target=(1, 2), predicted=(1, 2)).exact


def test_nothing_to_score(tiny):
    assert score_targets(tiny, [], []) == []


def test_bad_input_is_refused_before_the_model_runs(tiny):
    tiny.backbone.register_forward_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="2 prompts and 1 targets"):
        score_targets(tiny, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="context is 128"):
        score_targets(tiny, ["I think"] * 2, ["so", "x" * 200])
    with pytest.raises(ValueError, match="No token stands before"):
        score_targets(tiny, [""], ["so"])
    with pytest.raises(ValueError, match="at least one token"):
        score_targets(tiny, ["I think"], ["so"], tokens_per_batch=0)


def test_a_bos_token_is_enough_before_a_target():
    adapter = tiny_adapter("llama", bos=True)
    (score,) = score_targets(adapter, [""], ["so"])
    assert score.log_prob < 0


def test_the_longest_input_that_fits(tiny):
    room = tiny.context_length
    prompt = " so" * (room - 1)
    (score,) = score_targets(tiny, [prompt], ["so so"])  # its last token is never an input
    assert len(tiny.tokenizer(f"{prompt} so so")["input_ids"]) == room + 1
    assert score.log_prob < 0


def test_import_is_cheap():
    """No more of other packages than torchmetrics brings along (which includes much of transformers)."""
    code = (
        "import sys, torchmetrics; before = set(sys.modules); import rect_lightning.metrics;"
        "print({name.split('.')[0] for name in set(sys.modules) - before} & {'transformers', 'datasets', 'lightning'})"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"
