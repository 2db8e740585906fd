"""Questions are read in each style of the field; an answer outside its context is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import read_records
from fulltune.data.tasks import AnswerPlace, QuestionExample, TaskConfig
from fulltune.errors import DataError

CONTEXT = "巴黎 (Paris) is the capital. Paris has 2,102,650 inhabitants."


def read(path: Path, **settings: Any) -> list[QuestionExample]:
    task = TaskConfig(kind="question_answering", train=str(path), **settings)
    records = list(read_records(str(path)))
    layout = recognise_format(records, task)
    examples = [make_example(record, layout, kind="question_answering") for record in records]
    return [example for example in examples if isinstance(example, QuestionExample)]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answers": {"text": ["Paris"], "answer_start": [4]}}, [("Paris", 4)]),
        ({"answers": [{"text": "巴黎", "answer_start": 0}, {"text": "capital"}]},
         [("巴黎", 0), ("capital", None)]),
        ({"answers": {"text": ["capital"]}}, [("capital", None)]),
        ({"answers": ["capital", "巴黎"]}, [("capital", None), ("巴黎", None)]),
        ({"answer": "巴黎", "answer_start": 0}, [("巴黎", 0)]),
        ({"answer": "巴黎"}, [("巴黎", None)]),
        ({"answers": {"text": [], "answer_start": []}}, []),
        ({"answers": [], "is_impossible": True}, []),
        ({"answer": ""}, []),
    ],
)  # fmt: skip
def test_each_style_of_answers_is_read(
    tmp_path: Path, fields: dict[str, Any], answers: list[tuple[str, int | None]]
) -> None:
    path = write(tmp_path / "q.jsonl", {"id": 7, "question": "Who?", "context": CONTEXT, **fields})
    (example,) = read(path)
    assert example.answers == tuple(AnswerPlace(text, start) for text, start in answers)
    assert (example.question, example.context, example.id) == ("Who?", CONTEXT, "7")


def test_squads_nested_file_is_a_row_for_each_question(tmp_path: Path) -> None:
    paragraphs = [
        {"context": CONTEXT, "qas": [
            {"id": "a", "question": "Which?", "answers": [{"text": "巴黎", "answer_start": 0}]},
            {"id": "b", "question": "Why?", "is_impossible": True, "answers": [],
             "plausible_answers": [{"text": "Paris", "answer_start": 4}]},
        ]},
        {"context": "Rome.", "qas": [{"id": "c", "question": "Who?", "answers": []}]},
    ]  # fmt: skip
    path = tmp_path / "squad.json"
    article = {"title": "Paris", "paragraphs": paragraphs}
    path.write_text(json.dumps({"version": "v2.0", "data": [article, article]}), encoding="utf-8")
    examples = read(path)
    assert [example.id for example in examples] == ["a", "b", "c"] * 2
    assert examples[0].answers == (AnswerPlace("巴黎", 0),)
    assert examples[1].answers == ()
    assert examples[2].context == "Rome."
    # Most such files are one line: a question goes by its number.
    assert [example.where for example in examples] == [f"{path}:{n}" for n in range(1, 7)]


def test_a_table_may_hold_the_place_as_text_or_leave_it_empty(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(
        "ask,context,answer,answer_start\nWhich?,Paris or Rome,Rome,9\nWho?,Paris,Paris,\n",
        encoding="utf-8",
    )
    examples = read(path, columns={"question": "ask"})
    assert [example.answers for example in examples] == [
        (AnswerPlace("Rome", 9),),
        (AnswerPlace("Paris", None),),
    ]


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"answer": "London"}, "the answer `London` is not in its context", "copy the answer"),
        ({"answer": "paris"}, "the answer `paris` is not in its context", "capitals"),
        ({"answers": {"text": ["Paris"], "answer_start": [8]}},
         "the answer `Paris` is not at character 8 of its context, where `s) is` stands",
         "it is at 4"),
        ({"answers": {"text": ["Paris", "capital"], "answer_start": [4]}},
         "has 2 texts, but 1 places", "answer_start"),
        ({"answers": {"text": "Paris"}}, "must hold lists `text` and `answer_start`", "write"),
        ({"answers": "Paris"}, "must be a list, not a text", "write"),
        ({"answers": None}, "field `answers` is null", "no answer is an empty list"),
        ({"answers": [{"answer_start": 3}]}, "an answer is null", "fill it in"),
        ({"answer": "Paris", "answer_start": -3}, "`answer_start` is `-3`", "leave it"),
        ({"answer": "Paris", "answer_start": "x"}, "`answer_start` is `x`", "leave it"),
        ({"answers": ["Paris"], "is_impossible": True}, "`is_impossible` is true", "one of the"),
        ({"answers": ["Paris"], "answer": "Paris"}, "both `answers` and `answer`", "drop one"),
        ({}, "neither `answers` nor `answer`", "write"),
        ({"answer": "Paris", "question": " "}, "field `question` is empty", "fill it in"),
        ({"answer": "Paris", "context": ""}, "field `context` is empty", "fill it in"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(
    tmp_path: Path, fields: dict[str, Any], message: str, hint: str
) -> None:
    good = {"question": "Which?", "context": CONTEXT, "answer": "capital"}
    path = write(tmp_path / "q.jsonl", good, {"question": "Who?", "context": CONTEXT, **fields})
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


def test_a_paragraph_without_questions_is_named(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    paragraphs = [{"context": "Rome.", "qas": []}, {"text": "Rome."}]
    path.write_text(json.dumps([{"title": "Rome", "paragraphs": paragraphs}]), encoding="utf-8")
    with pytest.raises(DataError, match=f"{path}:1: paragraph 2 of `Rome`"):
        read(path)
