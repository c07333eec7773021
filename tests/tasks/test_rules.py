"""Each task's prompts and rules, against the published ones and by hand."""

from __future__ import annotations

import json

import pytest

from rect_lightning.data import RequestError
from rect_lightning.tasks import (
    GSM8K,
    NQ,
    RTE,
    SST2,
    BoolQ,
    CoNLL2003,
    Generation,
    MultipleChoice,
    MuTual,
    Perplexity,
    SAMSum,
    named,
)
from rect_lightning.tasks.conll2003 import published_entities
from rect_lightning.tasks.scores import Ratio, rouge, summarise

SUM = {"question": "Two and three?", "answer": "2 + 3 = <<2+3=5>>5 things\n#### 5"}
ENTAILS = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
YES = {"passage": "Moss is green.", "question": "is moss green", "answer": True}
REVIEW = {"sentence": "a joy .", "label": 1}
TALK = {"article": "m : hi . f : hello .", "options": ["m : a", "m : b", "m : c", "m : d"], "answers": "B"}
FACT = {"question": "where is the tower", "answer": ["Paris", "the City of Paris"]}
CHAT = {"dialogue": "A: Hi\nB: Bye", "summary": "They greet and part."}
NAMES = {"tokens": ["Jo", "Li", ",", "of", "Rome", ",", "met", "Bo"], "ner_tags": [1, 2, 0, 0, 5, 0, 0, 1]}


@pytest.mark.parametrize(
    ("task", "record", "prompt", "tokens"),
    [
        (
            GSM8K,
            SUM,
            "Q: Two and three? A:Let's think step by step. 2 + 3 = <<2+3=5>>5 things\n Therefore, the answer (arabic "
            "numerals) is:",
            5,
        ),
        (RTE, ENTAILS, "It rains. entails the It is wet.. True or False? answer:", 1),
        (
            NQ,
            FACT | {"passage": "Towers."},
            "Refer to the passage below and answer the following question. Passage: Towers. Question: where is the tower",
            20,
        ),
        (
            NQ,
            FACT,
            "Refer to the passage below and answer the following question. Question: where is the tower",
            20,
        ),
        (
            BoolQ,
            YES,
            "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'. passage: Moss is "
            "green. question: is moss green. answer:",
            1,
        ),
        (
            MuTual,
            TALK,
            "Q: m : hi . f : hello . Which choice is correct? Answer Chioces: (A)m : a(B)m : b(C)m : c(D)m : d A: Among A "
            "through D, the answer is",
            1,
        ),
        (SAMSum, CHAT, "A: Hi\nB: Bye\nTL;DR:", 25),
        (
            SST2,
            REVIEW,
            "For each snippet of text,label the sentiment of the text as positive or negative.The answer should be exact "
            "'positive' or 'negative'. text: a joy . answer:",
            1,
        ),
    ],
)
def test_the_published_prompts(task, record, prompt, tokens):
    assert task().paper_prompts(record) == [prompt]
    assert task.paper_tokens == tokens


def test_the_published_prompts_of_entities():
    kinds = ["Person", "Location", "Organization", "Miscellaneous"]
    text = "Jo Li, of Rome, met Bo"
    expected = [f"Please identify {k} Entity from the given text. Text: {text} Entity:" for k in kinds]
    assert CoNLL2003().paper_prompts(NAMES) == expected
    assert CoNLL2003.paper_tokens == 10


@pytest.mark.parametrize(
    ("task", "record", "text", "paper"),
    [
        (GSM8K, SUM, " 15.", 1),  # a 5 in it
        (GSM8K, SUM, " 6", 0),
        (GSM8K, SUM, " 6 Therefore, the answer (arabic numerals) is: 5", 0),
        (RTE, ENTAILS, "TRUE", 1),
        (RTE, ENTAILS, " untrue", 1),
        (RTE, ENTAILS, " False", 0),
        (RTE, ENTAILS | {"label": "not_entailment"}, " False", 1),
        (BoolQ, YES, " Yes", 1),
        (BoolQ, YES, "yes", 0),
        (BoolQ, YES, " yes.", 0),
        (BoolQ, YES | {"answer": False}, " no", 1),
        (MuTual, TALK, "But", 1),
        (MuTual, TALK, " b", 0),
        (SST2, REVIEW, " Positively", 1),
        (SST2, REVIEW, " negative", 0),
        (NQ, FACT, " I do not know", 0),
        (NQ, FACT, " It is Paris.", 1),
        (NQ, FACT, " Parisian things", 0),
        (NQ, FACT | {"passage": "In Paris."}, " I do not know", 1),  # the passage is searched too
        (NQ, FACT | {"passage": "In Paris."}, " Answer: I do not know", 0),
        (NQ, FACT, " Answer: Rome. Answer: city of Paris", 1),
    ],
)
def test_the_published_rules(task, record, text, paper):
    assert task().paper(record, [text]) == paper


def test_the_published_rule_of_summaries():
    said = " They greet and leave<|endoftext|>"
    expected = sum(rouge(" They greet and leave", CHAT["summary"]).values()) / 3
    assert 0 < expected < 1
    assert SAMSum().paper(CHAT, [said]) == pytest.approx(expected)
    assert SAMSum().paper(CHAT, [" They greet an" + "x" * 13]) < expected, "13 characters go in any case"
    assert SAMSum().paper(CHAT, ["They greet.!!"]) == 0


def test_the_published_cutting_of_entities():
    tags = ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "O", "B-PER"]
    assert published_entities(NAMES["tokens"], tags, "PER") == ["Jo Li", ""], "the last word is lost"
    assert published_entities(NAMES["tokens"], tags, "LOC") == ["Rome"]
    neighbours = ["B-PER", "B-PER", "O", "O", "B-LOC", "O", "O", "O"]
    assert published_entities(NAMES["tokens"], neighbours, "PER") == ["Jo Li"]


def test_the_published_rule_of_entities():
    texts = [" Jo Li", " Oslo", "", " Entities"]
    ratio = CoNLL2003().paper(NAMES, texts)
    assert ratio == Ratio((2.0, 0.0, 1.0, 0.0), (2.0, 1.0, 1.0, 1.0))
    assert summarise([ratio]).value == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert CoNLL2003().paper(NAMES, ["x", " Rome Entity: x", "x", ""]) == Ratio((1, 1, 0, 1), (2, 1, 0, 1))


@pytest.mark.parametrize(
    ("task", "record", "text", "answer", "parts"),
    [
        (GSM8K, SUM, "2 and 3 are 5.0", 5, {"exact": 1}),
        (GSM8K, SUM, "15", 15, {"exact": 0}),
        (GSM8K, SUM, "no idea", None, {"exact": 0}),
        (RTE, ENTAILS, "true.", 0, {"generated": 1}),
        (RTE, ENTAILS, "'False'", 1, {"generated": 0}),
        (RTE, ENTAILS, "truely", None, {"generated": 0}),
        (BoolQ, YES, "Yes, it is", 1, {"generated": 1}),
        (BoolQ, YES, "nobody knows", None, {"generated": 0}),
        (MuTual, TALK, "(B) m : b", 1, {"generated": 1}),
        (MuTual, TALK, "B.", 1, {"generated": 1}),
        (MuTual, TALK, "A good idea", None, {"generated": 0}),
        (MuTual, TALK, "But", None, {"generated": 0}),
        (SST2, REVIEW, "positive", 1, {"generated": 1}),
        (SST2, REVIEW, "a positive", None, {"generated": 0}),
        (NQ, FACT, "the City of Paris!", "the City of Paris!", {"exact": 1, "f1": 1}),
        (NQ, FACT, "Paris it is", "Paris it is", {"exact": 0, "f1": 0.5}),
        (NQ, FACT, "", None, {"exact": 0, "f1": 0}),
        (SAMSum, CHAT, "They greet and part.", "They greet and part.", {"rouge1": 1, "rouge2": 1, "rougeL": 1}),
        (SAMSum, CHAT, "", None, {"rouge1": 0, "rouge2": 0, "rougeL": 0}),
    ],
)
def test_the_correct_rules(task, record, text, answer, parts):
    assert task().parse(record, [text]) == answer
    assert task().standard(record, answer) == pytest.approx(parts)


def test_the_likeliest_option():
    assert RTE().by_likelihood(ENTAILS, [-1.0, -2.0]) == {"option": 1}
    assert RTE().by_likelihood(ENTAILS, [-3.0, -2.0]) == {"option": 0}
    assert RTE().by_likelihood(ENTAILS, [-2.0, -2.0]) == {"option": 0.5}
    assert MuTual().by_likelihood(TALK, [-3.0, -2.0, -4.0, -2.5]) == {"option": 1}


def seqeval_f1(gold, found):
    return pytest.importorskip("seqeval.metrics").f1_score(gold, found)


def test_entities_by_seqeval():
    """Tags of all kinds at once, as seqeval wants them, where no word has two of them."""
    pytest.importorskip("seqeval")
    task = CoNLL2003()
    said = [
        (NAMES, ["jo li, Mo", "none", "", "Rome"], ["B-PER", "I-PER", "O", "O", "B-MISC", "O", "O", "O", "B-PER"]),
        (NAMES, ["Bo; Li", "Rome.", "None", "n/a"], ["O", "B-PER", "O", "O", "B-LOC", "O", "O", "B-PER", "O"]),
    ]
    parts = [task.standard(record, task.parse(record, texts))["f1"] for record, texts, _ in said]
    gold = [*task.gold(NAMES), "O"]
    assert summarise(parts).value == pytest.approx(seqeval_f1([gold, gold], [tags for *_, tags in said]))
    assert parts == [Ratio((2.0,), (6.0,)), Ratio((4.0,), (6.0,))]
    assert task.parse(NAMES, ["none"] * 4) is not None
    assert task.parse(NAMES, ["Mo", "", "", ""]) is None
    assert task.standard(NAMES, None) == {"f1": Ratio((0.0,), (3.0,))}
    assert task.standard(NAMES, task.parse(NAMES, task.solution(NAMES)))["f1"] == Ratio((6.0,), (6.0,))


def test_one_word_may_be_listed_under_two_kinds():
    pytest.importorskip("seqeval")
    task = CoNLL2003()
    answer = task.parse(NAMES, ["Jo Li, Rome, Bo", "Rome", "", ""])
    assert task.standard(NAMES, answer)["f1"] == Ratio((6.0,), (7.0,))


@pytest.mark.parametrize(
    ("task", "record"),
    [(GSM8K, SUM), (RTE, ENTAILS), (BoolQ, YES), (MuTual, TALK), (SST2, REVIEW), (NQ, FACT), (SAMSum, CHAT)],
)
def test_a_task_s_own_solution_is_right(task, record):
    """Also what few-shot prompts show."""
    task = task()
    (text,) = task.solution(record)
    assert set(task.standard(record, task.parse(record, [text])).values()) == {1.0}


@pytest.mark.parametrize(
    ("task", "record", "match"),
    [
        (GSM8K, {"question": "?", "answer": "5"}, "line 1.*no right answer for gsm8k.*####"),
        (GSM8K, {"question": "?", "solution": "5"}, "wrong columns for gsm8k: found question, solution; expected"),
        (RTE, ENTAILS | {"label": -1}, "label is -1; expected 0 to 1, or entailment or not_entailment"),
        (BoolQ, YES | {"answer": "perhaps"}, "label is 'perhaps'"),
        (MuTual, TALK | {"options": ["x"]}, "1 options instead of 4"),
        (MuTual, TALK | {"answers": "E"}, "label is 'E'"),
        (NQ, FACT | {"answer": []}, "without any text"),
        (NQ, FACT | {"answer": "Paris"}, "answer: must be list, not 'Paris'"),
        (SAMSum, CHAT | {"summary": " "}, "summary is empty"),
        (SST2, REVIEW | {"sentence": None}, "sentence: must be str, not None"),
    ],
)
def test_wrong_data_is_refused(tmp_path, task, record, match):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(RequestError, match=match):
        task(path=str(path)).prepare()


@pytest.mark.parametrize(
    ("change", "match"),
    [({"ner_tags": [1]}, "8 tokens have 1 tags"), ({"ner_tags": [9] * 8}, "tag 9 is unknown")],
)
def test_wrong_tags_are_refused(tmp_path, change, match):
    pytest.importorskip("seqeval")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(NAMES | change))
    with pytest.raises(RequestError, match=match):
        CoNLL2003(path=str(path)).prepare()


def test_no_data_and_no_file(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(RequestError, match="no records"):
        RTE(path=str(empty)).prepare()
    with pytest.raises(FileNotFoundError, match=r"did you mean empty\.jsonl"):
        RTE(path=str(tmp_path / "emty.jsonl")).prepare()
    with pytest.raises(FileNotFoundError, match=r"tasks\.Perplexity\.path"):
        Perplexity(path="nowhere.txt").prepare()
    with pytest.raises(ValueError, match="split and name are for hub data sets"):
        RTE(path=str(empty), split="train").prepare()


def test_shots_have_to_leave_something(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ENTAILS))
    with pytest.raises(RequestError, match="lower shots"):
        RTE(path=str(path), shots=1).prepare()
    with pytest.raises(ValueError, match="shots must be at least 0"):
        RTE(shots=-1)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        RTE(path=str(path)).prepare(0)


def test_only_what_will_be_asked_is_checked(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ENTAILS) + "\n" + json.dumps({"x": 1}))
    RTE(path=str(path)).prepare(1)
    with pytest.raises(RequestError, match="line 2: wrong columns"):
        RTE(path=str(path)).prepare(2)


def test_the_data_sets_of_the_hub(monkeypatch):
    """By these names, configurations and splits; a path of one's own leaves them out."""
    from rect_lightning.tasks import task

    asked = []

    def read(path, *, split, name):
        asked.append((path, name, split))
        return [("record 1", 1, ENTAILS)]

    monkeypatch.setattr(task, "read_records", read)
    RTE().prepare()
    RTE(split="train").prepare()
    RTE(path="someone/rte").prepare()
    assert asked == [
        ("nyu-mll/glue", "rte", "validation"),
        ("nyu-mll/glue", "rte", "train"),
        ("someone/rte", None, None),
    ]


def test_names():
    assert isinstance(named("sst2"), SST2)
    with pytest.raises(ValueError, match="no task 'gsm8'; did you mean gsm8k"):
        named("gsm8")
    with pytest.raises(
        ValueError, match="there are gsm8k, rte, nq, boolq, mutual, samsum, conll2003, sst2, perplexity"
    ):
        named("chess")


def test_without_seqeval(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    with pytest.raises(ModuleNotFoundError, match=r"rect_lightning\[tasks\]"):
        CoNLL2003(path=str(tmp_path / "x.jsonl")).prepare()


def test_a_choice_of_one_s_own(tmp_path):
    task = MultipleChoice(
        name="sky", path="sky.jsonl", prompt="The {thing} is", options=["blue", "blue-green", "red"], answer="colour"
    )
    record = {"thing": "sky", "colour": "blue"}
    assert task.prompts(record) == ["The sky is"]
    assert task.gold(record) == 0
    assert task.gold({"thing": "sea", "colour": 1}) == 1
    assert task.parse(record, ["Blue-green it is"]) == 1, "the longest that fits"
    listed = MultipleChoice(name="x", path="x.jsonl", prompt="{q}", options="choices")
    assert listed.options({"choices": ["a", "b"]}) == ["a", "b"]
    with pytest.raises(ValueError, match="at least two"):
        MultipleChoice(name="x", path="x.jsonl", prompt="{q}", options=["one"])
    path = tmp_path / "sky.jsonl"
    path.write_text(json.dumps({"thing": "sky"}))
    with pytest.raises(RequestError, match="wrong columns for sky: found thing; expected thing, colour"):
        MultipleChoice(
            name="sky", path=str(path), prompt="The {thing} is", options=["a", "b"], answer="colour"
        ).prepare()


def test_a_generation_of_one_s_own():
    words = Generation(name="x", path="x.jsonl", prompt="Q: {q}")
    assert words.standard({"answer": ["two", "2"]}, "2.") == {"exact": 1, "f1": 1}
    number = Generation(name="x", path="x.jsonl", prompt="Q: {q}", rule="number")
    assert number.standard({"answer": 2}, number.parse({}, ["1 + 1 = 2.0"])) == {"exact": 1}
    assert number.standard({"answer": 2}, number.parse({}, ["two"])) == {"exact": 0}
    summary = Generation(name="x", path="x.jsonl", prompt="Q: {q}", rule="rouge")
    assert summary.standard({"answer": "a cat"}, "a cat") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert summary.main == "rougeL"
    with pytest.raises(ValueError, match="without a number"):
        number.gold({"answer": "two"})
