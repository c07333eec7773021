"""Running tasks: what the model is asked, and that its answers are those of the plain model one prompt at a time."""

from __future__ import annotations

import json

import pytest
import torch

from rect_lightning.metrics import perplexity
from rect_lightning.tasks import RTE, Generation, MultipleChoice, Perplexity, PromptTask, measure
from rect_lightning.tasks.task import How
from tests.editors.test_base import PROSE
from tests.metrics.naive import greedy, target_log_probs
from tests.tiny import adapter as tiny_adapter

PAIRS = [("It rains.", "It is wet."), ("So it is.", "No."), ("The sport of LeBron James.", "I think so. You know it.")]
RECORDS = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(PAIRS)]


class Said(PromptTask):
    """Whatever is said: two prompts, of which the second is the published one too."""

    name = "said"
    columns = {"text": str}  # noqa: RUF012
    new_tokens = 9
    paper_tokens = 4
    stop = ("\n",)
    main = "length"

    def prompts(self, record):
        return [f"I think {record['text']}", record["text"]]

    def paper_prompts(self, record):
        return [record["text"]]

    def gold(self, record):
        return None

    def paper(self, record, texts):
        self.seen = [*getattr(self, "seen", []), texts]
        return 1.0

    def parse(self, record, texts):
        return texts

    def standard(self, record, answer):
        return {"length": float(len(answer[0]))}

    def solution(self, record):
        return ["so", "it"]


def written(folder, records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def said(tmp_path):
    texts = ["The mother tongue of Danielle Darrieux is", "You", "LeBron James plays the sport of"]
    return Said(path=written(tmp_path, [{"text": text} for text in texts]))


def plain(adapter, prompt, tokens):
    ids = greedy(adapter, prompt, tokens, ends=(0,))
    return adapter.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokens_per_batch", [1, 8192])
def test_texts_are_those_of_the_plain_model(tiny, said, tokens_per_batch):
    result = measure(tiny, said, tokens_per_batch=tokens_per_batch)
    assert result.n == len(result.outputs) == 3
    for output in result.outputs:
        assert [*output.texts] == [plain(tiny, prompt, 9) for prompt in output.prompts]
    # the published rule sees fewer tokens of the same text
    assert said.seen == [[plain(tiny, output.prompts[1], 4)] for output in result.outputs]
    assert all(len(text[0]) < len(o.texts[1]) for text, o in zip(said.seen, result.outputs, strict=True))


def test_a_prompt_that_is_asked_twice_is_run_once(tiny, said):
    rows = 0

    def count(module, args, kwargs):
        nonlocal rows
        ids = kwargs["input_ids"]
        rows += len(ids) if ids.shape[1] > 1 else 0

    tiny.backbone.register_forward_pre_hook(count, with_kwargs=True)
    measure(tiny, said)
    assert rows == 6


def test_a_stop_string_ends_an_answer_but_not_the_published_text(tiny, said):
    text = "LeBron James plays the sport of"
    tokens = greedy(tiny, text, 9)
    said.stop = (tiny.tokenizer.decode(tokens[1:2]),)
    result = measure(tiny, said)
    answer = result.outputs[2].answer[1]
    assert answer == plain(tiny, text, 9).lstrip().split(said.stop[0])[0].rstrip()
    assert said.stop[0] not in answer
    assert said.seen[2] == [plain(tiny, text, 4)]
    assert result.outputs[2].texts[1] == plain(tiny, text, 4), "and then nothing more is written"


def test_the_published_text_has_the_end_of_text_token(tiny, said):
    text = "LeBron James plays the sport of"
    (end,) = greedy(tiny, text, 1)
    tiny.model.generation_config.eos_token_id = end
    result = measure(tiny, said)
    assert said.seen[2] == [tiny.tokenizer.decode([end])] != [""]
    assert result.outputs[2].texts[1] == ""


@pytest.mark.parametrize("scoring", ["paper", "standard", "both"])
def test_only_what_is_wanted_is_scored(tiny, said, scoring):
    result = measure(tiny, said, scoring=scoring)
    names = {"paper": ["said/paper"], "standard": ["said/length"], "both": ["said/paper", "said/length"]}
    assert [*result.scores] == names[scoring]
    assert result.main == ("said/paper" if scoring == "paper" else "said/length")
    assert result.ability == result.scores[result.main].value


def test_options_by_the_plain_model(tiny, tmp_path):
    result = measure(tiny, RTE(path=written(tmp_path, RECORDS)))
    hits = []
    for record, output in zip(RECORDS, result.outputs, strict=True):
        (prompt,) = output.prompts
        logs = [sum(log for log, *_ in target_log_probs(tiny, prompt, option)) for option in ("True", "False")]
        hits.append(logs.index(max(logs)) == record["label"])
        assert output.texts == (plain(tiny, prompt, 4),)
    assert result.scores["rte/option"].value == pytest.approx(sum(hits) / 3)
    assert result.unparseable == 1, "a random model says neither"
    assert result.scores["rte/generated"].value == 0


def test_options_of_one_token_are_read_off_the_generation(tiny, tmp_path, monkeypatch):
    path = written(tmp_path, [{"q": "I think", "answer": 0}, {"q": "The sport", "answer": 1}])
    task = MultipleChoice(name="x", path=path, prompt="{q}", options=["it", "is"])
    task.by_likelihood = lambda record, logs: seen.append(logs) or {}
    monkeypatch.setattr("rect_lightning.tasks.task.score_targets", lambda *args, **kwargs: pytest.fail("scored apart"))
    seen = []
    measure(tiny, task)
    expected = [[target_log_probs(tiny, q, option)[0][0] for option in ("it", "is")] for q in ("I think", "The sport")]
    assert seen == [pytest.approx(logs, rel=1e-4) for logs in expected]


def test_one_prompt_with_different_options(tiny, tmp_path):
    records = [{"q": "I think", "o": ["it", "is"], "answer": 0}, {"q": "I think", "o": ["so", "the"], "answer": 1}]
    task = MultipleChoice(name="x", path=written(tmp_path, records), prompt="{q}", options="o")
    task.by_likelihood = lambda record, logs: seen.append(logs) or {}
    seen = []
    measure(tiny, task)
    expected = [[target_log_probs(tiny, "I think", option)[0][0] for option in record["o"]] for record in records]
    assert seen == [pytest.approx(logs, rel=1e-4) for logs in expected]


def test_a_longer_option_has_no_advantage_by_its_mean(tiny, tmp_path):
    """The log-likelihood is the sum over tokens."""
    options = ["so", "so it is the sport of"]
    task = MultipleChoice(
        name="x", path=written(tmp_path, [{"q": "I think", "answer": 0}]), prompt="{q}", options=options
    )
    task.by_likelihood = lambda record, logs: logs_seen.append(logs) or {}
    logs_seen = []
    measure(tiny, task)
    expected = [sum(log for log, *_ in target_log_probs(tiny, "I think", option)) for option in options]
    assert logs_seen == [pytest.approx(expected, rel=1e-5)]


def test_shots_come_first_and_are_not_asked(tiny, tmp_path):
    path = written(tmp_path, [{"q": "I", "a": "so"}, {"q": "You", "a": ["it", "x"]}, {"q": "We", "a": "is"}])
    result = measure(tiny, Generation(name="x", path=path, prompt="Q: {q} A:", answer="a", shots=2), limit=5)
    assert [output.prompts for output in result.outputs] == [("Q: I A: so\n\nQ: You A: it\n\nQ: We A:",)]
    assert result.n == 1


def test_published_prompts_have_no_shots(tiny, tmp_path):
    path = written(tmp_path, RECORDS)
    result = measure(tiny, RTE(path=path, shots=1), scoring="paper")
    assert [output.prompts for output in result.outputs] == [tuple(RTE().prompts(record)) for record in RECORDS[1:]]


def test_limit(tiny, said):
    assert [output.prompts[1][:3] for output in measure(tiny, said, limit=2).outputs] == ["The", "You"]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        measure(tiny, said, limit=0)


def test_half_precision_leaves_the_weights_as_they_are(tiny, said):
    before = {name: (p.data_ptr(), p.clone()) for name, p in tiny.model.named_parameters()}
    dtypes = set()
    tiny.head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    assert measure(tiny, said, precision="bf16").n == 3
    assert dtypes == {torch.bfloat16}
    with pytest.raises(ValueError, match="context is 128"):
        measure(tiny, Said(path=said.path, max_new_tokens=200), precision="bf16")
    for name, parameter in tiny.model.named_parameters():
        assert (parameter.data_ptr(), parameter.dtype) == (before[name][0], torch.float32)
        assert torch.equal(parameter, before[name][1])


def test_a_task_of_one_s_own_has_no_published_score(tiny, tmp_path):
    task = Generation(name="x", path=written(tmp_path, [{"q": "I", "answer": "so"}]), prompt="{q}")
    assert "x/paper" not in measure(tiny, task).scores
    with pytest.raises(ValueError, match="no published score"):
        measure(tiny, task, scoring="paper")


def test_perplexity_of_a_text(tiny, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(PROSE[:900])
    result = measure(tiny, Perplexity(path=str(path), context=64), limit=1)
    score = result.scores["perplexity/mine"]
    assert score.value == pytest.approx(perplexity(tiny, PROSE[:900], context=64))
    assert score.low < score.value < score.high
    assert result.ability == pytest.approx(1 / score.value)
    assert result.unparseable is None
    assert result.n > 1


def test_the_result_of_several_processes_is_that_of_one(said):
    """Each process asks its share; here one after the other, with what they tell each other in between."""
    from rect_lightning.processes import Processes

    adapter = tiny_adapter("llama")
    said.prepare()
    expected = measure(adapter, said)
    records = [record for _, record in said.records]
    shares = []
    for rank in range(2):
        process = Processes(rank=rank, count=2)
        mine = process.mine(records)
        shares.append(said._outputs(adapter, How(), mine, [], paper=True, standard=True))

    class Told(Processes):
        def _tell(self, value):
            return [None, None] if value is None or isinstance(value, str) else shares

    assert measure(adapter, said, processes=Told(rank=1, count=2)) == expected
