"""The benchmarks run; what they measure is not tested."""

import json

import pytest

from benchmarks import claims, comparison, contexts, editing, regularisers, speed, tasks
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    """A tiny model in a folder, with positions enough for the shipped facts in a tokenizer that knows few words."""
    model = tiny.model("llama")
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_speed_writes_its_tables(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RECT_ENTRIES", 100_000)
    monkeypatch.setattr(speed, "memory_speed", lambda: 1e10)
    out = tmp_path / "speed.md"
    speed.main([
        "--model", str(folder), "--layers", "1", "2", "--count", "4", "--naive", "2", "--growth", "1", "--widths", "64",
        "--tokens", "300", "--out", str(out),
    ])  # fmt: skip
    text = out.read_text()
    for phase in ("prefixes", "search, fp32", "search, bf16", "keys", "moments", "solve", "RECT", "metrics"):
        assert f"| {phase}" in text
    (differences,) = [float(line.split("|")[-2]) for line in text.splitlines() if line.startswith("| in batches")]
    assert differences < 1e-4, "the metrics in batches are not those of one prompt at a time"
    cosines = [float(line.split("|")[-2]) for line in text.splitlines() if line.startswith("| together, fp32")]
    assert cosines == [pytest.approx(1, abs=1e-4)], "the fast search does not find what the naive one does"


@pytest.mark.parametrize(
    ("few", "times", "expected"),
    [
        # seconds of a naive search; then in fp32 ours of that request and of all, in bf16 the same; and so on
        (1, [3.0, 1.0, 1.0, 1.5, 3.5, 5.0, 3.0, 4.5], (["1", "1.00", "3.0"], ["1", "1.50", "2.0"])),
        (9, [3.0, 1.0, 1.0, 1.5, 3.5, 5.0, 1.0, 3.0, 0.5, 4.5], (["2", "2.00", "4.0"], ["2", "2.00", "4.0"])),
    ],
)
def test_the_naive_search_is_compared_on_the_same_requests(folder, monkeypatch, few, times, expected):
    adapter = speed.load(str(folder))
    clock, once = iter(times), speed.once
    monkeypatch.setattr(speed, "once", lambda function: (next(clock), once(function)[1]))
    *_, naive, fp32, bf16, fp32_alone, bf16_alone = speed.against_naive(
        adapter, 1, speed.read_requests(speed.FACTS)[:2], few, turns=2
    )
    assert naive.split(" | ")[1:4] == ["2", "8.00", "1"]
    assert fp32.split(" | ")[1:4] == ["2", "2.00", "4.0"]
    assert bf16.split(" | ")[1:4] == ["2", "4.00", "2.0"]
    assert (fp32_alone.split(" | ")[1:4], bf16_alone.split(" | ")[1:4]) == expected
    assert next(clock, None) is None


def test_what_is_written_around_the_tables_stays():
    page = f"# Speed\n\n{speed.with_tables('', 'old')}\n- A note.\n"
    renewed = speed.with_tables(page, "new")
    with pytest.raises(ValueError, match="only one of"):
        speed.with_tables(page.replace(speed.END, ""), "new")
    assert renewed == page.replace("old", "new")
    assert renewed.startswith("# Speed\n")
    assert renewed.endswith("\n- A note.\n")


def test_the_editing_table():
    names = {"efficacy/probability": 0.5, "efficacy/exact": 1 / 3, "perplexity/wt": 20.0}
    found = {"MEMIT": {"before": names, "after": {**names, "efficacy/exact": 1.0}}}
    lines = editing.table(found, "wt").splitlines()
    assert len(lines) == 4
    assert lines[1].count("|") == lines[0].count("|") == lines[2].count("|")
    assert lines[2].split(" | ")[:3] == ["| before", "0.500", "0.333"]
    assert lines[3].split(" | ")[:3] == ["| MEMIT", "0.500", "1.000"]


def test_the_table_of_tasks(folder, tmp_path):
    records = tmp_path / "rte.jsonl"
    records.write_text(json.dumps({"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}) + "\n")
    out, outputs = tmp_path / "tasks.md", tmp_path / "outputs.jsonl"
    tasks.main([
        "--model", str(folder), "--tasks", "rte", "perplexity", "--path", f"rte={records}", "--alone", "1",
        "--precision", "bf16", "--out", str(out), "--outputs", str(outputs),
    ])  # fmt: skip
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| task", "| rte", "| perplexity"]
    assert rows[1][2].startswith("paper 0.000 (0.000 to 0.79")
    assert float(rows[1][5].rstrip("| ")) > 0
    (told,) = map(json.loads, outputs.read_text().splitlines())
    assert told["prompts"] == ["It rains. entails the It is wet.. True or False? answer:"]


def test_tasks_are_timed_by_one_scoring_alone(folder, tmp_path, capsys):
    records = tmp_path / "rte.jsonl"
    records.write_text(json.dumps({"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}) + "\n")
    for scoring, scores in (("paper", ["paper"]), ("standard", ["option", "generated"])):
        tasks.main([
            "--model", str(folder), "--tasks", "rte", "--path", f"rte={records}", "--alone", "1", "--scoring", scoring,
        ])  # fmt: skip
        row = capsys.readouterr().out.splitlines()[4].split(" | ")
        assert [score.split()[0] for score in row[2].split("), ")] == scores
        assert float(row[5].rstrip("| ")) > 0


def test_the_costs_of_regularisers(capsys):
    regularisers.main(["--shape", "24", "40"])
    rows = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [*regularisers.MAKERS, "NullSpace, once a run"]


def test_the_claims_compare_seed_by_seed(tmp_path, capsys):
    rows = ["editor,regulariser,seed,edits,source,name,value,low,high,n,unparseable"]
    for method, seed, exact, abilities in (
        ("none", 0, 0.8, (0.5, 0.4, 0.2)),
        ("none", 1, 0.4, (0.5, 0.5, 0.3)),
        ("RECT 40", 0, 0.6, (0.5, 0.5, 0.3)),
        ("RECT 40", 1, 0.4, (0.5, 0.5, 0.5)),
    ):
        rows += [f"ROME,{method},{seed},{10 * i},task,sst2/paper,{value},,,," for i, value in enumerate(abilities)]
        rows += [f"ROME,{method},{seed},{10 * i},task,perplexity/prose,{20 + 10 * i},,,," for i in range(3)]
        rows += [f"ROME,{method},{seed},20,after,efficacy/exact,{exact},,,,"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    claims.main([str(tmp_path)])
    *_, none, rect = [
        line.rstrip(" |").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ]
    # efficacy, abilities in the end and on average, perplexity; then as a share of none's, and what the curve is above it
    assert [cell.split(" ±")[0] for cell in none[1:]] == ["0.600", "0.500", "0.700", "2.000", "1.000", "", "0.000"]
    assert [cell.split(" ±")[0] for cell in rect[1:]] == ["0.500", "0.800", "0.900", "2.000", "0.875", "", "0.200"]
    assert "n =" not in "".join(none + rect)
    half = 12.706 * 0.125  # t with one degree of freedom, times the standard error of .75 and 1
    assert rect[5] == f"0.875 ± {half:.3f}"


def test_what_is_kept_of_edits_is_their_mean_along_the_way_where_that_was_measured(tmp_path, capsys):
    rows = ["editor,regulariser,seed,edits,source,name,value,low,high,n,unparseable"]
    for method, along in (("none", (0.9, 0.5)), ("RECT 40", (0.5, 0.2))):
        for seed in (0, 1):
            rows += [
                f"ROME,{method},{seed},{10 + 10 * i},edits,efficacy/exact,{value},,,," for i, value in enumerate(along)
            ]
            rows += [f"ROME,{method},{seed},20,after,efficacy/exact,{along[-1]},,,,"]
            for layer, share in ((1, along[0]), (2, along[1])):
                rows += [f"ROME,{method},{seed},{n},change,{layer}/above_0.171,{share * n / 20},,,," for n in (10, 20)]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    claims.main([str(tmp_path)])
    lines = capsys.readouterr().out.strip().splitlines()
    *_, title, _, names, _, none, rect = lines
    assert title == "**ROME: how the weights had changed in the end**"
    assert [names, none, rect] == ["|  | above_0.171 |", "| none | 0.700 |", "| RECT 40 | 0.350 |"]
    header, _, none, rect = lines[2:6]
    assert header.startswith("|  | efficacy/exact | efficacy/exact, curve | of none's efficacy |")
    assert none == "| none | 0.500 | 0.700 | 1.000 |  |  |"
    assert rect == "| RECT 40 | 0.200 | 0.350 | 0.500 |  |  |"


def test_claims_of_fewer_seeds_say_so_and_of_no_cell_are_refused(tmp_path, capsys):
    header = "editor,regulariser,seed,edits,source,name,value,low,high,n,unparseable"
    done = [
        f"ROME,{method},{seed},20,after,efficacy/exact,0.5,,,,"
        for method, seed in (("none", 0), ("none", 1), ("RECT", 1))
    ]
    under_way = "ROME,RECT,0,10,task,sst2/paper,0.5,,,,"
    (tmp_path / "table.csv").write_text("\n".join([header, *done, under_way, ""]))
    claims.main([str(tmp_path)])
    *_, none, rect = capsys.readouterr().out.strip().splitlines()
    assert none == "| none | 0.500 | 1.000 |  |  |"
    assert rect == "| RECT | 0.500, n = 1 | 1.000, n = 1 |  |  |"
    (tmp_path / "table.csv").write_text(f"{header}\n")
    with pytest.raises(ValueError, match=r"table\.csv has nothing to report: no cell in it is done"):
        claims.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"There is no .*elsewhere/table\.csv: name the folder of a grid"):
        claims.main([str(tmp_path / "elsewhere")])


HEADER = "editor,requests,edits,source,name,value,low,high,n,unparseable"


def tables(text):
    """The rows of each table in a text: cells by the names of their columns."""
    groups, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            groups.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
            rows = []
    return groups


def compared(tmp_path, capsys, rows, *options):
    """What is written about the rows of a grid."""
    (tmp_path / "table.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    comparison.main([str(tmp_path), *options])
    return capsys.readouterr().out


def test_a_comparison_begins_with_the_clean_model_where_all_cells_ask_it_the_same(tmp_path, capsys):
    rows = [f"{editor},1,1,after,efficacy/exact,0.5,,,," for editor in ("ROME", "KN")]
    same = [f"{editor},1,0,before,efficacy/exact,0.25,,,," for editor in ("ROME", "KN")]
    (table,) = tables(compared(tmp_path, capsys, rows + same))
    assert [(row[""], row["exact"]) for row in table] == [("before", "0.250"), ("ROME, 1", "0.500"), ("KN, 1", "0.500")]
    for other in ([same[0], same[1].replace("0.25", "0.5")], same[:1]):
        (table,) = tables(compared(tmp_path, capsys, rows + other))
        assert [row[""] for row in table] == ["ROME, 1", "KN, 1"]


def test_a_comparison_says_what_is_left(tmp_path, capsys):
    rows = []
    for edits, gsm8k, sst2, perplexity in ((10, 0.4, 0.8, 300), (0, 0.5, 0.8, 20), (5, 0.1, 0.1, 40)):
        rows += [f"ROME,10,{edits},task,gsm8k/paper,{gsm8k},,,,", f"ROME,10,{edits},task,sst2/paper,{sst2},,,,"]
        rows += [f"ROME,10,{edits},task,perplexity/prose,{perplexity},,,,", f"ROME,10,{edits},task,nq/paper,0,,,,"]
    rows += ["ROME,10,10,task,rte/paper,0.9,,,,"]  # not measured at 0 edits
    for metric, value in (("efficacy/probability", 0.9), ("efficacy/wild", 0.05), ("locality/unchanged", 0.75)):
        rows += [f"ROME,10,0,before,{metric},0,,,,", f"ROME,10,10,after,{metric},{value},,,,"]
    rows += [f"ROME,10,{n},edits,efficacy/probability,0.9,,,," for n in (0, 10)]  # of no edit there is no efficacy
    rows += ["ROME,10,2,cost,seconds_per_edit,3,,,2,", "ROME,10,3,cost,seconds_per_edit,9.7,,,1,"]
    rows += [f"ROME,10,10,cost,peak_memory/host,{most},,,," for most in ("2.5e9", "1e9")]
    rows += ["KN,10,0,before,perplexity/prose,20,,,,", "KN,10,0,before,perplexity/code,10,,,,"]
    rows += ["KN,10,10,after,perplexity/code,15,,,,", "KN,10,10,after,perplexity/prose,50,,,,"]
    rows += [
        "FT,10,10,after,perplexity/prose,50,,,,",
        "FT,10,10,task,sst2/paper,0.5,,,,",
    ]  # of which there is no before
    rows += ["KN,1,0,before,efficacy/exact,0,,,,", "KN,1,1,after,efficacy/exact,0.5,,,,"]
    rows += ["MEMIT,1,1,edits,efficacy/exact,0.5,,,,"]  # under way
    text = compared(tmp_path, capsys, rows, "--by", "requests")
    assert text.index("**requests: 10**") < text.index("**requests: 1**")
    assert text.rstrip().endswith("1 cells are not done and left out.")
    ten, one = tables(text)
    empty = dict.fromkeys(ten[0], "")
    assert ten == [
        {
            "": "ROME", "efficacy": "0.900", "free": "0.050", "unchanged": "0.750", "abilities": "0.90",
            "perplexity, ratio": "15", "s an edit": "5.23", "peak of the run, GB": "2.50",
        },
        {**empty, "": "KN", "perplexity, ratio": "1.50"},
        {**empty, "": "FT"},
    ]  # fmt: skip
    assert one == [{"": "before", "exact": "0.000"}, {"": "KN", "exact": "0.500"}]
    with pytest.raises(ValueError, match="no axis protocol; there are editor, requests"):
        comparison.main([str(tmp_path), "--by", "protocol"])


def test_a_long_run_says_where_it_collapsed(tmp_path, capsys):
    rows = []
    for editor, points, efficacies, perplexities in (
        ("MEMIT", (10, 20, 30), (0.9, 0.4, 0.6), (30, 39, 40)),  # twice is doubled
        ("AlphaEdit", (5, 20, 30), (0.9, 0.9, 0.5), (20, 20, 20)),  # one half is not below one half
        ("KN", (10, 20, 30), ("nan", 0.9, 0.9), (20, "nan", 20)),
    ):
        rows += [f"{editor},30,0,task,perplexity/prose,20,,,,", f"{editor},30,30,after,efficacy/probability,0.6,,,,"]
        for edits, efficacy, perplexity in zip(points, efficacies, perplexities, strict=True):
            rows += [f"{editor},30,{edits},edits,efficacy/probability,{efficacy},,,,"]
            rows += [f"{editor},30,{edits},task,perplexity/prose,{perplexity},,,,"]
        if editor == "MEMIT":
            rows += [
                f"MEMIT,30,{n},cost,seconds_per_edit,{0.5 if n < 29 else 0.25},,,1," for n in reversed(range(1, 31))
            ]
    rows += ["ROME,30,30,after,efficacy/probability,0.6,,,,"]  # nothing along the way
    rows += [f"MEMIT,30,{n},edits,efficacy/exact,{value},,,," for n, value in ((20, 0.3), (10, 0.5), (30, 0.7))]
    ends, efficacy, exact, perplexity, collapsed = tables(compared(tmp_path, capsys, rows))
    assert [row["perplexity, ratio"] for row in ends] == ["2.00", "1.00", "1.00", ""]
    named = "efficacy over all edits so far"
    assert efficacy[:2] == [
        {named: "MEMIT, 30", "5": "", "10": "0.900", "20": "0.400", "30": "0.600"},
        {named: "AlphaEdit, 30", "5": "0.900", "10": "", "20": "0.900", "30": "0.500"},
    ]
    assert exact[0] == {"exact over all edits so far": "MEMIT, 30", "10": "0.500", "20": "0.300", "30": "0.700"}
    assert perplexity[0] == {"perplexity, ratio": "MEMIT, 30", "5": "", "10": "1.50", "20": "1.95", "30": "2.00"}
    told = [tuple(row.values()) for row in collapsed]
    assert [*collapsed[0]] == [
        "", "perplexity doubled at", "efficacy below one half at", "exact below one half at", "s an edit, first tenth",
        "s an edit, last tenth",
    ]  # fmt: skip
    assert told == [
        ("MEMIT, 30", "30", "20", "20", "0.5", "0.333"),
        ("AlphaEdit, 30", "never", "never", "", "", ""),
        ("KN, 30", "20", "10", "", "", ""),  # what is no number is no sound model
        ("ROME, 30", "", "", "", "", ""),
    ]


def test_free_answers_under_several_instructions(folder, capsys, monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    requests = folder / "facts.jsonl"
    facts = [{"prompt": "{} is", "subject": name, "target_new": "red"} for name in ("sky", "sea", "sun")]
    requests.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    asked = []

    def answers(adapter, prompts, targets, wild):
        asked.append(wild.ask(prompts[0]))
        return [contexts.FreeAnswer(text, target) for text, target in zip(("red|", "Not red"), targets, strict=True)]

    monkeypatch.setattr(contexts, "free_answers", answers)
    contexts.main([str(folder), str(requests), "--count", "2"])
    (rows,) = tables(capsys.readouterr().out)
    assert asked == [
        "Please answer the question:\n\nQ: sky is\nA:",
        "<user>Please answer the question:\n\nQ: sky is<assistant>",
        "sky is",
        "sky is",
    ]
    assert [row.pop("asked by") for row in rows] == [
        "instruction", "instruction, as a chat", "prompt alone", "prompt alone, up to a comma"
    ]  # fmt: skip
    assert rows == [{"exact": "0.500", "begins": "0.500", "holds": "1.000", "such as": "red"}] * 4


@pytest.mark.parametrize(
    ("answer", "expected"), [("It is New York.", True), ("the new York", True), ("York, New", False), ("Newark", False)]
)
def test_an_answer_holds_its_target_as_words(answer, expected):
    assert contexts.holds(contexts.FreeAnswer(answer, "New York")) is expected


def test_no_answer_holds_a_target_of_which_nothing_is_left():
    assert not contexts.holds(contexts.FreeAnswer("The", "the"))
