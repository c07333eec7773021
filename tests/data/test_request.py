from dataclasses import FrozenInstanceError, replace

import pytest

from rect_lightning.data import EditRequest, Neighbour, RequestError

REQUEST = EditRequest(
    id="7", subject="Ada Lovelace", prompt="{} was born in", target_new=" Paris\n", target_true=" London"
)


def test_text_and_stripping():
    assert REQUEST.text == "Ada Lovelace was born in"
    assert (REQUEST.target_new, REQUEST.target_true) == ("Paris", "London")
    assert Neighbour(prompt="The Thames flows through", answer=" London ").answer == "London"


def test_text_leaves_other_braces_alone():
    assert replace(REQUEST, prompt="{0} {x} {} }").text == "{0} {x} Ada Lovelace }"
    assert replace(REQUEST, subject="a{}b").text == "a{}b was born in"


def test_lists_become_tuples():
    listed = replace(
        REQUEST, paraphrases=["Ada was"], neighbours=[Neighbour(prompt="a", answer="b")], generation_prompts=["x"]
    )
    assert hash(listed) == hash(replace(listed, neighbours=tuple(listed.neighbours), generation_prompts=("x",)))


def test_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        REQUEST.subject = "Grace Hopper"
    assert len({REQUEST, replace(REQUEST), replace(REQUEST, id="8")}) == 2


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("subject", {"subject": " \t"}, "empty"),
        ("prompt", {"prompt": "She was born in"}, "0 times"),
        ("prompt", {"prompt": "{} and {} were born in"}, "2 times"),
        ("target_new", {"target_new": "  "}, "empty"),
        ("target_new", {"target_new": "London  "}, "also the true target"),
        ("target_true", {"target_true": " "}, "empty"),
    ],
)
def test_refuses_and_names_the_field(field, change, problem):
    with pytest.raises(RequestError, match=problem) as error:
        replace(REQUEST, **change)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


def test_targets_that_differ_in_case_are_different():
    assert replace(REQUEST, target_new="london").target_new == "london"


@pytest.mark.parametrize("fields", [{"prompt": " ", "answer": "x"}, {"prompt": "x", "answer": " "}])
def test_refuses_half_a_neighbour(fields):
    with pytest.raises(RequestError, match=r"^neighbours: "):
        Neighbour(**fields)
