"""Rows of JSON Lines and of JSON, of which only the one being read is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from fulltune.data.binary import ESCAPE_BYTES, UNREADABLE, is_binary_row, with_distinct_halves
from fulltune.data.utf8 import bad_line
from fulltune.errors import DataError

_READ_BYTES = 2**20


def parse_json_lines(
    stream: Iterable[bytes], name: str, *, keep_binary: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of JSON Lines with the line of each; blank lines are none.

    Args:
        stream: the lines.
        name: the file, for messages.
        keep_binary: give rows that are no text too, their bytes escaped.

    Raises:
        DataError: a line is not UTF-8, not JSON or no object.
    """
    for number, line in enumerate(stream, start=1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            text = line.decode(encoding, ESCAPE_BYTES if keep_binary else "strict")
        except UnicodeDecodeError as error:
            raise bad_line(name, number, line, error) from None
        if not text.strip():
            continue
        try:
            value = json.loads(
                with_distinct_halves(text.rstrip()) if keep_binary else text.rstrip()
            )
        except (ValueError, RecursionError) as error:
            if keep_binary and is_binary_row(text):
                yield number, {UNREADABLE: text}
                continue
            raise _bad_json(f"{name}:{number}", text, error) from None
        yield number, _checked_object(value, f"{name}:{number}")


def _bad_json(where: str, text: str, error: ValueError | RecursionError) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return DataError(
            f"{where}: not readable as JSON: {error}",
            hint="JSON Lines holds one whole object on each line",
        )
    start = max(0, error.pos - 40)
    excerpt = text[start : error.pos + 20].strip().replace("\n", " ")
    return DataError(
        f"{where}: not JSON: {error.msg} at column {error.colno}, near `{excerpt}`",
        hint="JSON Lines holds one whole object on each line",
    )


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    shown = json.dumps(value)
    excerpt = shown if len(shown) <= 40 else shown[:40] + "…"
    raise DataError(
        f"{where}: a record must be an object with named fields, not `{excerpt}`",
        hint='write it as `{"text": …}` or the like',
    )


class _JsonText:
    """A long JSON text, of which only the value being read is in memory."""

    def __init__(self, stream: IO[str], name: str, *, keep_binary: bool) -> None:
        self._stream = stream
        self._name = name
        self._keep_binary = keep_binary
        self._buffer = ""
        self._position = 0
        self._lines_before = 1
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        return self._line_at(self._position)

    def _line_at(self, position: int) -> int:
        return self._lines_before + self._buffer.count("\n", 0, position)

    def _fill(self) -> bool:
        self._lines_before = self.line
        rest = self._buffer[self._position :]
        # Twice what is there, so that one huge value is not parsed anew for every block of it.
        block = self._stream.read(max(_READ_BYTES, 2 * len(rest)))
        self._buffer, self._position = rest + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if not character.isspace():
                    return character
                self._position += 1
            if not self._fill():
                return ""

    def take(self, *expected: str) -> str:
        found = self.peek()
        if found not in expected or not found:
            wanted = " or ".join(f"`{character}`" for character in expected)
            raise DataError(
                f"{self._name}:{self.line}: not JSON: {wanted} expected, "
                f"found {f'`{found}`' if found else 'the end of the file'}",
                hint="a .json file holds one list of objects; one object a line is a .jsonl file",
            )
        self._position += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # A value cut off by the buffer's end fails near it, or in a string begun earlier.
                cut = error.pos >= len(self._buffer) - 16 or error.msg.startswith("Unterminated")
                if not (cut and self._fill()):
                    where = f"{self._name}:{self._line_at(error.pos)}"
                    raise _bad_json(where, self._buffer, error) from None
            except (ValueError, RecursionError) as error:
                raise _bad_json(f"{self._name}:{self.line}", "", error) from None
            else:
                if end == len(self._buffer) and self._fill():
                    continue  # a number may go on
                if self._keep_binary:
                    written = self._buffer[self._position : end]
                    distinct = with_distinct_halves(written)
                    value = value if distinct == written else self._decoder.decode(distinct)
                self._position = end
                return value


def parse_json(
    stream: IO[str], name: str, *, keep_binary: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON file, a list or ``{"data": [...]}``, with the line each begins at.

    Args:
        stream: the text.
        name: the file, for messages.
        keep_binary: whether the bytes of rows that are no text are escaped in it.

    Raises:
        DataError: it is neither, or a row is no object.
    """
    text = _JsonText(stream, name, keep_binary=keep_binary)
    if not text.peek():
        return
    if text.take("[", "{") == "[":
        yield from _read_json_list(text, name)
    else:
        yield from _read_json_data(text, name)
    if text.peek():
        raise DataError(
            f"{name}:{text.line}: something follows the end of the JSON value",
            hint="one object a line is a .jsonl file; rename it",
        )


def _read_json_list(text: _JsonText, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.peek()
        line = text.line
        yield line, _checked_object(text.value(), f"{name}:{line}")
        if text.take(",", "]") == "]":
            return


def _read_json_data(text: _JsonText, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of ``{"data": [...]}``, whatever other keys stand beside it."""
    keys = []
    while text.peek() != "}":
        keys.append(text.value())
        text.take(":")
        if keys[-1] == "data" and text.peek() == "[":
            text.take("[")
            yield from _read_json_list(text, name)
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if "data" not in keys:
        found = ", ".join(f"`{key}`" for key in keys)
        raise DataError(
            f"`{name}` holds one object ({found}), not a list of records",
            hint='a .json file is a list or {"data": [...]}; one object a line is .jsonl',
        )
