"""One row seen through the columns of its format, and the errors of what it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.data.records import Record
from fulltune.errors import DataError, near_names
from fulltune.errors import listed as listed


@dataclass(frozen=True, slots=True)
class Row:
    """A record seen through the columns of its format."""

    record: Record
    columns: Mapping[str, str]

    def error(self, message: str, *, hint: str | None = None) -> DataError:
        """An error that names the row's file and line."""
        return DataError(f"{self.record.where}: {message}", hint=hint)

    def value(self, field: str) -> Any:
        """A field that must be there, whatever it holds; raises DataError without it."""
        column = self.columns.get(field, field)
        if column not in self.record.fields:
            raise missing_column(self.record, column, fields=(field,))
        return self.record.fields[column]

    def optional(self, field: str) -> Any:
        """A field, or None without it."""
        return self.record.fields.get(self.columns.get(field, field))

    def text(self, field: str) -> str:
        """A field that must be a text and not empty; raises DataError otherwise."""
        return self.checked_text(self.value(field), f"field `{self.columns.get(field, field)}`")

    def checked_text(self, value: Any, name: str, *, may_be_empty: bool = False) -> str:
        """The value itself where it is a text that can be trained on, else DataError."""
        if value is None:
            raise self.error(f"{name} is null", hint="fill it in, or drop the row")
        if not isinstance(value, str):
            raise self.error(f"{name} must be a text, not {type_name(value)}")
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


def type_name(value: Any) -> str:
    """What JSON calls a value."""
    names = {
        dict: "an object", list: "a list", bool: "true or false", int: "a number",
        float: "a number", str: "a text", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def missing_column(record: Record, column: str, *, fields: Sequence[str] = ()) -> DataError:
    """The error of a row without a column, with the name that may have been meant."""
    near = near_names(column, record.fields)
    hint = f"did you mean `{near[0]}`? " if near else ""
    if column in fields:
        found = near[0] if near else "COLUMN"
        hint += f"map another name with `task.columns={{{column}: {found}}}`"
    elif len(fields) == 1 and not near:
        hint += f"correct `task.columns={{{fields[0]}: COLUMN}}`"
    return DataError(
        f"{record.where}: no column `{column}`; there are {listed(record.fields)}",
        hint=hint.strip() or "correct `task.columns`, or drop the row",
    )
