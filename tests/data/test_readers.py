import csv
import json
import os
import re
import warnings

import datasets
import pytest
from datasets.utils import are_progress_bars_disabled

from rect_lightning.data import Neighbour, RequestError, read_requests

PLAIN = {"subject": "France", "prompt": "The capital of {} is", "target_new": "Rome", "target_true": "Paris"}
COUNTERFACT = {
    "case_id": 12,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "harp"},
        "target_true": {"str": "drums"},
        "subject": "Jo Example",
    },
    "paraphrase_prompts": ["Jo Example is a master of the"],
    "neighborhood_prompts": ["Sam Sample plays the", "Kim Specimen plays the"],
    "generation_prompts": ["Jo Example is known for"],
    "attribute_prompts": ["ignored"],
}
ZSRE = {
    "record_id": 3,
    "subject": "Mount Example",
    "src": "How high is Mount Example?",
    "pred": "1 m",
    "rephrase": "What height has Mount Example?",
    "alt": "2 m",
    "answers": ["3 m", "three metres"],
    "loc": "nq question: who is it",
    "loc_ans": "nobody",
}


@pytest.fixture
def write(tmp_path):
    """Writes records (or text) to a file of the folder and returns its path."""

    def _write(content, name="edits.jsonl"):
        path = tmp_path / name
        if not isinstance(content, str):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_text(content, encoding="utf-8")
        return path

    return _write


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- the three formats ----


def test_counterfact(write):
    (request,) = read_requests(write([COUNTERFACT]))
    assert (request.id, request.subject, request.prompt) == ("12", "Jo Example", "{} plays the")
    assert (request.target_new, request.target_true, request.relation) == ("harp", "drums", "P1303")
    assert request.paraphrases == ("Jo Example is a master of the",)
    assert request.neighbours == (
        Neighbour(prompt="Sam Sample plays the", answer="drums"),
        Neighbour(prompt="Kim Specimen plays the", answer="drums"),
    )
    assert request.generation_prompts == ("Jo Example is known for",)


def test_zsre_towards_alt(write):
    (request,) = read_requests(write([ZSRE]))
    assert (request.id, request.prompt, request.text) == ("3", "How high is {}?", ZSRE["src"])
    assert (request.target_new, request.target_true) == ("2 m", "3 m")
    assert request.paraphrases == (ZSRE["rephrase"],)
    assert request.neighbours == (Neighbour(prompt=ZSRE["loc"], answer="nobody"),)


def test_zsre_towards_the_answer(write):
    (request,) = read_requests(write([ZSRE]), zsre_target="answer")
    assert (request.target_new, request.target_true) == ("3 m", None)


def test_plain_with_everything(write):
    record = {
        **PLAIN,
        "id": 5,
        "relation": "capital",
        "paraphrases": ["France is governed from"],
        "neighbours": ["The Louvre is in", {"prompt": "The capital of Spain is", "answer": "Madrid"}],
        "generation_prompts": ["France is"],
    }
    (request,) = read_requests(write([record]))
    assert (request.id, request.relation, request.text) == ("5", "capital", "The capital of France is")
    assert request.paraphrases == ("France is governed from",)
    assert request.neighbours == (
        Neighbour(prompt="The Louvre is in", answer="Paris"),
        Neighbour(prompt="The capital of Spain is", answer="Madrid"),
    )
    assert request.generation_prompts == ("France is",)


def test_records_may_have_different_fields(write):
    # Arrow would take the columns of the first record only, and one type a column.
    first, second = read_requests(
        write(
            [
                {"subject": "A", "prompt": "{} is", "target_new": "x"},
                {"subject": "B", "prompt": "{} is", "target_new": "x", "id": "b", "paraphrases": ["B, a"]},
            ]
        )
    )
    assert (first.id, first.target_true, first.paraphrases) == ("1", None, ())
    assert (second.id, second.paraphrases) == ("b", ("B, a",))


def test_strings_stay_what_they_are(write):
    # datasets.load_dataset turns the first into datetimes; the last ends a line for str.splitlines.
    targets = ["1998-05-03", "007", "NA", "null", "1e3", "a\u2028b"]
    path = write(
        "".join(
            json.dumps({**PLAIN, "subject": f"s{i}", "target_new": t}, ensure_ascii=False) + "\n"
            for i, t in enumerate(targets)
        )
    )
    assert [request.target_new for request in read_requests(path)] == targets


def test_numbers(write):
    big = 10**40
    (request,) = read_requests(write([{**PLAIN, "id": big, "target_new": 1998}]))
    assert (request.id, request.target_new) == (str(big), "1998")


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("France, oh France is", "France", "{}, oh France is"),
        ("The annual report of Ann is", "Ann", "The annual report of {} is"),
        ("The Annual report of Ann is", "Ann", "The Annual report of {} is"),
        ("Bayerns Hauptstadt ist", "Bayern", "{}s Hauptstadt ist"),
        ("{} (not France) is", "France", "{} (not France) is"),
        ("C++ (language) was made by", "C++ (language)", "{} was made by"),
    ],
)
def test_subject_in_the_prompt_is_replaced(write, prompt, subject, expected):
    (request,) = read_requests(write([{**PLAIN, "prompt": prompt, "subject": subject}]))
    assert request.prompt == expected


def test_csv(tmp_path):
    rows = [
        {**PLAIN, "paraphrases": "One | Two|", "neighbours": "The Louvre is in|The Seine flows through", "id": ""},
        {
            **PLAIN,
            "subject": "Italy\nand more",
            "target_new": "007",
            "target_true": "NA",
            "paraphrases": '["a | b", "c"]',
            "neighbours": json.dumps([{"prompt": "p", "answer": "q"}]),
            "id": "",
        },
        {**PLAIN, "subject": "Spain", "target_true": "", "paraphrases": "", "neighbours": "", "id": "x"},
    ]
    first, second, third = read_requests(write_csv(tmp_path / "edits.csv", rows))
    assert first.paraphrases == ("One", "Two")
    assert [neighbour.answer for neighbour in first.neighbours] == ["Paris", "Paris"]
    assert (second.target_new, second.target_true, second.paraphrases) == ("007", "NA", ("a | b", "c"))
    assert second.neighbours == (Neighbour(prompt="p", answer="q"),)
    assert (third.target_true, third.neighbours, third.paraphrases) == (None, (), ())
    assert [first.id, second.id, third.id] == ["2", "3", "x"], "the lines on which the records begin"


@pytest.mark.parametrize("text", ["[{0}, {0}]", "\n[\n{0},\n{0}\n]\n", "{0}\n{0}\n", "\ufeff{0}\n\n{0}"])
def test_json_lists_and_lines(write, text):
    text = text.replace("{0}", json.dumps({**PLAIN, "prompt": "x France"}))
    with pytest.warns(UserWarning, match="word for word"):
        assert len(read_requests(write(text, "edits.json"))) == 2


def test_a_changed_file_is_read_anew(write):
    path = write([PLAIN])
    before = path.stat()
    assert read_requests(path)[0].target_new == "Rome"
    write([{**PLAIN, "target_new": "Oslo"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_requests(path)[0].target_new == "Oslo"


def test_files_leave_no_copies_and_no_progress_bars(write, tmp_path, monkeypatch, capfd):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    read_requests(write([PLAIN]))
    assert not cache.exists()
    assert capfd.readouterr() == ("", "")
    datasets.load_dataset("json", data_files=str(write([PLAIN])), split="train")
    assert list(cache.rglob("*.arrow")), "the check above would have seen copies"


# ---- what is refused, and where ----


def refusal(path, **options):
    with pytest.raises(RequestError) as error:
        read_requests(path, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"subject": None}, "subject", "empty"),
        ({"subject": " "}, "subject", "empty"),
        ({"prompt": "The capital is"}, "prompt", "subject not in the prompt"),
        ({"prompt": ""}, "prompt", "0 times"),
        ({"prompt": "{} {}"}, "prompt", "2 times"),
        ({"target_new": ""}, "target_new", "empty"),
        ({"target_new": " Paris "}, "target_new", "also the true target"),
        ({"target_new": ["Rome"]}, "target_new", "must be text"),
        ({"target_new": 1.5}, "target_new", "must be text"),
        ({"paraphrases": {"a": 1}}, "paraphrases", "must be a list"),
        ({"paraphrases": "[oops"}, "paraphrases", "broken JSON"),
        ({"paraphrases": ["x", ""]}, "paraphrases", "empty text"),
        ({"neighbours": ["x"], "target_true": None}, "neighbours", "has no answer"),
        ({"neighbours": [{"prompt": "x"}]}, "neighbours", "has no answer"),
        ({"neighbours": [{"answer": "x"}]}, "neighbours", "prompt is empty"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(write, change, field, problem):
    path = write([{**PLAIN, "subject": "Gaul", "prompt": "{} is"}, {}, {**PLAIN, **change}])
    path.write_text(path.read_text().replace("{}\n", "\n", 1))  # a blank line counts
    message = refusal(path)
    assert message.startswith(f"{path}, line 3: {field}: ")
    assert problem in message


def test_counterfact_errors_name_the_fields_of_the_file(write):
    rewrite = COUNTERFACT["requested_rewrite"]
    same = {**COUNTERFACT, "requested_rewrite": {**rewrite, "target_new": {"str": "drums"}}}
    assert ", line 2: requested_rewrite.target_new.str: " in refusal(write([COUNTERFACT, same]))
    flat = {**COUNTERFACT, "requested_rewrite": "x"}
    assert ", line 1: requested_rewrite: must be an object" in refusal(write([flat]))
    no_true = {**COUNTERFACT, "requested_rewrite": {k: v for k, v in rewrite.items() if k != "target_true"}}
    assert ", line 1: neighborhood_prompts: " in refusal(write([no_true]))


def test_zsre_errors_name_the_fields_of_the_file(write):
    message = refusal(write([ZSRE, {**ZSRE, "src": "How high is it?"}]))
    assert ", line 2: src: subject not in the prompt" in message
    assert ", line 1: loc: " in refusal(write([{**ZSRE, "loc_ans": ""}]))


def test_zsre_records_without_a_usable_target_are_left_out(write):
    path = write([{**ZSRE, "alt": "3 m"}, ZSRE, {**ZSRE, "alt": ""}])
    with pytest.warns(UserWarning, match=r"left out 2 of 3(?s:.*)line 1: alt: '3 m' is also(?s:.*)line 3: alt: empty"):
        (request,) = read_requests(path)
    assert request.target_new == "2 m"
    assert ", line 1: alt: " in refusal(write([{**ZSRE, "alt": "3 m"}])), "nothing left is an error"


def test_all_bad_records_are_reported_at_once(write):
    message = refusal(write([PLAIN, *[{**PLAIN, "subject": ""}] * 7]))
    assert message.startswith("7 of 8 records cannot be used")
    assert re.findall(r"line (\d+): subject", message) == ["2", "3", "4", "5", "6"]
    assert "and 2 more" in message


@pytest.mark.parametrize(
    ("text", "name", "where"),
    [
        (json.dumps(PLAIN) + "\n" + '{"subject": "b",}\n', "edits.jsonl", "line 2: broken JSON at column 17"),
        (json.dumps(PLAIN) + "\n[1]\n", "edits.jsonl", "line 2: must be an object"),
        ('[\n{"subject": "a"},\n{"subject" "b"}\n]', "edits.json", "line 3: broken JSON at column 12"),
        (
            '[{"subject": "a", "prompt": "{}",\n"target_new": "b"},\n\n{"prompt": "{}", "target_new": "x"}]',
            "e.json",
            "line 4: subject",
        ),
        ("subject,prompt,target_new\na,{} is,b,c\n", "edits.csv", "line 2: 4 cells under 3 columns"),
        ("subject,prompt,target_new\na,{} is,b\na,{} is\n", "edits.csv", "line 3: 2 cells under 3 columns"),
        (
            "subject,prompt,target_neww\na,{} is,b\n",
            "edits.csv",
            "target_neww: unknown column; rename it to 'target_new'",
        ),
        ('subject,prompt,target_new\n"a\nb",{} is,c\n\nd,{} is,\n', "edits.csv", "line 5: target_new: empty"),
        ('subject,prompt,target_new\na,"{} is,b\n', "edits.csv", "line 2: broken CSV"),
    ],
)
def test_broken_files_name_the_line(write, text, name, where):
    assert where in refusal(write(text, name))


def test_not_utf8(tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(b'{}\n{"subject": "Se\xf1or"}\n')
    assert f"{path}, line 2: not UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("text", "name"), [("", "a.jsonl"), ("\n \n", "b.jsonl"), ("[]", "c.json"), ("x,y\n", "d.csv")]
)
def test_empty_files(write, text, name):
    assert "no records" in refusal(write(text, name))


def test_wrong_columns(write):
    path = write([{"subject": "a", "question": "b"}])
    message = refusal(path)
    assert "found subject, question" in message
    for expected in (
        "counterfact: requested_rewrite;",
        "zsre: subject, src, answers;",
        "plain: subject, prompt, target_new;",
    ):
        assert expected in message
    assert "zsre:" not in refusal(path, format="plain")
    assert "zsre: subject, src, answers" in refusal(write([PLAIN]), format="zsre")


def test_misspelt_optional_column(write):
    message = refusal(write([{**PLAIN, "neighbors": ["x"]}]))
    assert "neighbors: unknown column; rename it to 'neighbours'" in message
    assert len(read_requests(write([{**PLAIN, "remark": "my own"}]))) == 1


def test_missing_files_suggest_near_names(write, tmp_path):
    write([PLAIN], "my_edits.jsonl")
    with pytest.raises(FileNotFoundError, match=r"my_edit\.jsonl is not there; did you mean my_edits\.jsonl\?"):
        read_requests(tmp_path / "my_edit.jsonl")
    with pytest.raises(FileNotFoundError, match="neither is its folder"):
        read_requests(str(tmp_path / "nowhere" / "x.jsonl"))
    assert "is a folder; name a file in it (my_edits.jsonl)" in refusal(tmp_path)


def test_unknown_extension(write):
    assert "unknown extension '.txt'" in refusal(write([PLAIN], "edits.txt"))


def test_options_are_checked(write):
    path = write([PLAIN])
    with pytest.raises(ValueError, match="format must be one of"):
        read_requests(path, format="squad")
    with pytest.raises(ValueError, match="zsre_target must be one of"):
        read_requests(path, zsre_target="answers")
    with pytest.raises(ValueError, match="split and name are for hub data sets"):
        read_requests(path, split="train")


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch):
    """Replaces load_dataset; the answer to give is in `hub.answer`, the calls in `hub.calls`."""

    class Hub:
        def __init__(self):
            self.answer, self.calls = None, []

        def load(self, *args, **kwargs):
            self.calls.append((args, kwargs, are_progress_bars_disabled()))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    return hub


def test_hub(hub):
    hub.answer = datasets.Dataset.from_list([COUNTERFACT])
    was_quiet = are_progress_bars_disabled()
    (request,) = read_requests("someone/counterfact", split="train[:1]", name="small")
    assert (request.id, request.neighbours[1].answer) == ("12", "drums")
    assert hub.calls == [(("someone/counterfact", "small"), {"split": "train[:1]"}, True)]
    assert are_progress_bars_disabled() == was_quiet, "the user's setting is put back"


def test_hub_records_are_named_by_number(hub):
    hub.answer = datasets.Dataset.from_list([PLAIN, {**PLAIN, "target_new": ""}])
    assert refusal("someone/edits").startswith("someone/edits, record 2: target_new: ")


def test_hub_splits(hub):
    data = datasets.Dataset.from_list([PLAIN])
    hub.answer = datasets.DatasetDict(train=data)
    assert len(read_requests("someone/edits")) == 1
    hub.answer = datasets.DatasetDict(train=data, test=data)
    assert "has the splits train, test; choose one with split" in refusal("someone/edits")


def test_hub_failure(hub):
    hub.answer = ConnectionError("no network")
    message = refusal("someone/edits")
    assert "no such file, and the hub gave no such data set (no network)" in message


def test_paths_are_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/edits", "edits.csv", "./edits", "a/b/c", "someone/edits.jsonl", "notes.txt"):
        with pytest.raises(FileNotFoundError):
            read_requests(path)
    assert not hub.calls


# ---- requests that do not go together ----


def conflicts(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_requests(path)
    return [str(warning.message) for warning in caught]


def test_contradictions_by_relation(write):
    a = {**PLAIN, "relation": "capital"}
    b = {**a, "prompt": "{} is governed from", "target_new": "Oslo"}
    (message,) = conflicts(write([a, b]))
    assert message.startswith("1 facts get contradictory targets")
    assert "'France', 'capital': 'Rome' (id 1), 'Oslo' (id 2)" in message
    assert not conflicts(write([a, {**b, "relation": "seat"}]))
    assert not conflicts(write([a, {**b, "subject": "Spain"}]))
    assert not conflicts(write([a, {**b, "target_new": "Rome"}])), "a paraphrase is no contradiction"


def test_contradictions_by_prompt_where_there_is_no_relation(write):
    assert len(conflicts(write([PLAIN, {**PLAIN, "target_new": "Oslo"}]))) == 1
    assert not conflicts(write([PLAIN, {**PLAIN, "prompt": "{} lies in", "target_new": "Oslo"}]))


def test_one_warning_lists_five(write):
    records = [{**PLAIN, "subject": f"s{i}", "target_new": target} for target in ("Rome", "Oslo") for i in range(7)]
    (message,) = conflicts(write(records))
    assert re.findall(r"'(s\d)'", message) == ["s0", "s1", "s2", "s3", "s4"]
    assert "and 2 more" in message


def test_repetitions(write):
    (message,) = conflicts(write([PLAIN, PLAIN]))
    assert "1 requests are repeated word for word" in message
    assert "'The capital of France is' -> 'Rome': id 1, 2" in message


# ---- the published data ----


@pytest.mark.parametrize(
    ("file", "target", "count"), [("zsre_eval", "alt", 679), ("zsre_eval", "answer", 700), ("zsre_train", "alt", 981)]
)
@pytest.mark.filterwarnings("ignore:left out")
def test_real_zsre(shared, file, target, count):
    path = shared / "data" / f"{file}.jsonl"
    requests = read_requests(path, zsre_target=target)
    records = {str(r["record_id"]): r for r in map(json.loads, path.read_text("utf-8").split("\n")[:-1])}
    assert len(requests) == count
    for request in requests:
        record = records[request.id]
        assert request.text == record["src"]
        assert request.target_new == (record["alt"] if target == "alt" else record["answers"][0]).strip()
        assert request.target_true == (record["answers"][0].strip() if target == "alt" else None)


@pytest.mark.filterwarnings("ignore:1 facts")
def test_real_counterfact(shared):
    path = shared / "data" / "counterfact.jsonl"
    requests = read_requests(path)
    records = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    assert [request.id for request in requests] == [str(record["case_id"]) for record in records]
    for request, record in zip(requests, records, strict=True):
        rewrite = record["requested_rewrite"]
        assert request.target_new == rewrite["target_new"]["str"]
        assert [n.prompt for n in request.neighbours] == record["neighborhood_prompts"]
        assert {n.answer for n in request.neighbours} == {rewrite["target_true"]["str"]}
