from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser

from rect_lightning.models import Adapter
from rect_lightning.solving.corpus import Moments, identity, token_rows
from tests import tiny as tiny_models

DOCUMENTS = [
    "The Eiffel Tower is in Paris.\nIt is tall.",
    "Madrid.",
    "LeBron James plays basketball, you know it. " * 4,
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n" + "\n  \n\n".join(DOCUMENTS) + "\n")
    return path


def rows_of(adapter: Adapter, **options) -> list[list[int]]:
    return [row.tolist() for row in token_rows(adapter, Moments(**options))]


@pytest.mark.parametrize("bos", [False, True])
def test_documents_are_packed_into_rows_without_padding(text: Path, bos: bool):
    adapter = tiny_models.adapter("llama", bos=bos)
    start = [1] if bos else []
    stream = [i for d in DOCUMENTS for i in [*adapter.tokenizer(d, add_special_tokens=False)["input_ids"], 0]]
    size = 16 - len(start)
    expected = [[*start, *stream[i : i + size]] for i in range(0, len(stream), size)]

    with pytest.warns(UserWarning, match=f"{sum(map(len, expected))} tokens, fewer than the 1,000"):
        assert rows_of(adapter, source=str(text), tokens=1000, context=16) == expected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("source", ["self", "text"])
@pytest.mark.parametrize("tokens", [32, 33, 40])
def test_rows_have_exactly_the_tokens_asked_for(text: Path, source: str, tokens: int, bos: bool):
    adapter = tiny_models.adapter("gpt2", bos=bos)
    rows = rows_of(adapter, source=str(text) if source == "text" else source, tokens=tokens, context=16)
    assert [len(row) for row in rows] == [16, 16, *([tokens - 32] if tokens > 32 else [])]


@pytest.mark.parametrize("skip", [1, 5, 128, 130])
def test_skipped_rows_leave_the_others_as_they_are(tiny: Adapter, text: Path, skip: int):
    for moments in (Moments(tokens=140 * 8, context=8), Moments(source=str(text), tokens=90, context=8)):
        whole = [row.tolist() for row in token_rows(tiny, moments)]
        assert [row.tolist() for row in token_rows(tiny, moments, skip=skip)] == whole[skip:]


def test_every_line_of_jsonl_is_a_document(tiny: Adapter, text: Path, tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": d}) for d in [*DOCUMENTS[:2], "", DOCUMENTS[2]]) + "\n")
    assert rows_of(tiny, source=str(path), text_field="body", tokens=60, context=16) == rows_of(
        tiny, source=str(text), tokens=60, context=16
    )


def test_hub_data_sets_are_streamed(tiny: Adapter, text: Path, monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("owner/name", "en"), {"split": "test", "streaming": True})
        return iter({"text": d} for d in DOCUMENTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = rows_of(tiny, source="owner/name", config="en", split="test", tokens=60, context=16)
    assert hub == rows_of(tiny, source=str(text), tokens=60, context=16)


def test_hub_that_cannot_be_reached_says_what_was_tried(tiny: Adapter, monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'owner/name' is no file here.*ConnectionError: no route.*source: self"):
        rows_of(tiny, source="owner/name")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_samples_are_those_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch):
    """Against a forward pass over the whole row for each token, without a cache and in fp32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    adapter = tiny_models.adapter(family)
    rows = torch.stack(list(token_rows(adapter, Moments(tokens=3 * 24, context=24, seed=3))))
    draws = torch.rand(3, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        cumulative = adapter.model(input_ids=rows).logits.double().softmax(-1).cumsum(-1)
    below = torch.cat([torch.zeros(3, 24, 1), cumulative], -1).gather(-1, rows[:, 1:, None].expand(-1, -1, 1))
    above = cumulative[:, :-1].gather(-1, rows[:, 1:, None])
    assert (rows[:, 0] == 0).all()
    assert (draws[:, 1:, None] >= below[:, :23] - 1e-5).all()
    assert (draws[:, 1:, None] <= above + 1e-5).all()


def test_samples_follow_the_seed_and_leave_the_global_generator_alone(tiny: Adapter):
    before = torch.get_rng_state()
    options = {"tokens": 64, "context": 16}
    first = rows_of(tiny, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert rows_of(tiny, **options) == first
    assert rows_of(tiny, **options, seed=1) != first
    assert len({tuple(row) for row in first}) == 4


def test_samples_start_after_the_separator_or_bos(tiny: Adapter):
    token = tiny.tokenizer.get_vocab()["a"]
    assert {row[0] for row in rows_of(tiny, tokens=64, context=16)} == {tiny.tokenizer.eos_token_id}
    assert {row[0] for row in rows_of(tiny, tokens=64, context=16, separator="a")} == {token}
    bos = tiny_models.adapter("llama", bos=True)
    assert {row[0] for row in rows_of(bos, tokens=64, context=16)} == {bos.tokenizer.bos_token_id}


def test_identity_is_of_content(tiny: Adapter, text: Path, tmp_path: Path):
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_bytes(text.read_bytes())
    other.write_text("Something else.")
    assert identity(tiny, Moments(source=str(text))) == identity(tiny, Moments(source=str(same)))
    assert identity(tiny, Moments(source=str(text))) == identity(tiny, Moments(source=str(text), seed=1))
    different = [Moments(source=str(other)), Moments(), Moments(seed=1), Moments(tokens=9), Moments(context=64)]
    different += [Moments(separator="a"), Moments(source="owner/name"), Moments(source="owner/name", config="en")]
    digests = [json.dumps(identity(tiny, m)) for m in [Moments(source=str(text)), *different]]
    assert len(set(digests)) == len(digests)


def test_refuses_what_cannot_be_read(tiny: Adapter, tmp_path: Path):
    (tmp_path / "a.csv").write_text("text\n")
    for options, error, message in [
        ({"source": str(tmp_path / "none.txt")}, FileNotFoundError, "there is no file .*none.txt"),
        ({"source": str(tmp_path / "a.csv")}, ValueError, r"is none of \.txt"),
        ({"context": 129}, ValueError, "context is 129, but the model reads 128"),
        ({"separator": "<no>"}, ValueError, "'<no>' is no token"),
    ]:
        with pytest.raises(error, match=message):
            identity(tiny, Moments(**options))


def test_broken_lines_are_named(tiny: Adapter, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": }\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        rows_of(tiny, source=str(path))
    path.write_text('{"text": "a"}\n\n{"body": "b", "id": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: no text in field 'text' \(found: body, id\)"):
        rows_of(tiny, source=str(path))


@pytest.mark.parametrize(("option", "value"), [("tokens", 0), ("context", 1), ("source", "")])
def test_refuses_impossible_options(option: str, value: object):
    with pytest.raises(ValueError, match=f"moments.{option}"):
        Moments(**{option: value})


def test_options_read_from_yaml(capsys: pytest.CaptureFixture):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--moments", type=Moments | None, default=Moments())
    parsed = parser.instantiate(parser.parse_args(["--moments", "{source: self, tokens: 30000}"]))
    assert parsed.moments == Moments(tokens=30_000)
    assert parser.parse_args(["--moments", "null"]).moments is None
