"""Where the subject ends and the target begins, in tokens."""

from __future__ import annotations

import json

import pytest

from rect_lightning.models.encoding import Row, encode
from tests import tiny as tiny_models


def ending_with_eos():
    """A tokenizer that puts BOS before and EOS after every text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(tiny_models.tokenizer().backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<s>")


def one(prompt, target=None, subject=None, *, tokenizer=None):
    """Encode one text, whose subject is found by name."""
    ends = None if subject is None else [prompt.index(subject) + len(subject)]
    [row] = encode(tokenizer or tiny_models.tokenizer(), [prompt], None if target is None else [target], ends)
    return row


def words(ids, tokenizer=None):
    return (tokenizer or tiny_models.tokenizer()).decode(ids)


# targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["The capital of France is", "What is it?", '"Well,"', "He said:", "It is (", "Is it 汉", "an é"]
)
@pytest.mark.parametrize("target", ["French", "table tennis", "s", "é", "汉字", "😀", "'s", "The Eiffel Tower!"])
def test_the_row_is_the_prompt_then_a_space_and_the_target(prompt, target):
    row = one(prompt, target)
    assert row.ids == tuple(tiny_models.tokenizer()(f"{prompt} {target}")["input_ids"])
    assert words(row.ids[: row.target]) == prompt
    assert words(row.target_ids) == f" {target}"
    assert row.subject == -1


def test_a_target_of_several_tokens():
    row = one("LeBron James plays the sport of", "table tennis")
    assert len(row.target_ids) > 2
    assert row.target + len(row.target_ids) == len(row.ids)


def test_without_targets_the_target_is_after_the_end(tiny_tokenizer):
    row = one("The capital of France is")
    assert row.ids == tuple(tiny_tokenizer("The capital of France is")["input_ids"])
    assert row.target == len(row.ids)
    assert row.target_ids == ()


@pytest.mark.parametrize("prompt", ["The capital of France is ", "The capital of France is  "])
def test_a_prompt_that_ends_in_spaces(prompt):
    """None of the target's letters is lost to the prompt, and at most the prompt's spaces are the target's."""
    row = one(prompt, "French")
    assert words(row.target_ids).strip() == "French"
    assert words(row.ids) == f"{prompt} French"
    assert words(row.ids[: row.target]).strip() == prompt.strip()


def test_a_target_that_merges_with_the_end_of_the_prompt():
    """A tokenizer that makes one token of the prompt's last letter, the space and the target: it is the target's."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, " ": 2, "c": 3, " c": 4, "b c": 5}
    inner = Tokenizer(models.BPE(vocabulary, [(" ", "c"), ("b", " c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    row = one("ab", "c", tokenizer=tokenizer)
    assert row.ids == (0, 5)
    assert row.target == 1


# subjects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("LeBron James plays", "LeBron James"),
        ("What is the capital of Spain", "Spain"),
        ("Spain", "Spain"),
        ("The Eiffel Tower's height is", "The Eiffel Tower"),
        ('He likes "Paris", which', "Paris"),
        ("In Paris, France.", "Paris"),
        ("The caf\u00e9 is", "caf\u00e9"),
        ("I know 汉 is", "汉"),
        ("汉", "汉"),
        ("Use 😀 here", "😀"),
        ("Use 😀😀 here", "😀😀"),
        ("The family 👩‍👧 is", "👩‍👧"),
        ("ends in Zürich", "Zürich"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "bos", "eos"])
@pytest.mark.parametrize("target", [None, "French"])
def test_the_subjects_last_token(prompt, subject, kind, target):
    """All tokens up to and with it hold the text up to the subject's end, and no fewer do."""
    tokenizer = ending_with_eos() if kind == "eos" else tiny_models.tokenizer(bos=kind == "bos")
    row = one(prompt, target, subject, tokenizer=tokenizer)
    upto = prompt[: prompt.index(subject) + len(subject)]
    text = words([i for i in row.ids[: row.subject + 1] if i > 1], tokenizer)
    assert text == upto
    shorter = words([i for i in row.ids[: row.subject] if i > 1], tokenizer)
    assert shorter != upto
    if target is not None:
        assert words(row.target_ids, tokenizer) == f" {target}"


def test_a_token_that_ends_after_the_subject():
    """Where the subject ends inside a token, that token is the one."""
    row = one("The Darrieux family", subject="Darri")
    tokens = tiny_models.tokenizer().convert_ids_to_tokens(row.ids)
    assert tokens[row.subject] == "rieu"
    assert tokens[: row.subject] == ["The", "ĠDar"]


def test_a_subject_named_twice_is_where_it_was_said_to_be(tiny_tokenizer):
    text = "Spain, or Spain again"
    [row] = encode(tiny_tokenizer, [text], None, [len("Spain, or Spain")])
    assert words(row.ids[: row.subject + 1]) == "Spain, or Spain"


# special tokens ---------------------------------------------------------------------------------------------------


def test_bos_stays_and_eos_goes():
    plain = one("Paris is in", "France", "Paris")
    with_bos = one("Paris is in", "France", "Paris", tokenizer=tiny_models.tokenizer(bos=True))
    with_both = one("Paris is in", "France", "Paris", tokenizer=ending_with_eos())
    assert with_bos == Row(ids=(1, *plain.ids), target=plain.target + 1, subject=plain.subject + 1)
    assert with_both == with_bos


def test_an_eos_that_is_part_of_the_text_stays(tiny_tokenizer):
    row = one("Paris is in", "France<|endoftext|>")
    assert row.ids[-1] == tiny_tokenizer.eos_token_id
    assert encode(tiny_tokenizer, ["Paris<|endoftext|>"])[0].ids[-1] == tiny_tokenizer.eos_token_id


# several, none, wrong ---------------------------------------------------------------------------------------------


def test_many_are_as_one_after_the_other(tiny_tokenizer):
    prompts = ["Paris is in", "The mother tongue of Danielle Darrieux is", "Why"]
    targets = ["France", "French", "so it is"]
    rows = encode(tiny_tokenizer, prompts, targets, [5, 38, 3])
    single = [encode(tiny_tokenizer, [p], [t], [e])[0] for p, t, e in zip(prompts, targets, [5, 38, 3], strict=True)]
    assert rows == single
    assert len({len(row.ids) for row in rows}) == 3


def test_nothing_to_encode(tiny_tokenizer):
    assert encode(tiny_tokenizer, []) == []
    assert encode(tiny_tokenizer, [], [], []) == []


def test_as_many_targets_as_prompts(tiny_tokenizer):
    with pytest.raises(ValueError, match="zip"):
        encode(tiny_tokenizer, ["a", "b"], ["c"])


def test_a_target_without_a_token(tiny_tokenizer):
    """As when a tokenizer drops what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert one("a", "b", tokenizer=tokenizer).target == 1
    with pytest.raises(ValueError, match="The target 'é' has no token of its own after 'a'"):
        one("a", "é", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="covers the end of its subject"):
        one("a é", "b", "é", tokenizer=tokenizer)


@pytest.mark.parametrize("end", [0, 1000])
def test_a_subject_that_is_not_in_the_text(tiny_tokenizer, end):
    with pytest.raises(ValueError, match=f"covers the end of its subject .character {end}"):
        encode(tiny_tokenizer, ["Paris is in"], None, [end])


# a tokenizer of the field -----------------------------------------------------------------------------------------


def test_the_public_codes_indices(shared):
    from transformers import AutoTokenizer

    folder = shared / "golden"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_gpt2")
    meta = json.loads((folder / "tiny_memit_meta.json").read_text())
    for number in (0, 2):
        request = meta["requests"][number]
        texts = [t.format(request["prompt"].format("{}")) for t in meta["context_templates_rome"]] + ["{} is a"]
        ends = [text.index("{}") + len(request["subject"]) for text in texts]
        prompts = [text.replace("{}", request["subject"]) for text in texts]
        found = encode(tokenizer, prompts, [request["target_new"]["str"]] * len(prompts), ends)
        assert [row.subject for row in found] == meta[f"req{number}.lookup_idxs"]
