"""Requests in templates: the right text, the subject where it is."""

from __future__ import annotations

import pytest

from rect_lightning.data import EditRequest
from rect_lightning.solving.texts import key_rows, search_rows
from tests import tiny as tiny_models

REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {} is", target_new="English"),
    EditRequest(id="b", subject="LeBron James", prompt="{}'s sport is", target_new="table tennis"),
    EditRequest(id="c", subject="汉", prompt="What is {}", target_new="é"),
    # the subject's text comes earlier too, and braces that are no placeholder
    EditRequest(id="d", subject="Spain", prompt="Not Spain {x} but {}, is", target_new="so"),
]
TEMPLATES = ["{}", "The. {}", "Because of Spain. {}", "So: {} "]
TEXTS = [
    "The mother tongue of Danielle Darrieux is",
    "LeBron James's sport is",
    "What is 汉",
    "Not Spain {x} but Spain, is",
]
UPTO = ["The mother tongue of Danielle Darrieux", "LeBron James", "What is 汉", "Not Spain {x} but Spain"]
PREFIXES = ["", "The. ", "Because of Spain. ", "So: "]


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def adapter(request):
    return tiny_models.adapter("llama", bos=request.param)


def decode(adapter, ids):
    return adapter.tokenizer.decode(ids, skip_special_tokens=True)


def test_key_rows(adapter):
    rows = key_rows(adapter, REQUESTS, TEMPLATES)
    assert len(rows) == 16
    for i, row in enumerate(rows):
        request, template = divmod(i, 4)
        tail = " " if template == 3 else ""
        assert decode(adapter, row.ids) == PREFIXES[template] + TEXTS[request] + tail
        assert decode(adapter, row.ids[: row.subject + 1]) == PREFIXES[template] + UPTO[request]
        assert row.target_ids == ()


def test_search_rows(adapter):
    found = search_rows(adapter, REQUESTS, TEMPLATES[:3])
    assert len(found) == 4
    for n, rows in enumerate(found):
        assert len(rows.targets) == 3
        for prefix, row in zip(PREFIXES, rows.targets, strict=False):
            assert decode(adapter, row.ids) == f"{prefix}{TEXTS[n]} {REQUESTS[n].target_new}"
            assert decode(adapter, row.ids[: row.target]) == prefix + TEXTS[n]
            assert decode(adapter, row.ids[: row.subject + 1]) == prefix + UPTO[n]
        essence = rows.essence
        assert decode(adapter, essence.ids) == f"{REQUESTS[n].subject} is a"
        assert decode(adapter, essence.ids[: essence.subject + 1]) == REQUESTS[n].subject


def test_keys_and_search_agree(adapter):
    """The key is read at the token the offset is added to, after the same tokens."""
    keys = key_rows(adapter, REQUESTS, TEMPLATES[:3])
    targets = [row for rows in search_rows(adapter, REQUESTS, TEMPLATES[:3]) for row in rows.targets]
    for key, target in zip(keys, targets, strict=True):
        assert key.subject == target.subject
        assert key.ids[: key.subject + 1] == target.ids[: target.subject + 1]


@pytest.mark.parametrize("rows", [key_rows, search_rows])
def test_too_long_a_prompt_is_refused_by_its_requests_name(adapter, rows):
    long = EditRequest(id="the long one", subject="Spain", prompt="so " * 130 + "{} is", target_new="so")
    with pytest.raises(ValueError, match=r"Request the long one has \d+ tokens .* the model's 128 positions"):
        rows(adapter, [REQUESTS[0], long, REQUESTS[1]], TEMPLATES)


def test_a_prefix_may_be_what_is_too_long(adapter):
    with pytest.raises(ValueError, match="Request b has"):
        key_rows(adapter, [REQUESTS[1]], ["{}", "so " * 130 + "{}"])


def test_as_long_as_the_model_goes():
    adapter = tiny_models.adapter("llama")
    short = EditRequest(id="x", subject="Spain", prompt=" is" * 100 + " {}", target_new="is")
    spare = 128 - len(search_rows(adapter, [short], ["{}"])[0].targets[0].ids)
    fits = EditRequest(id="y", subject="Spain", prompt=" is" * (100 + spare) + " {}", target_new="is")
    [rows] = search_rows(adapter, [fits], ["{}"])
    assert len(rows.targets[0].ids) == 128
    too_long = EditRequest(id="z", subject="Spain", prompt=" is" * (101 + spare) + " {}", target_new="is")
    with pytest.raises(ValueError, match="Request z has 129 tokens"):
        search_rows(adapter, [too_long], ["{}"])
