"""Files, folders, assets and Hub data sets as a stream of rows, each knowing its file and line.

What a row means is the business of `formats.py`. Memory stays flat: nothing here holds a file.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet

from fulltune.assets import fetch, find_asset, list_assets
from fulltune.data.plain_text import bounded_lines, split_documents
from fulltune.errors import DataError, MissingExtraError

STANDARD_INPUT = "-"
ASSET_PREFIX = "asset:"
HUB_PREFIX = "hub:"

# A longer plain text is cut into documents at paragraphs, so that it is never held as a whole.
TEXT_DOCUMENT_CHARACTERS = 4 * 2**20

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row."""

    fields: dict[str, Any]
    where: str
    """File and line as the user named it, ``data/train.jsonl:17``; a row if it has no lines."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str
    suffix: str
    compression: str | None

    def open(self) -> BinaryIO:
        if self.compression is None:
            return self.path.open("rb")
        compressed = pa.CompressedInputStream(pa.OSFile(str(self.path)), self.compression)
        return io.BufferedReader(compressed, _READ_BYTES)

    def open_text(self, *, newline: str | None = None) -> IO[str]:
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", newline=newline)

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
    """Longest document in characters; null leaves lines and documents as long as they are."""


WHOLE_FILES = TextReading()


def read_records(
    source: str, *, limit: int | None = None, reading: TextReading = WHOLE_FILES
) -> Iterator[Record]:
    """Rows of a source in a fixed order, one at a time.

    Args:
        source: a file, a folder (its files of known formats, sorted; plain text only where there is
            nothing else, so that a README is not data), `asset:NAME`, `hub:OWNER/NAME[:SPLIT]`, a
            folder saved by `datasets`, or `-` for JSON Lines from standard input.
        limit: stop after so many rows.
        reading: how plain text is cut into documents.

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    return itertools.islice(_read_source(source, reading), limit)


def check_source(source: str) -> None:
    """Refuse a source that cannot be there, before anything slow is begun or fetched.

    Raises:
        DataError: no such file, or none of a known format.
        AssetError: no such asset.
    """
    if source.startswith(ASSET_PREFIX):
        _find_data_asset(source)
    elif source == STANDARD_INPUT:
        source_fingerprint(source)
    elif not _is_datasets_source(source):
        _list_files(source)


def source_fingerprint(source: str) -> str:
    """Hash of the content of a source, wherever it lies; for a file what `b2sum -l 256` prints."""
    if source == STANDARD_INPUT:
        raise DataError(
            "standard input `-` can be read only once, and data for training is read again",
            hint="save it to a .jsonl file and name that file",
        )
    if _is_datasets_source(source):
        paths = sorted(Path(entry["filename"]) for entry in _load_datasets(source).cache_files)
        return _hash_text("\n".join(_hash_file(path) for path in paths))
    files = _list_files(source)
    root = _local_path(source)
    if root.is_file():
        return _hash_file(root)
    lines = (f"{_hash_file(file.path)} {file.path.relative_to(root).as_posix()}" for file in files)
    return _hash_text("\n".join(lines))


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return digest.hexdigest()


def _read_source(source: str, reading: TextReading) -> Iterator[Record]:
    if source == STANDARD_INPUT:
        rows: Iterable[tuple[int, dict[str, Any]]] = _parse_jsonl(
            sys.stdin.buffer, "standard input"
        )
        yield from _named_rows("standard input", rows)
    elif _is_datasets_source(source):
        yield from _named_rows(source, _read_datasets(source))
    else:
        for file in _list_files(source):
            yield from _named_rows(file.name, _read_file(file, reading))


def _named_rows(name: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Record]:
    empty = True
    for line, fields in rows:
        empty = False
        yield Record(fields, f"{name}:{line}")
    if empty:
        raise DataError(
            f"`{name}` is empty: it holds no records", hint="was it written completely?"
        )


# Where the files are


def _local_path(source: str) -> Path:
    if source.startswith(ASSET_PREFIX):
        return fetch(_find_data_asset(source))
    return Path(source).expanduser()


def _find_data_asset(source: str) -> str:
    asset = find_asset(source)
    if asset.kind != "data":
        names = (f"`{ASSET_PREFIX}{other.name}`" for other in list_assets() if other.kind == "data")
        raise DataError(f"`{source}` is a model, not data", hint=f"data are {', '.join(names)}")
    return asset.name


def _list_files(source: str) -> list[_File]:
    if "://" in source:
        raise DataError(
            f"`{source}` is an address, and data is read from files",
            hint="download it, or name a Hub data set as `hub:OWNER/NAME`",
        )
    path = _local_path(source)
    if path.is_dir():
        return _list_folder(path, source.rstrip("/"))
    if not path.exists():
        raise _missing(path)
    file = _recognise_file(path, source)
    if file is None:
        raise DataError(
            f"`{source}`: the suffix `{path.suffix}` is not a known data format",
            hint=f"known are {_known_suffixes()}",
        )
    return [file]


def _list_folder(folder: Path, name: str) -> list[_File]:
    if (folder / "manifest.json").is_file() and (folder / "train" / "train-00000.arrow").is_file():
        raise DataError(
            f"`{name}` is a prepared corpus, which holds training and validation apart",
            hint=f"name one: `{name}/train` or `{name}/validation`",
        )
    files = []

    def refuse(error: OSError) -> None:
        raise _unreadable(str(error.filename), error)

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        for entry in sorted(names):
            path = Path(parent, entry)
            file = _recognise_file(path, f"{name}/{path.relative_to(folder).as_posix()}")
            if file is not None and not entry.startswith("."):
                files.append(file)
    tables = [file for file in files if file.suffix not in _PLAIN_TEXT]
    if not files:
        raise DataError(
            f"folder `{name}` holds no data file", hint=f"known are {_known_suffixes()}"
        )
    return sorted(tables or files, key=lambda file: file.name)


def _recognise_file(path: Path, name: str) -> _File | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _READERS:
        return None
    return _File(path, name, suffixes[-1], compression)


def _known_suffixes() -> str:
    return f"{', '.join(_READERS)}, each also with {' or '.join(_COMPRESSIONS)} behind it"


def _missing(path: Path) -> DataError:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return DataError(
            f"`{path}` does not exist, nor does its folder `{path.parent}`",
            hint=f"`{folder.resolve()}` is the nearest folder that does",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return DataError(f"`{path}` does not exist", hint=f"did you mean {_listed(near)}?")
    data = [name for name in names if _recognise_file(Path(name), name) is not None]
    found = f"data files there: {_listed(data[:8])}" if data else "there is no data file"
    return DataError(f"`{path}` does not exist", hint=f"looked in `{folder.resolve()}`; {found}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Formats of files


def _read_file(file: _File, reading: TextReading) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if file.suffix in _PLAIN_TEXT and reading.boundary != WHOLE_FILES.boundary:
            with file.open_text() as text:
                yield from split_documents(
                    text, reading.boundary, longest=reading.longest, name=file.name
                )
        elif file.suffix in _JSON_LINES and reading.longest is not None:
            # An escaped character takes up to twelve bytes; other columns may stand beside a text.
            most_bytes = 12 * reading.longest + _READ_BYTES
            with file.open() as stream:
                yield from _parse_jsonl(bounded_lines(stream, most_bytes, file.name), file.name)
        else:
            yield from _READERS[file.suffix](file)
    except UnicodeDecodeError:
        with file.open() as stream:
            raise _bad_encoding(file.name, stream) from None
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.name, error, compressed=file.compression) from error


def _unreadable(name: str, error: Exception, *, compressed: str | None = None) -> DataError:
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


def _bad_encoding(name: str, stream: BinaryIO) -> DataError:
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, num_before = 1, 0  # bytes of this line in the pieces before: a line may be huge
    while True:
        piece = stream.readline(_READ_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            return _bad_line(name, number, error.object, error, num_before=num_before - pending)
        assert piece, f"{name} was undecodable a moment ago"
        num_before += len(piece)
        if piece.endswith(b"\n"):
            number, num_before = number + 1, 0


def _bad_line(
    name: str, number: int, line: bytes, error: UnicodeDecodeError, *, num_before: int = 0
) -> DataError:
    byte = num_before + error.start + 1
    wide = (number, byte) == (1, 1) and line[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if wide else "WINDOWS-1252"
    found = "it begins like UTF-16" if wide else f"byte {byte} is 0x{line[error.start]:02x}"
    return DataError(
        f"{name}:{number}: not UTF-8: {found}",
        hint="convert it, for example "
        f"`iconv -f {encoding} -t UTF-8 {name} > utf8-{Path(name).name}`",
    )


def _read_jsonl(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open() as stream:
        yield from _parse_jsonl(stream, file.name)


def _parse_jsonl(stream: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _bad_line(name, number, line, error) from None
        if not text.strip():
            continue
        try:
            value = json.loads(text.rstrip())
        except (ValueError, RecursionError) as error:
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

    def __init__(self, stream: IO[str], name: str) -> None:
        self._stream = stream
        self._name = name
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
                self._position = end
                return value


def _read_json(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_text() as stream:
        text = _JsonText(stream, file.name)
        if not text.peek():
            return
        if text.take("[", "{") == "[":
            yield from _read_json_list(text, file.name)
        else:
            yield from _read_json_data(text, file.name)
        if text.peek():
            raise DataError(
                f"{file.name}:{text.line}: something follows the end of the JSON value",
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
        raise DataError(
            f"`{name}` holds one object ({_listed(map(str, keys))}), not a list of records",
            hint='a .json file is a list or {"data": [...]}; one object a line is .jsonl',
        )


def _read_csv(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a document is often longer than the default of 128 KiB
    with file.open_text(newline="") as stream:
        reader = csv.reader(stream, strict=True)
        yield from _rows_by_header(file.name, _csv_rows(file.name, reader))


def _csv_rows(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}:{line}: not CSV: {error}",
                hint='quote fields that hold `"`, commas or line breaks; double each `"` in them',
            ) from None
        if row is None:
            return
        if row:
            yield line, row


def _read_tsv(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tab-separated values know no quotes (IANA text/tab-separated-values): `"` is a character."""
    with file.open_text() as stream:
        lines = ((number, line.rstrip("\n")) for number, line in enumerate(stream, start=1))
        rows = ((number, line.split("\t")) for number, line in lines if line)
        yield from _rows_by_header(file.name, rows)


def _rows_by_header(
    name: str, rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    _, header = next(rows, (0, []))
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(
            f"{name}:1: the header names {_listed(repeated)} more than once",
            hint="give every column its own name",
        )
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{name}:{line}: {len(row)} columns, but the header has {len(header)} "
                f"({_listed(header)})",
                hint="a field that holds the separator or a line break must be quoted, and a .tsv "
                "cannot hold one at all: save it as .csv or .jsonl",
            )
        yield line, dict(zip(header, row, strict=True))


def _read_text(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file is one document; a long one is cut at paragraphs, losing no character."""
    line, pending = 1, ""
    with file.open_text() as stream:
        while block := stream.read(TEXT_DOCUMENT_CHARACTERS):
            pending += block
            if len(pending) <= TEXT_DOCUMENT_CHARACTERS:
                continue
            document, pending = _cut_at_paragraph(pending)
            yield line, {"text": document}
            line += document.count("\n")
    if pending.strip():
        yield line, {"text": pending}


def _cut_at_paragraph(text: str) -> tuple[str, str]:
    for boundary in ("\n\n", "\n", " "):
        end = text.rfind(boundary)
        if end > 0:
            end += len(boundary)
            return text[:end], text[end:]
    return text, ""


def _read_parquet(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_seekable() as stream:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS)
        yield from _numbered_rows(batches)


def _read_arrow(file: _File) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open_seekable() as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            yield from _numbered_rows(pa.ipc.open_stream(stream))
            return
        reader = pa.ipc.open_file(stream)
        yield from _numbered_rows(reader.get_batch(i) for i in range(reader.num_record_batches))


def _numbered_rows(batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    slices = (
        batch.slice(start, _BATCH_ROWS)
        for batch in batches
        for start in range(0, batch.num_rows, _BATCH_ROWS)
    )
    return enumerate(itertools.chain.from_iterable(part.to_pylist() for part in slices), start=1)


_Reader = Callable[[_File], Iterator[tuple[int, dict[str, Any]]]]

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
    ".txt": _read_text,
    ".md": _read_text,
}


_PLAIN_TEXT = (".txt", ".md")
_JSON_LINES = (".jsonl", ".ndjson")


# Data sets of the `datasets` package


def _is_datasets_source(source: str) -> bool:
    if source.startswith(HUB_PREFIX):
        return True
    if "://" in source or source.startswith(ASSET_PREFIX):
        return False
    folder = _local_path(source)
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def _load_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"`{source}` is read with the package `datasets`, which is not installed",
            hint="pip install 'fulltune[hub]'",
        ) from None
    if not source.startswith(HUB_PREFIX):
        return _load_saved(source, datasets)
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    # The package raises OSError for what it does not find or reach, ValueError for a wrong split.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"`{source}` cannot be loaded: {reason}",
            hint="the form is `hub:OWNER/NAME` or `hub:OWNER/NAME:SPLIT`",
        ) from error


def _load_saved(source: str, datasets: Any) -> Any:
    path = _local_path(source)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in path.glob("*/dataset_info.json"))
        folder = source.rstrip("/")
        raise DataError(
            f"`{source}` holds several splits",
            hint=f"name one: {_listed(f'{folder}/{split}' for split in splits)}",
        )
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(source, error) from error


def _read_datasets(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    dataset = _load_datasets(source)
    names = {
        column: feature.names
        for column, feature in dataset.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, row in enumerate(dataset, start=1):
        for column, labels in names.items():
            code = row[column]
            # -1 is how these data sets write "no label", as in hidden test sets.
            row[column] = None if code is None or code < 0 else labels[code]
        yield number, row
