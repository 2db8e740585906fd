"""The rows of one file, in the format that its suffix names, with the line of each."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet

from fulltune.data.binary import ESCAPE_BYTES, UNREADABLE, has_escaped_bytes, is_binary_row
from fulltune.data.conll import read_conll
from fulltune.data.json_rows import parse_json, parse_json_lines
from fulltune.data.plain_text import bounded_lines, split_documents, whole_text
from fulltune.data.squad_json import flatten_questions
from fulltune.data.utf8 import bad_encoding
from fulltune.errors import DataError, listed

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20
_BATCH_ROWS = 1024

LONGEST_LINE = 2**26
"""Most bytes, or characters, of one row of a file that is read line by line. Ten times all of
Shakespeare: a longer one is a whole corpus without line ends, or no text at all."""
LONG_LINE_HINT = "write one document a row, or save the text as .txt, which is read in parts"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a known format."""

    path: Path
    name: str
    """As the user named it, for messages."""
    suffix: str
    """Of its format, without that of its compression."""
    compression: str | None
    keep_binary: bool = False
    """Whether rows that are no text are given too, their bytes escaped, and not an error."""

    @property
    def is_plain_text(self) -> bool:
        """Whether it is text without fields."""
        return self.suffix in _PLAIN_TEXT

    def open(self) -> BinaryIO:
        """Its content, decompressed."""
        if self.compression is None:
            return self.path.open("rb")
        compressed = pa.CompressedInputStream(pa.OSFile(str(self.path)), self.compression)
        return io.BufferedReader(compressed, _READ_BYTES)

    def open_text(self, *, newline: str | None = None) -> IO[str]:
        """Its content as UTF-8."""
        errors = ESCAPE_BYTES if self.keep_binary else "strict"
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", errors=errors, newline=newline)

    def open_seekable(self) -> BinaryIO:
        """Columnar files are read from their end, which a compressed stream cannot do."""
        if self.compression is None:
            return self.open()
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        with self.open() as stream:
            shutil.copyfileobj(stream, unpacked, _READ_BYTES)
        unpacked.seek(0)
        return cast(BinaryIO, unpacked)


@dataclass(frozen=True, slots=True)
class TextReading:
    """How plain text is cut into documents, and how much of any file is held at once."""

    boundary: str = "file"
    """What ends a document: `file`, `blank_line`, `line`, or the text of a line between them."""
    longest: int | None = None
    """Longest document in characters; null has no limit but `LONGEST_LINE`."""
    keep_binary: bool = False
    """Give documents that are no text too, to be counted; a plain text that is one document, and
    is not UTF-8, stays an error."""


WHOLE_FILES = TextReading()


def recognise_file(path: Path, name: str) -> DataFile | None:
    """A file by its suffixes; None where the format is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _READERS:
        return None
    return DataFile(path, name, suffixes[-1], compression)


def known_suffixes() -> str:
    """The suffixes of all formats, for messages."""
    return f"{', '.join(_READERS)}, each also with {' or '.join(_COMPRESSIONS)} behind it"


def read_file(file: DataFile, reading: TextReading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with the line of each, or its number in files that have no lines.

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    whole = file.is_plain_text and reading.boundary == WHOLE_FILES.boundary
    file = replace(file, keep_binary=reading.keep_binary and not whole)
    try:
        if file.is_plain_text and reading.boundary != WHOLE_FILES.boundary:
            with file.open_text() as text:
                yield from split_documents(
                    text, reading.boundary, longest=reading.longest, name=file.name
                )
        elif file.suffix in _JSON_LINES and reading.longest is not None:
            # An escaped character takes up to twelve bytes; other columns may stand beside a text.
            most_bytes = 12 * reading.longest + _READ_BYTES
            with file.open() as stream:
                lines = bounded_lines(stream, most_bytes, file.name)
                yield from parse_json_lines(lines, file.name, keep_binary=file.keep_binary)
        else:
            yield from _READERS[file.suffix](file)
    except UnicodeDecodeError:
        with file.open() as stream:
            raise bad_encoding(file.name, stream) from None
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file.name, error, compressed=file.compression) from error


def unreadable(name: str, error: Exception, *, compressed: str | None = None) -> DataError:
    """The error of a file that cannot be opened, or is not of its format."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(
            f"`{name}` cannot be read: {reason}", hint="check the file and its permissions"
        )
    expected = f"{compressed} file" if compressed else "file of its format"
    return DataError(
        f"`{name}` is not a whole {expected}: {reason}",
        hint="it is cut off, damaged or of another format; copy or download it again",
    )


def row_lines(stream: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """The lines of a file of rows.

    Raises:
        DataError: one is longer than `LONGEST_LINE`; it is not held.
    """
    return bounded_lines(stream, LONGEST_LINE, name, hint=LONG_LINE_HINT)


def _read_jsonl(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open() as stream:
        lines = row_lines(stream, file.name)
        yield from parse_json_lines(lines, file.name, keep_binary=file.keep_binary)


def _read_json(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_text() as stream:
        rows = parse_json(stream, file.name, keep_binary=file.keep_binary)
        yield from flatten_questions(rows, file.name)


def _read_csv(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a document is often longer than the default of 128 KiB
    with file.open_text(newline="") as stream:
        read: list[str] = []
        reader = csv.reader(_noting(row_lines(stream, file.name), read), strict=True)
        yield from _rows_by_header(file, _csv_rows(file, reader, read))


def _noting(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    for line in lines:
        read.append(line)
        yield line


def _csv_rows(file: DataFile, reader: Any, read: list[str]) -> Iterator[tuple[int, list[str]]]:
    while True:
        line = reader.line_num + 1
        read.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            if file.keep_binary and is_binary_row("".join(read)):
                yield line, ["".join(read)]
                continue
            raise DataError(
                f"{file.name}:{line}: not CSV: {error}",
                hint='quote fields that hold `"`, commas or line breaks; double each `"` in them',
            ) from None
        if row is None:
            return
        if row:
            yield line, row


def _read_tsv(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tab-separated values know no quotes (IANA text/tab-separated-values): `"` is a character."""
    with file.open_text() as stream:
        numbered = enumerate(row_lines(stream, file.name), start=1)
        lines = ((number, line.rstrip("\n")) for number, line in numbered)
        rows = ((number, line.split("\t")) for number, line in lines if line)
        yield from _rows_by_header(file, rows)


def _rows_by_header(
    file: DataFile, rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    name = file.name
    _, header = next(rows, (0, []))
    if has_escaped_bytes("".join(header)):
        with file.open() as stream:
            raise bad_encoding(name, stream)
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(
            f"{name}:1: the header names {listed(repeated)} more than once",
            hint="give every column its own name",
        )
    for line, row in rows:
        if len(row) != len(header):
            if file.keep_binary and is_binary_row(whole := "\t".join(row)):
                yield line, {UNREADABLE: whole}
                continue
            raise DataError(
                f"{name}:{line}: {len(row)} columns, but the header has {len(header)} "
                f"({listed(header)})",
                hint="a field that holds the separator or a line break must be quoted, and a .tsv "
                "cannot hold one at all: save it as .csv or .jsonl",
            )
        yield line, dict(zip(header, row, strict=True))


def _read_text(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_text() as stream:
        yield from whole_text(stream)


def _read_conll(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_text() as stream:
        yield from read_conll(row_lines(stream, file.name), file.name)


def _read_parquet(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_seekable() as stream:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS)
        yield from _numbered_rows(file, batches)


def _read_arrow(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_seekable() as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            yield from _numbered_rows(file, pa.ipc.open_stream(stream))
            return
        reader = pa.ipc.open_file(stream)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _numbered_rows(file, batches)


def _numbered_rows(file: DataFile, batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:  # nothing sees to it that a column of text is UTF-8
                rows = _rows_with_escaped_bytes(file, part, number + 1)
            for row in rows:
                number += 1
                yield number, row


def _rows_with_escaped_bytes(file: DataFile, part: Any, first: int) -> list[dict[str, Any]]:
    columns = {name: _escaped(part.column(name)) for name in part.schema.names}
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for number, row in enumerate(rows, start=first):
        for name, value in row.items():
            if isinstance(value, str) and has_escaped_bytes(value) and not file.keep_binary:
                raise DataError(
                    f"{file.name}:{number}: `{name}` is not UTF-8",
                    hint="write the table again with this row's text as UTF-8, or without the row",
                )
    return rows


def _escaped(column: Any) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return cast(list[Any], column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", ESCAPE_BYTES) for value in values]


_Reader = Callable[[DataFile], Iterator[tuple[int, dict[str, Any]]]]

_READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".ipc": _read_arrow,
    ".feather": _read_arrow,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".txt": _read_text,
    ".md": _read_text,
}


_PLAIN_TEXT = (".txt", ".md")
_JSON_LINES = (".jsonl", ".ndjson")
