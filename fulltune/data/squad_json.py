"""SQuAD's nested JSON as rows: articles hold paragraphs, paragraphs hold questions.

    {"data": [{"title": …, "paragraphs": [{"context": …, "qas": [{"question": …, "answers": …}]}]}]}

DuReader-robust, DRCD, CMRC 2018 in SQuAD's style, KorQuAD and others are laid out so too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fulltune.errors import DataError


def flatten_questions(
    rows: Iterable[tuple[int, dict[str, Any]]], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A row for each question with its paragraph's `context`; other rows pass unchanged.

    Such files are mostly one long line, so a question goes by its number in the file and not by
    its line.

    Args:
        rows: of a JSON file, with their lines.
        name: the file, for messages.

    Raises:
        DataError: a paragraph lacks its context or its questions.
    """
    number = 0
    for line, row in rows:
        if not _is_article(row):
            yield line, row
            continue
        others = {key: value for key, value in row.items() if key != "paragraphs"}
        for place, paragraph in enumerate(row["paragraphs"], start=1):
            where = f"{name}:{line}: paragraph {place} of `{row.get('title', 'the article')}`"
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or "context" not in paragraph:
                raise DataError(
                    f"{where} must be an object with `context` and a list `qas`",
                    hint="compare it with the paragraphs beside it",
                )
            for question in questions:
                number += 1
                if not isinstance(question, dict):
                    raise DataError(
                        f"{where}: its {number}th question of the file is no object",
                        hint='write `{"question": …, "answers": […]}`',
                    )
                yield number, {**others, "context": paragraph["context"], **question}


def _is_article(row: dict[str, Any]) -> bool:
    paragraphs = row.get("paragraphs")
    if not isinstance(paragraphs, list):
        return False
    return any(isinstance(paragraph, dict) and "qas" in paragraph for paragraph in paragraphs)
