"""Rows in the formats of the field -> examples: OpenAI, ShareGPT, Alpaca, prompt and completion.

Every text is taken as it stands. What cannot be trained on as it is meant (tool calls, images,
weights) is refused by name, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.data.records import Record
from fulltune.data.tasks import (
    ChatExample,
    ClassificationExample,
    Example,
    Message,
    Role,
    TaskConfig,
    TaskKind,
    TextExample,
)
from fulltune.errors import ConfigError, DataError, near_names

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
    messages: Callable[[_Row], list[Message]] | None = None


_OPENAI_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES: dict[str, Role] = {
    **_OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# Parts of a turn that say something which a plain text does not; training without them would teach
# something else than the data means.
_REFUSED_PARTS = {
    "tool_calls": "tool calls",
    "function_call": "function calls",
    "reasoning_content": "a separate reasoning text",
    "reasoning": "a separate reasoning text",
    "thinking": "a separate reasoning text",
    "audio": "audio",
    "images": "images",
    "refusal": "a refusal apart from the content",
}


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
    seen = f"{_place(records[0].where)} has the columns {_listed(records[0].fields)}"
    if fitting:
        raise DataError(
            f"{seen}, which can be read in several ways: {_listed(fitting)}",
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
    columns = dict(format.columns)
    answer = _LAYOUTS[format.name].answer
    if answer is not None and not needs_label:
        # A test set often has the column and leaves it empty.
        column = columns.get(answer, answer)
        if record.fields.get(column) in (None, ""):
            columns.pop(answer, None)
    row = _Row(record, columns)
    if kind == "text":
        return TextExample(row.text("text"), record.where)
    if kind == "classification":
        pair = row.text("text_pair") if "text_pair" in format.columns else None
        if pair is None and row.optional("text_pair") is not None:
            raise row.error(
                f"has a `text_pair`, which none of the first {ROWS_LOOKED_AT} rows has",
                hint="set `task.columns={text_pair: text_pair}` if each row has one, or drop it",
            )
        return ClassificationExample(
            row.text("text"), pair, _label(row, needs_label=needs_label), record.where
        )
    messages_of = _LAYOUTS[format.name].messages
    assert messages_of is not None, f"{format.name} is not a chat format"
    messages = messages_of(row)
    if needs_label and not any(message.role == "assistant" for message in messages):
        raise row.error("no assistant turn, so there is nothing to train on", hint="drop the row")
    return ChatExample(tuple(messages), record.where)


# Recognition


def _possible_layouts(config: TaskConfig) -> dict[str, _Layout]:
    possible = {name: layout for name, layout in _LAYOUTS.items() if layout.kind == config.kind}
    if config.format != "auto":
        if config.format not in possible:
            raise ConfigError(
                f"`task.format` is `{config.format}`, not a format of kind `{config.kind}`",
                hint=f"choose from {_listed(possible)}, or `auto`",
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
            f"`task.columns` gives columns for {_listed(config.columns)}, "
            f"which no format of kind `{config.kind}` has together",
            hint=f"its fields are {_listed(known)}",
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
        column = config.columns.get(field, field)
        asked = field in config.columns and field != layout.answer
        there = any(column in record.fields for record in records)
        if asked and not there and needs_label:
            raise _missing_column(records[0], column, fields=(field,))
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
                return _missing_column(record, missing[0], fields=layout.fields)
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
    also = f", and {other.where} has {_listed(other.fields)}" if other else ""
    return DataError(
        f"{_place(records[0].where)} has the columns {_listed(records[0].fields)}{also}; "
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


def _missing_column(record: Record, column: str, *, fields: Sequence[str] = ()) -> DataError:
    near = near_names(column, record.fields)
    hint = f"did you mean `{near[0]}`? " if near else ""
    if column in fields:
        found = near[0] if near else "COLUMN"
        hint += f"map another name with `task.columns={{{column}: {found}}}`"
    elif len(fields) == 1 and not near:
        hint += f"correct `task.columns={{{fields[0]}: COLUMN}}`"
    return DataError(
        f"{record.where}: no column `{column}`; there are {_listed(record.fields)}",
        hint=hint.strip() or "correct `task.columns`, or drop the row",
    )


def _place(where: str) -> str:
    return where.rpartition(":")[0] or where


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


# Rows


@dataclass(frozen=True, slots=True)
class _Row:
    """A record seen through the columns of its format."""

    record: Record
    columns: Mapping[str, str]

    def error(self, message: str, *, hint: str | None = None) -> DataError:
        return DataError(f"{self.record.where}: {message}", hint=hint)

    def value(self, field: str) -> Any:
        column = self.columns.get(field, field)
        if column not in self.record.fields:
            raise _missing_column(self.record, column, fields=(field,))
        return self.record.fields[column]

    def optional(self, field: str) -> Any:
        return self.record.fields.get(self.columns.get(field, field))

    def text(self, field: str) -> str:
        return self.checked_text(self.value(field), f"field `{self.columns.get(field, field)}`")

    def checked_text(self, value: Any, name: str, *, may_be_empty: bool = False) -> str:
        if value is None:
            raise self.error(f"{name} is null", hint="fill it in, or drop the row")
        if not isinstance(value, str):
            raise self.error(f"{name} must be a text, not {_type_name(value)}")
        if not may_be_empty and not value.strip():
            raise self.error(f"{name} is empty", hint="fill it in, or drop the row")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise self.error(
                    f"{name} holds half a character (a lone surrogate), the {error.start + 1}th",
                    hint="it was cut in the middle of an escaped character; write the row again",
                ) from None
        return value


def _type_name(value: Any) -> str:
    names = {
        dict: "an object", list: "a list", bool: "true or false", int: "a number",
        float: "a number", str: "a text", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _label(row: _Row, *, needs_label: bool) -> str | None:
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
            hint="scores cannot be trained on; write them as classes, for example `low` and `high`",
        )
    if isinstance(value, list):
        raise row.error(
            f"field `{column}` is a list, and an example has exactly one label",
            hint="make one row of each label, or one class of each combination",
        )
    return row.checked_text(value, f"field `{column}`")


# Chat formats


def _openai_messages(row: _Row) -> list[Message]:
    column = row.columns.get("messages", "messages")
    turns = _turns(row, row.value("messages"), column)
    return [*_system(row, row.optional("system")), *turns]


def _sharegpt_messages(row: _Row) -> list[Message]:
    column = row.columns.get("conversations", "conversations")
    system = row.optional("system")
    turns = _turns(row, row.value("conversations"), column, sharegpt=True)
    return [*_system(row, system), *turns]


def _alpaca_messages(row: _Row) -> list[Message]:
    messages = _system(row, row.optional("system"))
    history = row.optional("history")
    if history is not None and not isinstance(history, list):
        raise row.error(
            f"field `history` must be a list of pairs, not {_type_name(history)}",
            hint="write `[[question, answer], ...]`",
        )
    for number, pair in enumerate(history or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(
                f"entry {number} of `history` must be a pair of question and answer",
                hint="write `[[question, answer], ...]`",
            )
        question, answer = (row.checked_text(text, f"entry {number} of `history`") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    prompt = row.text("instruction")
    extra = row.optional("input")
    if extra not in (None, ""):
        prompt += "\n\n" + row.checked_text(extra, "field `input`")
    messages.append(Message("user", prompt))
    if "output" in row.columns:
        messages.append(Message("assistant", row.text("output")))
    return messages


def _prompt_completion_messages(row: _Row) -> list[Message]:
    messages = _system(row, row.optional("system"))
    messages += _text_or_turns(row, "prompt", "user")
    if "completion" in row.columns:
        messages += _text_or_turns(row, "completion", "assistant")
    return messages


def _text_or_turns(row: _Row, field: str, role: Role) -> list[Message]:
    value = row.value(field)
    if isinstance(value, list):
        return _turns(row, value, row.columns.get(field, field))
    return [Message(role, row.text(field))]


def _system(row: _Row, text: Any) -> list[Message]:
    return (
        [] if text in (None, "") else [Message("system", row.checked_text(text, "field `system`"))]
    )


def _turns(row: _Row, turns: Any, column: str, *, sharegpt: bool = False) -> list[Message]:
    if not isinstance(turns, list):
        raise row.error(
            f"field `{column}` must be a list of turns, not {_type_name(turns)}",
            hint='write `[{"role": "user", "content": ...}, ...]`',
        )
    if not turns:
        raise row.error(f"field `{column}` holds no turns", hint="drop the row")
    if row.record.fields.get("tools"):
        raise row.error(
            "field `tools` defines tools, which cannot be trained on",
            hint="drop the column to train without them",
        )
    return [
        _turn(row, turn, f"turn {number} of `{column}`", sharegpt=sharegpt)
        for number, turn in enumerate(turns, start=1)
    ]


def _turn(row: _Row, turn: Any, name: str, *, sharegpt: bool) -> Message:
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    roles = _SHAREGPT_ROLES if sharegpt else _OPENAI_ROLES
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        found = _listed(turn) if isinstance(turn, dict) else _type_name(turn)
        if isinstance(turn, dict) and turn.get("tool_calls"):
            raise _refused(row, name, "tool_calls")
        raise row.error(
            f"{name} must have `{role_key}` and `{text_key}`; it has {found}",
            hint="correct the turn, or drop the row",
        )
    for key in _REFUSED_PARTS:
        if turn.get(key):
            raise _refused(row, name, key)
    if turn.get("weight") not in (None, 1):
        raise row.error(
            f"{name} has `weight` {turn['weight']}; every assistant turn is trained alike",
            hint="drop the row, or the key `weight` to train the turn",
        )
    if turn[role_key] == "function_call":
        raise _refused(row, name, "function_call")
    role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        near = near_names(str(turn[role_key]), roles)
        raise row.error(
            f"{name} has the unknown role `{turn[role_key]}`",
            hint=(f"did you mean `{near[0]}`? " if near else "") + f"possible are {_listed(roles)}",
        )
    # A tool may answer nothing, and an empty system turn says "no system prompt" to most templates.
    may_be_empty = role in ("system", "tool")
    text = row.checked_text(
        _joined_parts(row, turn[text_key], name), f"{name} (`{role}`)", may_be_empty=may_be_empty
    )
    return Message(role, text)


def _refused(row: _Row, name: str, key: str) -> DataError:
    return row.error(
        f"{name} holds `{key}`: {_REFUSED_PARTS[key]} cannot be trained on",
        hint="write it into the text of the turn, or drop the row",
    )


def _joined_parts(row: _Row, content: Any, name: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise row.error(
                f"{name} holds a part of type `{kind}`; only texts can be trained on",
                hint="drop the row",
            )
        texts.append(part["text"])
    return "".join(texts)


_LAYOUTS: dict[str, _Layout] = {
    "messages": _Layout(
        kind="chat",
        fields=("messages",),
        answer=None,
        optional_fields=("system",),
        description="OpenAI messages: {messages} is a list of turns with `role` and `content`",
        messages=_openai_messages,
    ),
    "sharegpt": _Layout(
        kind="chat",
        fields=("conversations",),
        answer=None,
        optional_fields=("system",),
        description="ShareGPT: {conversations} is a list of turns with `from` and `value`",
        messages=_sharegpt_messages,
    ),
    "alpaca": _Layout(
        kind="chat",
        fields=("instruction", "output"),
        answer="output",
        optional_fields=("input", "history", "system"),
        description="Alpaca: the prompt is {instruction} and, where `input` is not empty, "
        "a blank line and `input`; the answer is {output}",
        messages=_alpaca_messages,
    ),
    "prompt_completion": _Layout(
        kind="chat",
        fields=("prompt", "completion"),
        answer="completion",
        optional_fields=("system",),
        description="prompt and completion: {prompt} is the user's turn, or a list of turns; "
        "{completion} is the assistant's",
        messages=_prompt_completion_messages,
    ),
    "text": _Layout(
        kind="text",
        fields=("text",),
        answer=None,
        optional_fields=(),
        description="plain text: {text} is a document",
    ),
    "classification": _Layout(
        kind="classification",
        fields=("text", "label"),
        answer="label",
        optional_fields=("text_pair",),
        description="classification: {text}, with `text_pair` where there is one, has one {label}",
    ),
}
