"""Files of encoded examples, each written as a whole and named after its content."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulltune.data.encoding import EncodedExample
from fulltune.errors import DataError

# Changes whenever the columns below, or what is written in them, change.
FORMAT_VERSION = 6

_STALE_SECONDS = 3600.0

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "targets": pa.list_(pa.uint8()),
        "token_type_ids": pa.list_(pa.uint8()),
        "boundaries": pa.list_(pa.uint8()),
        "num_targets": pa.int32(),
        "num_removed": pa.int32(),
        "num_removed_targets": pa.int32(),
        "input_hash": pa.int64(),
        "example_hash": pa.int64(),
        "num_bytes": pa.int64(),
        "labels": pa.list_(pa.string()),
        "reference": pa.string(),
        "where": pa.string(),
    }
)

# In a shard's metadata: how many of its records have no example in it.
_LEFT_OUT = b"num_left_out"

_NUMBER_COLUMNS = [field.name for field in _SCHEMA if pa.types.is_integer(field.type)]


class CorruptFile(Exception):
    """A file that does not hold what was written; ``path`` says which."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class ShardBuilder:
    """Columns of a shard; plain arrays, since lists of Python integers take ten times the room."""

    def __init__(self) -> None:
        self._numbers = {name: array("q") for name in _NUMBER_COLUMNS}
        self._values = {
            "input_ids": array("i"),
            "targets": array("B"),
            "token_type_ids": array("B"),
            "boundaries": array("B"),
        }
        self._offsets = {name: array("i", [0]) for name in self._values}
        self._texts: dict[str, list[str]] = {"reference": [], "where": []}
        self._labels: list[list[str]] = []
        self._num_left_out = 0

    def extend(self, examples: Sequence[EncodedExample]) -> None:
        """All examples of one record."""
        self._num_left_out += not examples
        for example in examples:
            self._append(example)

    def _append(self, example: EncodedExample) -> None:
        num_tokens = len(example["input_ids"])
        assert num_tokens > 0, f"{example['where']}: encoded to no token"
        assert len(example["targets"]) == num_tokens, (
            f"{example['where']}: targets of another length"
        )
        assert len(example["token_type_ids"]) in (0, num_tokens), example["where"]
        boundaries = example.get("boundaries", [])
        assert len(boundaries) in (0, num_tokens), example["where"]
        row: dict[str, Any] = {
            **example,
            "boundaries": boundaries,
            "reference": example.get("reference", ""),
            "num_targets": sum(example["targets"]),
        }
        for name, numbers in self._numbers.items():
            numbers.append(row[name])
        for name, values in self._values.items():
            values.extend(row[name])
            self._offsets[name].append(len(values))
        for name, texts in self._texts.items():
            texts.append(row[name])
        self._labels.append(example["labels"])

    def to_ipc(self) -> bytes:
        """The content of the file: one record batch in Arrow's IPC format."""
        columns = []
        for field in _SCHEMA:
            if field.name in self._values:
                offsets = pa.array(np.frombuffer(self._offsets[field.name], np.int32))
                values = np.frombuffer(
                    self._values[field.name],
                    np.int32 if field.name == "input_ids" else np.uint8,
                )
                columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)))
            elif field.name in self._numbers:
                numbers = np.frombuffer(self._numbers[field.name], np.int64)
                columns.append(pa.array(numbers).cast(field.type))
            elif field.name == "labels":
                columns.append(pa.array(self._labels, field.type))
            else:
                columns.append(pa.array(self._texts[field.name], field.type))
        sink = pa.BufferOutputStream()
        schema = _SCHEMA.with_metadata({_LEFT_OUT: str(self._num_left_out)})
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return bytes(sink.getvalue())


class Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        # The reader keeps the mapping alive; the file itself may be replaced meanwhile.
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self._lists = {
            name: (self.table[name].values.to_numpy(), self.table[name].offsets.to_numpy())
            for name in ("input_ids", "targets", "token_type_ids", "boundaries")
        }

    def example(self, row: int, tokens: slice = slice(None)) -> EncodedExample:
        """The example of a row, or some tokens of it and the rest whole."""
        lists = {
            name: values[offsets[row] : offsets[row + 1]][tokens].tolist()
            for name, (values, offsets) in self._lists.items()
        }
        others = {
            name: self.table[name][row].as_py()
            for name in _SCHEMA.names
            if name in EncodedExample.__annotations__ and name not in lists
        }
        if not lists["boundaries"]:
            del lists["boundaries"]
        if not others["reference"]:
            del others["reference"]
        return cast(EncodedExample, {**lists, **others})


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of all shards that are held in memory."""

    num_rows: list[int]
    num_left_out: int
    numbers: dict[str, npt.NDArray[Any]]
    label_names: list[str]
    """The labels that occur, in the order in which they do."""
    label_codes: npt.NDArray[np.int32]
    """Places in ``label_names`` of all labels of all examples, end to end."""

    @staticmethod
    def read(paths: Sequence[Path]) -> Columns:
        """Those of all shards in order.

        Raises:
            CorruptFile: a shard is missing or damaged.
        """
        num_rows, num_left_out = [], 0
        parts: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("length", *_NUMBER_COLUMNS, "num_labels")
        }
        codes: dict[str, int] = {}
        label_codes = [np.empty(0, np.int32)]
        for path in paths:
            if not is_whole(path):
                raise CorruptFile(path)
            table = Shard(path).table
            num_rows.append(table.num_rows)
            num_left_out += int(table.schema.metadata[_LEFT_OUT])
            parts["length"].append(np.diff(table["input_ids"].offsets.to_numpy()))
            for name in _NUMBER_COLUMNS:
                # A copy, or every file would stay mapped until the last is read.
                parts[name].append(table[name].to_numpy().copy())
            parts["num_labels"].append(np.diff(table["labels"].offsets.to_numpy()))
            labels = table["labels"].flatten().dictionary_encode()
            names = labels.dictionary.to_pylist()
            code_of = np.array([codes.setdefault(name, len(codes)) for name in names], np.int32)
            label_codes.append(code_of[labels.indices.to_numpy()])
        return Columns(
            num_rows,
            num_left_out,
            {name: np.concatenate(part) for name, part in parts.items()},
            list(codes),
            np.concatenate(label_codes),
        )


def is_whole(path: Path) -> bool:
    """Whether a shard still holds what its name says."""
    try:
        with path.open("rb") as stream:
            return path.stem.rpartition("-")[2] == _digest_of_file(stream)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"cached data `{path}` cannot be read: {error.strerror}") from error


def digest_of(data: bytes) -> str:
    """128 bits that name a content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of_file(stream: io.BufferedReader) -> str:
    return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there either completely or not at all, even when power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with writing(path.parent):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a failure to write to the cache one that says what to do.

    Raises:
        DataError: the folder is full or cannot be written.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"encoded data cannot be written to `{folder}`: {error.strerror}",
            hint="free some space there, or name another folder as `FULLTUNE_CACHE`; "
            "finished work is kept"
            if full
            else "name a folder that can be written as `FULLTUNE_CACHE`",
        ) from error


def remove_stale(folder: Path) -> None:
    """Temporary files of killed runs; young ones may belong to a run that is alive."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # finished by its own process meanwhile
