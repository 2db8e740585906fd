"""Rows of questions with the context that answers them -> examples; each answer at its place."""

from __future__ import annotations

from typing import Any

from fulltune.data.rows import Row, type_name
from fulltune.data.tasks import AnswerPlace, Example, QuestionExample

_HOW_ANSWERS_LOOK = (
    'write `"answers": {"text": ["Paris"], "answer_start": [0]}`, or `"answer": "Paris"`; '
    "no answer is an empty list or text"
)


def question_example(row: Row, needs_label: bool) -> Example:
    """A question, its context and its answers.

    Answers are SQuAD's in either of its styles, ``{"text": […], "answer_start": […]}`` or
    ``[{"text": …, "answer_start": …}]``, a list of texts, or one text under `answer` with
    `answer_start` beside it where it is known.

    Raises:
        DataError: an answer is not at its place in the context.
    """
    question, context = row.text("question"), row.text("context")
    answers = _answers(row, context) if needs_label else None
    return QuestionExample(question, context, answers, row.record.where, _id(row))


def _id(row: Row) -> str | None:
    value = row.optional("id")
    return value if value is None or isinstance(value, str) else str(value)


def _answers(row: Row, context: str) -> tuple[AnswerPlace, ...]:
    places = _given(row)
    for place in places:
        _require_at_its_place(row, place, context)
    if row.optional("is_impossible") is True and places:
        raise row.error(
            f"`is_impossible` is true, but there is the answer `{_shown(places[0].text)}`",
            hint="correct one of the two",
        )
    return places


def _given(row: Row) -> tuple[AnswerPlace, ...]:
    there = [field for field in ("answers", "answer") if _has(row, field)]
    if len(there) == 2 and row.optional("answers") is not None and row.optional("answer"):
        raise row.error("has both `answers` and `answer`", hint="drop one of the two")
    if not there:
        raise row.error("has neither `answers` nor `answer`", hint=_HOW_ANSWERS_LOOK)
    if "answers" in there and row.optional("answers") is not None:
        return _of_column(row, row.value("answers"))
    if there == ["answers"]:
        raise row.error("field `answers` is null", hint=_HOW_ANSWERS_LOOK)
    text = row.checked_text(row.value("answer"), "field `answer`", may_be_empty=True)
    if not text:
        return ()
    return (AnswerPlace(_text(row, text), _start(row, row.optional("answer_start"))),)


def _has(row: Row, field: str) -> bool:
    return row.columns.get(field, field) in row.record.fields


def _of_column(row: Row, value: Any) -> tuple[AnswerPlace, ...]:
    if isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start", value.get("start"))
        if not isinstance(texts, list) or not isinstance(starts, list | None):
            raise row.error(
                "field `answers` must hold lists `text` and `answer_start`", hint=_HOW_ANSWERS_LOOK
            )
        if starts is not None and len(starts) != len(texts):
            raise row.error(
                f"field `answers` has {len(texts)} texts, but {len(starts)} places",
                hint="give each answer its `answer_start`",
            )
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(texts, starts or [None] * len(texts), strict=True)
        ]
    if not isinstance(value, list):
        raise row.error(
            f"field `answers` must be a list, not {type_name(value)}", hint=_HOW_ANSWERS_LOOK
        )
    return tuple(_of_entry(row, entry) for entry in value)


def _of_entry(row: Row, entry: Any) -> AnswerPlace:
    if isinstance(entry, dict):
        return AnswerPlace(_text(row, entry.get("text")), _start(row, entry.get("answer_start")))
    return AnswerPlace(_text(row, entry), None)


def _text(row: Row, value: Any) -> str:
    return row.checked_text(value, "an answer")


def _start(row: Row, value: Any) -> int | None:
    """A place as a number; tables hold it as a text, or as a float where one is missing."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) >= 0:
        return int(value)
    raise row.error(
        f"`answer_start` is `{value}`, and must be the number of a character, from 0",
        hint="leave it out, and the answer is looked for in its context",
    )


def _require_at_its_place(row: Row, place: AnswerPlace, context: str) -> None:
    found = context.find(place.text)
    if place.start is None:
        if found < 0:
            raise row.error(
                f"the answer `{_shown(place.text)}` is not in its context",
                hint="capitals, spaces and signs count; copy the answer from the context",
            )
        return
    there = context[place.start : place.start + len(place.text)]
    if there != place.text:
        where = f"it is at {found}" if found >= 0 else "it is nowhere in the context"
        raise row.error(
            f"the answer `{_shown(place.text)}` is not at character {place.start} of its context, "
            f"where `{_shown(there)}` stands",
            hint=f"{where}; characters are counted from 0, and as Unicode, not bytes",
        )


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
