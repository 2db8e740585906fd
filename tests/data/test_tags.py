"""Every scheme says the same in IOB2, and what is wrong in its scheme is named by word."""

from __future__ import annotations

from typing import get_args

import pytest

from fulltune.data.tags import (
    Span,
    TagScheme,
    complete_tags,
    recognise_scheme,
    spans_of,
    tags_of_spans,
    to_iob2,
    wrong_class,
)
from fulltune.data.words import end_in_commas, spaces_before, split_words
from fulltune.errors import DataError

# Two entities of one label side by side, one of another alone, and one of one word.
IN_SCHEME: dict[TagScheme, str] = {
    "iob2": "B-PER I-PER B-PER O B-LOC I-LOC I-LOC O B-ORG",
    "iob1": "I-PER I-PER B-PER O I-LOC I-LOC I-LOC O I-ORG",
    "bioes": "B-PER E-PER S-PER O B-LOC I-LOC E-LOC O S-ORG",
    "bmes": "B-PER E-PER S-PER O B-LOC M-LOC E-LOC O S-ORG",
    "bilou": "B-PER L-PER U-PER O B-LOC I-LOC L-LOC O U-ORG",
    "io": "PER PER A O LOC LOC LOC O ORG",
}
IOB2 = tuple(IN_SCHEME["iob2"].split())


@pytest.mark.parametrize("scheme", get_args(TagScheme))
def test_a_scheme_is_recognised_and_says_the_same_in_iob2(scheme: TagScheme) -> None:
    tags = IN_SCHEME[scheme].split()
    assert recognise_scheme([("a.jsonl:1", ["O"]), ("a.jsonl:2", tags)]) == scheme
    expected = ("B-PER", "I-PER", "B-A", *IOB2[3:]) if scheme == "io" else IOB2
    assert to_iob2(tags, scheme, where="a.jsonl:2") == expected


def test_underscores_of_bmes_files_are_read_too() -> None:
    tags = ["B_ns", "M_ns", "E_ns", "S_nr"]
    assert recognise_scheme([("a:1", tags)]) == "bmes"
    assert to_iob2(tags, "bmes", where="a:1") == ("B-ns", "I-ns", "I-ns", "B-nr")


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        ("iob2", "O I-PER", r"a.jsonl:7: word 2: the tag `I-PER` follows `O`.* IOB2"),
        ("iob2", "I-PER", r"word 1: the tag `I-PER` is the first"),
        ("iob2", "B-PER I-LOC", r"word 2: the tag `I-LOC` follows `B-PER`"),
        ("iob2", "B-PER X", r"word 2: the tag `X` is unknown in IOB2"),
        ("iob2", "B-PER E-PER", r"the tag `E-PER` is unknown"),
        ("iob1", "O B-PER", r"word 2: the tag `B-PER` follows `O`.* IOB1"),
        ("bioes", "B-PER O", r"word 2: the tag `O` follows `B-PER`.* BIOES"),
        ("bioes", "B-PER B-PER E-PER", r"word 2: the tag `B-PER`"),
        ("bioes", "E-PER", r"word 1: the tag `E-PER` is the first"),
        ("bioes", "B-PER E-LOC", r"word 2: the tag `E-LOC` follows `B-PER`"),
        ("bmes", "S-PER B-PER", r"the last tag `B-PER` leaves its entity open"),
    ],
)
def test_wrong_tags_are_named_by_file_line_and_word(
    scheme: TagScheme, tags: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        to_iob2(tags.split(), scheme, where="a.jsonl:7")
    assert caught.value.hint


def test_i_without_b_is_an_error_and_no_iob1_where_other_entities_begin_with_b() -> None:
    rows = [("a:1", ["O", "B-PER"]), ("a:2", ["O", "I-PER"])]
    assert recognise_scheme(rows) == "iob2"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("B-PER PER", r"a:1: the tag `PER` has no letter .*`B-` first in a:1"),
        ("B M E S", r"the tag `B` has no label"),
        ("B-A M-A L-A", r"begin with `B`, `M`, `L`, which no scheme has together"),
    ],
)
def test_tags_of_no_scheme_are_refused(tags: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recognise_scheme([("a:1", tags.split())])


def test_spans_of_words_are_the_entities() -> None:
    assert spans_of(IOB2) == [
        Span(0, 2, "PER"), Span(2, 3, "PER"), Span(4, 7, "LOC"), Span(8, 9, "ORG"),
    ]  # fmt: skip


def test_a_model_has_both_tags_of_every_label_that_occurs() -> None:
    assert complete_tags(["B-PER", "I-LOC", "O"]) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        (("O", "B-PER", "I-PER"), None),
        (("B-PER",), None),
        (("O", "PER"), "`PER` is none"),
        (("O", "I-PER"), "there is `I-PER` without `B-PER`"),
        (("O", "S-PER", "B-PER"), "`S-PER` is none"),
    ],
)
def test_classes_that_are_not_of_iob2_are_named(tags: tuple[str, ...], problem: str | None) -> None:
    assert wrong_class(tags) == problem


# Spans of a text

TEXT = "Ada Byron liebt 北京大学 (Beijing)."


def spans(*places: tuple[int, int, str]) -> tuple[str, ...]:
    return tags_of_spans(
        TEXT, split_words(TEXT), [Span(*place) for place in places], where="a.jsonl:3"
    )


def test_spans_of_a_text_become_tags_of_its_words() -> None:
    words = [word.text for word in split_words(TEXT)]
    assert words == ["Ada", "Byron", "liebt", "北", "京", "大", "学", "(", "Beijing", ")", "."]
    found = spans((22, 29, "LOC"), (0, 9, "PER"), (16, 20, "ORG"))
    assert found == (
        "B-PER", "I-PER", "O", "B-ORG", "I-ORG", "I-ORG", "I-ORG", "O", "B-LOC", "O", "O",
    )  # fmt: skip


def test_space_around_an_entity_may_be_in_its_span() -> None:
    assert spans((3, 10, "PER"))[:3] == ("O", "B-PER", "O")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 9, "PER"), (4, 9, "PER")), r"a.jsonl:3: the span 4-9 `Byron` PER lies inside of 0-9"),
        (((0, 9, "PER"), (4, 15, "X")), r"span 4-15 `Byron liebt` X overlaps 0-9 `Ada Byron` PER"),
        (((0, 2, "PER"),), r"span 0-2 `Ad` PER ends or begins inside of the word `Ada`"),
        (((1, 9, "PER"),), r"inside of the word `Ada`"),
        (((3, 4, "PER"),), r"holds no word"),
        (((20, 99, "PER"),), r"is not inside of the text, which has 31 characters"),
        (((5, 5, "PER"),), r"is not inside of the text"),
    ],
)
def test_spans_that_are_no_tags_are_refused_by_name(
    places: tuple[tuple[int, int, str], ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        spans(*places)


# Words


def test_marks_and_joiners_stay_with_their_letters() -> None:
    text = "cafe\u0301 नमस्ते x\u00ady U.S. 3,5 ไทย"
    assert [word.text for word in split_words(text)] == [
        "cafe\u0301", "नमस्ते", "x\u00ady", "U", ".", "S", ".", "3", ",", "5", "ไ", "ท", "ย",
    ]  # fmt: skip
    assert all(text[word.start : word.end] == word.text for word in split_words(text))


@pytest.mark.parametrize(
    ("words", "spaces"),
    [
        (["Ada", "saw", "Rome"], [False, True, True]),
        (["1", "9", "年", "x"], [False] * 4),
        (["In", "北京", "today"], [False, False, False]),
        (["a", "b"], [False, True]),
        (["서울", "에서"], [False, True]),
    ],
)
def test_spaces_stand_between_words_of_scripts_that_have_them(
    words: list[str], spaces: list[bool]
) -> None:
    assert spaces_before(words) == spaces


def test_words_that_end_in_commas_were_cut_at_spaces() -> None:
    assert end_in_commas([["Chicago,", "IL"], ["Fargo,", "ND", ","]])
    assert not end_in_commas([["Chicago", ",", "IL"], ["U.S."]])
    assert not end_in_commas([["北", "京", "，"]])
    words = split_words("St., Fargo (ND) 北京，x", at_spaces=True)
    assert [word.text for word in words] == ["St.,", "Fargo", "(ND)", "北", "京", "，", "x"]
