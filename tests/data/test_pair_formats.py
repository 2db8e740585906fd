"""Rows of sources and targets in the layouts of the field, and what is wrong with others."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.config import build_config
from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import Record
from fulltune.data.tasks import SourceTargetExample, TaskConfig
from fulltune.errors import ConfigError, DataError, FulltuneError


def read(
    *rows: dict[str, Any], needs_label: bool = True, **values: Any
) -> list[SourceTargetExample]:
    records = [Record(row, f"pairs.jsonl:{line}") for line, row in enumerate(rows, start=1)]
    config = build_config(
        TaskConfig, {"kind": "sequence_to_sequence", "train": "pairs.jsonl", **values}
    )
    layout = recognise_format(records, config, needs_label=needs_label)
    examples = [
        make_example(record, layout, kind="sequence_to_sequence", needs_label=needs_label)
        for record in records
    ]
    assert all(isinstance(example, SourceTargetExample) for example in examples)
    return examples  # type: ignore[return-value]


EXPECTED = [SourceTargetExample("The cat", "猫", "pairs.jsonl:1")]
TRANSLATION = {"translation": {"en": "The cat", "zh": "猫"}}


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ({"source": "The cat", "target": "猫"}, {}),
        ({"text": "The cat", "summary": "猫"}, {}),
        ({"en": "The cat", "zh": "猫"}, {"columns": {"source": "en", "target": "zh"}}),
        ({"article": "The cat", "h": "猫"}, {"columns": {"text": "article", "summary": "h"}}),
        (TRANSLATION, {"columns": {"source": "en", "target": "zh"}}),
        (
            {"pair": TRANSLATION["translation"]},
            {"columns": {"translation": "pair", "source": "en", "target": "zh"}},
        ),
    ],
)
def test_every_layout_reads_to_the_same_example(row: dict[str, Any], values: Any) -> None:
    assert read(row, **values) == EXPECTED


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ({"source": "The cat"}, {}),
        ({"source": "The cat", "target": ""}, {}),
        ({"text": "The cat"}, {}),
        ({"translation": {"en": "The cat"}}, {"columns": {"source": "en"}}),
    ],
)
def test_prediction_does_without_the_target(row: dict[str, Any], values: Any) -> None:
    expected = [SourceTargetExample("The cat", None, "pairs.jsonl:1")]
    assert read(row, needs_label=False, **values) == expected


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        ({"source": "", "target": "x"}, {}, r"pairs\.jsonl:2: field `source` is empty"),
        ({"source": "x", "target": " "}, {}, r"pairs\.jsonl:2: field `target` is empty"),
        ({"source": "x", "target": None}, {}, r"pairs\.jsonl:2: field `target` is null"),
        ({"source": ["x"], "target": "y"}, {}, r"pairs\.jsonl:2: field `source` must be a text"),
    ],
)
def test_a_side_that_says_nothing_is_an_error_of_its_row(
    row: dict[str, Any], values: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read({"source": "fine", "target": "fine"}, row, **values)


def test_a_translation_without_a_direction_or_a_language_is_an_error() -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .* which is the source") as error:
        read(TRANSLATION)
    assert error.value.hint is not None
    assert "task.columns={source: en, target: zh}" in error.value.hint
    columns = {"source": "en", "target": "zh"}
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: .* has no language `zh`"):
        read(TRANSLATION, {"translation": {"en": "x", "zz": "y"}}, columns=columns)
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: `zh` of field `translation` is empty"):
        read(TRANSLATION, {"translation": {"en": "x", "zh": ""}}, columns=columns)


def test_a_prompt_must_say_where_the_source_stands() -> None:
    for prompt in ("Translate:", "{source} {source}"):
        with pytest.raises(ConfigError, match=r"must hold `\{source\}` once"):
            read({"source": "x", "target": "y"}, prompt=prompt)


def test_unknown_columns_are_named() -> None:
    with pytest.raises(FulltuneError, match="question"):
        read({"question": "x", "answer": "y"})
