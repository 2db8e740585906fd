"""Rows of whole texts with a label, with several, or with a number."""

from __future__ import annotations

import json
import math

from fulltune.data.rows import Row
from fulltune.data.tasks import (
    ClassificationExample,
    Example,
    MultiLabelExample,
    RegressionExample,
)


def _text_pair(row: Row) -> str | None:
    pair = row.text("text_pair") if "text_pair" in row.columns else None
    if pair is None and row.optional("text_pair") is not None:
        raise row.error(
            "has a `text_pair`, which none of the first rows has",
            hint="set `task.columns={text_pair: text_pair}` if each row has one, or drop it",
        )
    return pair


def labelled_text(row: Row, needs_label: bool) -> Example:
    """A text, or a pair of texts, with one label."""
    label = _label(row, needs_label=needs_label)
    return ClassificationExample(row.text("text"), _text_pair(row), label, row.record.where)


def text_with_labels(row: Row, needs_label: bool) -> Example:
    """A text, or a pair of texts, with any number of labels."""
    column = row.columns.get("labels", "labels")
    value = row.value("labels") if needs_label else row.optional("labels")
    if isinstance(value, str) and value.lstrip().startswith("["):  # of a table: JSON in a cell
        try:
            value = json.loads(value)
        except ValueError:
            raise row.error(f"field `{column}` is not a list in JSON: {value}") from None
    if value is None and not needs_label:
        value = []
    if not isinstance(value, list) or not all(isinstance(label, str | int) for label in value):
        raise row.error(
            f"field `{column}` must be a list of labels, not {value!r}",
            hint='write a list, in a table as JSON: `["a", "b"]`, and `[]` for no label',
        )
    labels = tuple(row.checked_text(str(label), f"a label in field `{column}`") for label in value)
    if len(set(labels)) != len(labels):
        raise row.error(f"field `{column}` names a label twice: {', '.join(labels)}")
    return MultiLabelExample(row.text("text"), _text_pair(row), labels, row.record.where)


def scored_text(row: Row, needs_label: bool) -> Example:
    """A text, or a pair of texts, with a number."""
    column = row.columns.get("score", "score")
    value = row.value("score") if needs_label else row.optional("score")
    if isinstance(value, str):  # of a table without types
        try:
            value = float(value)
        except ValueError:
            raise row.error(f"field `{column}` is `{value}`, and a score is a number") from None
    if value is None and not needs_label:
        return RegressionExample(row.text("text"), _text_pair(row), None, row.record.where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error(
            f"field `{column}` must be a finite number, not {value!r}",
            hint="correct the row, or drop it; classes are for `task.kind: classification`",
        )
    return RegressionExample(row.text("text"), _text_pair(row), float(value), row.record.where)


def _label(row: Row, *, needs_label: bool) -> str | None:
    column = row.columns.get("label", "label")
    value = row.value("label") if needs_label else row.optional("label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integers become floats in a table where one of them is missing
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        if needs_label:
            raise row.error(f"field `{column}` is empty", hint="add the label, or drop the row")
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        raise row.error(
            f"field `{column}` is {value}, and a label is a class",
            hint="use `task.kind: regression`, or write classes, for example `low` and `high`",
        )
    if isinstance(value, list):
        raise row.error(
            f"field `{column}` is a list, and an example has exactly one label",
            hint="use `task.kind: multi_label`",
        )
    return row.checked_text(value, f"field `{column}`")
