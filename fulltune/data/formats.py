"""Rows in the formats of the field -> examples: which format a source has, and what a row of it is.

How conversations are read stands in `chat_formats.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fulltune.data.layouts import LAYOUTS, Layout
from fulltune.data.records import Record
from fulltune.data.rows import Row, listed, missing_column
from fulltune.data.tag_formats import (
    cut_at_spaces,
    in_iob2,
    recut,
    scheme_of_rows,
)
from fulltune.data.tags import TagScheme, scheme_name
from fulltune.data.tasks import (
    Example,
    TaggingExample,
    TaskConfig,
    TaskKind,
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
    tag_scheme: TagScheme | None = None
    """What tags are written in, where there are any."""
    words_at_spaces: bool = False
    """Tagging: whether words were cut from texts at spaces alone, or texts are to be."""


def recognise_format(
    records: Sequence[Record],
    config: TaskConfig,
    *,
    needs_label: bool = True,
    words_at_spaces: bool = False,
) -> RecordFormat:
    """The format that all of the first rows have.

    Args:
        records: the first rows of one source; at least one.
        config: `kind` says which formats are possible; `format` and `columns` narrow them.
        needs_label: False in prediction, where answers and labels may be missing.
        words_at_spaces: prediction by a tagger: what `RecordFormat.words_at_spaces` was of its
            training data.

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
        description = _describe(possible[name], columns)
        scheme = None
        if config.kind == "token_classification" and needs_label:
            rows = [Row(record, columns) for record in records]
            scheme = scheme_of_rows(rows, config, name=name)
            description += f"; tags are {scheme_name(scheme)}"
            words_at_spaces = name == "words" and cut_at_spaces(rows)
        return RecordFormat(name, columns, description, scheme, words_at_spaces)
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
    assert LAYOUTS[format.name].kind == kind, f"{format.name} is no format of kind {kind}"
    columns = dict(format.columns)
    answer = LAYOUTS[format.name].answer
    if answer is not None and not needs_label:
        # A test set often has the column and leaves it empty.
        column = columns.get(answer, answer)
        if record.fields.get(column) in (None, ""):
            columns.pop(answer, None)
    example = LAYOUTS[format.name].example(Row(record, columns), needs_label)
    if format.tag_scheme is not None and isinstance(example, TaggingExample):
        return in_iob2(example, format.tag_scheme)
    if format.words_at_spaces and isinstance(example, TaggingExample):
        return recut(example)
    return example


# Recognition


def _possible_layouts(config: TaskConfig) -> dict[str, Layout]:
    possible = {name: layout for name, layout in LAYOUTS.items() if layout.kind == config.kind}
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


def _needed(layout: Layout, *, needs_label: bool) -> list[str]:
    return [field for field in layout.fields if needs_label or field != layout.answer]


def _fits(
    name: str, layout: Layout, record: Record, columns: Mapping[str, str], *, needs_label: bool
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
    return all(_column(layout, field, record, columns) in record.fields for field in needed)


def _column(layout: Layout, field: str, record: Record, columns: Mapping[str, str]) -> str:
    """The column of a field: that which is asked for, or one of its names that the row has."""
    if field in columns:
        return columns[field]
    names = (field, *layout.other_names.get(field, ()))
    return next((name for name in names if name in record.fields), field)


def _turns_column(name: str, record: Record, columns: Mapping[str, str]) -> str:
    """Either style of turns is found under either name in the wild."""
    field = LAYOUTS[name].fields[0]
    if field in columns:
        return columns[field]
    names = (field, "messages", "conversations", "conversation")
    return next((column for column in names if column in record.fields), field)


def _columns(
    layout: Layout, records: Sequence[Record], config: TaskConfig, *, needs_label: bool
) -> dict[str, str]:
    if layout.fields[0] in ("messages", "conversations"):
        name = "messages" if layout.fields[0] == "messages" else "sharegpt"
        columns = {layout.fields[0]: _turns_column(name, records[0], config.columns)}
    else:
        columns = {
            field: _column(layout, field, records[0], config.columns)
            for field in _needed(layout, needs_label=needs_label)
        }
    for field in (*layout.fields, *layout.optional_fields):
        if field in layout.keys:
            columns |= {field: config.columns[field]} if field in config.columns else {}
            continue
        column = _column(layout, field, records[0], config.columns)
        asked = field in config.columns and field != layout.answer
        there = any(column in record.fields for record in records)
        if asked and not there and needs_label:
            raise missing_column(records[0], column, fields=(field,))
        if asked or (there and field not in columns):
            columns[field] = column
    return columns


def _describe(layout: Layout, columns: Mapping[str, str]) -> str:
    description = layout.description.format(**{field: f"`{field}`" for field in layout.fields})
    renamed = [
        f"`{ours}` is column `{theirs}`" for ours, theirs in columns.items() if ours != theirs
    ]
    return "; ".join([description, *renamed])


def _unrecognised(
    records: Sequence[Record],
    possible: Mapping[str, Layout],
    config: TaskConfig,
    *,
    needs_label: bool,
) -> DataError:
    for layout in possible.values():
        for record in records:
            missing = [
                _column(layout, field, record, config.columns)
                for field in _needed(layout, needs_label=needs_label)
                if _column(layout, field, record, config.columns) not in record.fields
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
    record: Record, possible: Mapping[str, Layout], *, needs_label: bool
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
        layout = LAYOUTS[name]
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
