"""Rows in the formats of the field -> examples: which format a source has, and what a row of it is.

How conversations are read stands in `chat_formats.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fulltune.data.chat_formats import (
    alpaca_messages,
    openai_messages,
    preferred_messages,
    preferred_sharegpt_messages,
    prompt_completion_messages,
    sharegpt_messages,
)
from fulltune.data.pair_formats import source_target, text_summary, translation
from fulltune.data.records import Record
from fulltune.data.rows import Row, listed, missing_column
from fulltune.data.tasks import (
    ChatExample,
    ClassificationExample,
    Example,
    Message,
    MultiLabelExample,
    PreferenceExample,
    RegressionExample,
    TaskConfig,
    TaskKind,
    TextExample,
)
from fulltune.errors import ConfigError, DataError

ROWS_LOOKED_AT = 100
"""First rows of a source that say how all of it is laid out."""


@dataclass(frozen=True)
class RecordFormat:
    """How the rows of a source are laid out."""

    name: str
    columns: dict[str, str]
    """Our field name -> the column's name in the data."""
    description: str
    """What is read as what, for the user to check."""


@dataclass(frozen=True)
class _Layout:
    kind: TaskKind
    fields: tuple[str, ...]
    answer: str | None
    """The field among `fields` that prediction does without."""
    optional_fields: tuple[str, ...]
    description: str
    example: Callable[[Row, bool], Example]
    """A row -> what it holds; the second says whether it needs its answer or label."""
    keys: tuple[str, ...] = ()
    """Fields among `optional_fields` that are no columns but keys within the first field."""


def recognise_format(
    records: Sequence[Record], config: TaskConfig, *, needs_label: bool = True
) -> RecordFormat:
    """The format that all of the first rows have.

    Args:
        records: the first rows of one source; at least one.
        config: `kind` says which formats are possible; `format` and `columns` narrow them.
        needs_label: False in prediction, where answers and labels may be missing.

    Raises:
        DataError: none or several formats fit; the columns seen and the formats possible are named.
        ConfigError: `format` or `columns` contradict the kind of the task.
    """
    possible = _possible_layouts(config)
    fitting = {
        name: _columns(layout, records, config, needs_label=needs_label)
        for name, layout in possible.items()
        if all(
            _fits(name, layout, record, config.columns, needs_label=needs_label)
            for record in records
        )
    }
    if len(fitting) == 1:
        name, columns = fitting.popitem()
        return RecordFormat(name, columns, _describe(possible[name], columns))
    seen = f"{_place(records[0].where)} has the columns {listed(records[0].fields)}"
    if fitting:
        raise DataError(
            f"{seen}, which can be read in several ways: {listed(fitting)}",
            hint=f"choose one, for example `task.format={next(iter(fitting))}`",
        )
    raise _unrecognised(records, possible, config, needs_label=needs_label)


def make_example(
    record: Record, format: RecordFormat, *, kind: TaskKind, needs_label: bool = True
) -> Example:
    """One row as an example of a task.

    Args:
        record: the row.
        format: what `recognise_format` found for its source.
        kind: the task's kind.
        needs_label: False in prediction, where a conversation may end before the answer and a
            label may be missing.

    Raises:
        DataError: the row is not what the format says, with its file and line.
    """
    assert _LAYOUTS[format.name].kind == kind, f"{format.name} is no format of kind {kind}"
    columns = dict(format.columns)
    answer = _LAYOUTS[format.name].answer
    if answer is not None and not needs_label:
        # A test set often has the column and leaves it empty.
        column = columns.get(answer, answer)
        if record.fields.get(column) in (None, ""):
            columns.pop(answer, None)
    return _LAYOUTS[format.name].example(Row(record, columns), needs_label)


# Recognition


def _possible_layouts(config: TaskConfig) -> dict[str, _Layout]:
    possible = {name: layout for name, layout in _LAYOUTS.items() if layout.kind == config.kind}
    if config.format != "auto":
        if config.format not in possible:
            raise ConfigError(
                f"`task.format` is `{config.format}`, not a format of kind `{config.kind}`",
                hint=f"choose from {listed(possible)}, or `auto`",
            )
        possible = {config.format: possible[config.format]}
    named = {
        name: layout
        for name, layout in possible.items()
        if set(config.columns) <= {*layout.fields, *layout.optional_fields}
    }
    if not named:
        known = {
            field: None
            for layout in possible.values()
            for field in (*layout.fields, *layout.optional_fields)
        }
        raise ConfigError(
            f"`task.columns` gives columns for {listed(config.columns)}, "
            f"which no format of kind `{config.kind}` has together",
            hint=f"its fields are {listed(known)}",
        )
    return named


def _needed(layout: _Layout, *, needs_label: bool) -> list[str]:
    return [field for field in layout.fields if needs_label or field != layout.answer]


def _fits(
    name: str, layout: _Layout, record: Record, columns: Mapping[str, str], *, needs_label: bool
) -> bool:
    if name in ("messages", "sharegpt"):
        turns = record.fields.get(_turns_column(name, record, columns))
        key = "role" if name == "messages" else "from"
        return isinstance(turns, list) and any(
            isinstance(turn, dict) and turn.get(key) is not None for turn in turns
        )
    if name == "preference" and isinstance(
        record.fields.get(columns.get("chosen", "chosen")), dict
    ):
        return False  # a single turn, beside the turns before it
    needed = _needed(layout, needs_label=needs_label)
    return all(columns.get(field, field) in record.fields for field in needed)


def _turns_column(name: str, record: Record, columns: Mapping[str, str]) -> str:
    """Either style of turns is found under either name in the wild."""
    field = _LAYOUTS[name].fields[0]
    if field in columns:
        return columns[field]
    names = (field, "messages", "conversations", "conversation")
    return next((column for column in names if column in record.fields), field)


def _columns(
    layout: _Layout, records: Sequence[Record], config: TaskConfig, *, needs_label: bool
) -> dict[str, str]:
    if layout.fields[0] in ("messages", "conversations"):
        name = "messages" if layout.fields[0] == "messages" else "sharegpt"
        columns = {layout.fields[0]: _turns_column(name, records[0], config.columns)}
    else:
        columns = {
            field: config.columns.get(field, field)
            for field in _needed(layout, needs_label=needs_label)
        }
    for field in (*layout.fields, *layout.optional_fields):
        if field in layout.keys:
            columns |= {field: config.columns[field]} if field in config.columns else {}
            continue
        column = config.columns.get(field, field)
        asked = field in config.columns and field != layout.answer
        there = any(column in record.fields for record in records)
        if asked and not there and needs_label:
            raise missing_column(records[0], column, fields=(field,))
        if asked or (there and field not in columns):
            columns[field] = column
    return columns


def _describe(layout: _Layout, columns: Mapping[str, str]) -> str:
    description = layout.description.format(**{field: f"`{field}`" for field in layout.fields})
    renamed = [
        f"`{ours}` is column `{theirs}`" for ours, theirs in columns.items() if ours != theirs
    ]
    return "; ".join([description, *renamed])


def _unrecognised(
    records: Sequence[Record],
    possible: Mapping[str, _Layout],
    config: TaskConfig,
    *,
    needs_label: bool,
) -> DataError:
    for layout in possible.values():
        for record in records:
            missing = [
                config.columns.get(field, field)
                for field in _needed(layout, needs_label=needs_label)
                if config.columns.get(field, field) not in record.fields
            ]
            if missing and (len(possible) == 1 or config.columns):
                return missing_column(record, missing[0], fields=layout.fields)
    if "messages" in possible:
        unlike = _without_turns(records, config.columns)
        if unlike is not None:
            return unlike
    forms = [
        " and ".join(f"`{field}`" for field in _needed(layout, needs_label=needs_label))
        for layout in possible.values()
    ]
    first = set(records[0].fields)
    other = next((record for record in records if set(record.fields) != first), None)
    also = f", and {other.where} has {listed(other.fields)}" if other else ""
    return DataError(
        f"{_place(records[0].where)} has the columns {listed(records[0].fields)}{also}; "
        f"that is no known format of kind `{config.kind}`",
        hint=f"it needs {', or '.join(dict.fromkeys(forms))}; map the names of yours with "
        f"`{_example_of_columns(records[0], possible, needs_label=needs_label)}`",
    )


def _example_of_columns(
    record: Record, possible: Mapping[str, _Layout], *, needs_label: bool
) -> str:
    """A mapping of the row's own columns: onto single texts, as such rows have other names."""
    layout = possible.get("prompt_completion") or next(iter(possible.values()))
    needed = _needed(layout, needs_label=needs_label)
    texts = [name for name, value in record.fields.items() if isinstance(value, str)]
    named = [*texts, *["COLUMN"] * len(needed)]
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in zip(needed, named, strict=False))
    return f"task.columns={{{pairs}}}"


def _without_turns(records: Sequence[Record], columns: Mapping[str, str]) -> DataError | None:
    """The first row that spoils a file whose rows are conversations otherwise."""
    for name in ("messages", "sharegpt"):
        layout = _LAYOUTS[name]
        odd = [row for row in records if not _fits(name, layout, row, columns, needs_label=True)]
        if not odd or len(odd) == len(records):
            continue
        column = _turns_column(name, odd[0], columns)
        if column in odd[0].fields:
            return DataError(
                f"{odd[0].where}: field `{column}` holds no turns, as other rows do",
                hint="correct the row, or drop it",
            )
    return None


def _place(where: str) -> str:
    return where.rpartition(":")[0] or where


# Rows


def _chat(messages_of: Callable[[Row], list[Message]]) -> Callable[[Row, bool], Example]:
    def example(row: Row, needs_label: bool) -> Example:
        messages = messages_of(row)
        if needs_label and not any(message.role == "assistant" for message in messages):
            raise row.error(
                "no assistant turn, so there is nothing to train on", hint="drop the row"
            )
        return ChatExample(tuple(messages), row.record.where)

    return example


def _preference(
    messages_of: Callable[[Row], tuple[list[Message], list[Message]]],
) -> Callable[[Row, bool], Example]:
    def example(row: Row, needs_label: bool) -> Example:
        chosen, rejected = messages_of(row)
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if messages[-1].role != "assistant":
                raise row.error(
                    f"the {name} conversation ends with a turn of `{messages[-1].role}`",
                    hint="the last turn is the answer, of the assistant",
                )
        if chosen[:-1] != rejected[:-1]:
            raise row.error(
                "the chosen and the rejected answer have different prompts",
                hint="both must answer the same turns",
            )
        return PreferenceExample(tuple(chosen), tuple(rejected), row.record.where)

    return example


def _text(row: Row, needs_label: bool) -> Example:
    return TextExample(row.text("text"), row.record.where)


def _text_pair(row: Row) -> str | None:
    pair = row.text("text_pair") if "text_pair" in row.columns else None
    if pair is None and row.optional("text_pair") is not None:
        raise row.error(
            f"has a `text_pair`, which none of the first {ROWS_LOOKED_AT} rows has",
            hint="set `task.columns={text_pair: text_pair}` if each row has one, or drop it",
        )
    return pair


def _classification(row: Row, needs_label: bool) -> Example:
    label = _label(row, needs_label=needs_label)
    return ClassificationExample(row.text("text"), _text_pair(row), label, row.record.where)


def _multi_label(row: Row, needs_label: bool) -> Example:
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


def _regression(row: Row, needs_label: bool) -> Example:
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


_LAYOUTS: dict[str, _Layout] = {
    "messages": _Layout(
        kind="chat",
        fields=("messages",),
        answer=None,
        optional_fields=("system",),
        description="OpenAI messages: {messages} is a list of turns with `role` and `content`",
        example=_chat(openai_messages),
    ),
    "sharegpt": _Layout(
        kind="chat",
        fields=("conversations",),
        answer=None,
        optional_fields=("system",),
        description="ShareGPT: {conversations} is a list of turns with `from` and `value`",
        example=_chat(sharegpt_messages),
    ),
    "alpaca": _Layout(
        kind="chat",
        fields=("instruction", "output"),
        answer="output",
        optional_fields=("input", "history", "system"),
        description="Alpaca: the prompt is {instruction} and, where `input` is not empty, "
        "a blank line and `input`; the answer is {output}",
        example=_chat(alpaca_messages),
    ),
    "prompt_completion": _Layout(
        kind="chat",
        fields=("prompt", "completion"),
        answer="completion",
        optional_fields=("system",),
        description="prompt and completion: {prompt} is the user's turn, or a list of turns; "
        "{completion} is the assistant's",
        example=_chat(prompt_completion_messages),
    ),
    "preference": _Layout(
        kind="preference",
        fields=("chosen", "rejected"),
        answer=None,
        optional_fields=("prompt", "system"),
        description="preferences: {chosen} and {rejected} are answers to `prompt`, or whole "
        "conversations",
        example=_preference(preferred_messages),
    ),
    "preference_sharegpt": _Layout(
        kind="preference",
        fields=("conversations", "chosen", "rejected"),
        answer=None,
        optional_fields=("system",),
        description="preferences in ShareGPT: {conversations} are turns with `from` and `value`, "
        "{chosen} and {rejected} the last one",
        example=_preference(preferred_sharegpt_messages),
    ),
    "text": _Layout(
        kind="text",
        fields=("text",),
        answer=None,
        optional_fields=(),
        description="plain text: {text} is a document",
        example=_text,
    ),
    "classification": _Layout(
        kind="classification",
        fields=("text", "label"),
        answer="label",
        optional_fields=("text_pair",),
        description="classification: {text}, with `text_pair` where there is one, has one {label}",
        example=_classification,
    ),
    "multi_label": _Layout(
        kind="multi_label",
        fields=("text", "labels"),
        answer="labels",
        optional_fields=("text_pair",),
        description="many labels: {text}, with `text_pair` where there is one, has the {labels}",
        example=_multi_label,
    ),
    "regression": _Layout(
        kind="regression",
        fields=("text", "score"),
        answer="score",
        optional_fields=("text_pair",),
        description="regression: {text}, with `text_pair` where there is one, has one {score}",
        example=_regression,
    ),
    "source_target": _Layout(
        kind="sequence_to_sequence",
        fields=("source", "target"),
        answer="target",
        optional_fields=(),
        description="source and target: {source} is read, {target} is written for it",
        example=source_target,
    ),
    "summary": _Layout(
        kind="sequence_to_sequence",
        fields=("text", "summary"),
        answer="summary",
        optional_fields=(),
        description="summaries: {text} is read, {summary} is written for it",
        example=text_summary,
    ),
    "translation": _Layout(
        kind="sequence_to_sequence",
        fields=("translation",),
        answer=None,
        optional_fields=("source", "target"),
        description="translations: {translation} holds a text by language",
        example=translation,
        keys=("source", "target"),
    ),
}
