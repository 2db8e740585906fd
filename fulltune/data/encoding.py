"""Examples as token ids: made in parallel worker processes, cached under their content's address.

Every objective encodes into the same columns, so that packing, batching, checks and previews are
written once for all tasks.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulltune.data.formats import (
    ROWS_LOOKED_AT,
    RecordFormat,
    make_example,
    recognise_format,
)
from fulltune.data.processes import interrupted_afterwards, process_context, tie_to_parent
from fulltune.data.records import Record, read_records, source_fingerprint
from fulltune.data.tasks import Example, TaskConfig, TaskKind
from fulltune.errors import DataError, FulltuneError


class EncodedExample(TypedDict):
    """One example as tokens, after truncation.

    input_ids:          the tokens, special tokens included; at least one.
    targets:            as long as ``input_ids``; 1 where the token itself is to be learned (it is
                        predicted from the tokens before it), else 0. All 0 for classification.
    token_type_ids:     segment ids as long as ``input_ids``, or empty where the model has none.
    label:              the class by name; "" where the task has none.
    num_removed:        tokens that truncation removed.
    num_removed_targets: targets among them.
    input_hash:         signed 64-bit hash of what the model is given (prompt, or text and pair).
    example_hash:       signed 64-bit hash of input and target together; equal for exact duplicates.
    num_bytes:          UTF-8 bytes of the trained text (bits per byte), 0 for classification.
    where:              file and line of the record, ``train.jsonl:17``.
    noise_seed:         seed of what is random about the example in this epoch; set in training by
                        whoever takes it from the data, absent in evaluation.
    boundaries:         as long as ``input_ids``, absent where no objective asks for it: the sum of
                        `WORD_START` and `SENTENCE_START` where a token begins one.
    """

    input_ids: list[int]
    targets: list[int]
    token_type_ids: list[int]
    label: str
    num_removed: int
    num_removed_targets: int
    input_hash: int
    example_hash: int
    num_bytes: int
    where: str
    noise_seed: NotRequired[int]
    boundaries: NotRequired[list[int]]


WORD_START = 1
SENTENCE_START = 2


# Changes whenever the columns below, or what is written in them, change.
_FORMAT_VERSION = 5

# One unit of work, of the cache and of recovery after a crash. Its bounds do not depend on the
# number of workers, so neither do the rows nor the files.
CHUNK_RECORDS = 2048
CHUNK_CHARACTERS = 4 * 2**20

# Open files are limited (often to 1024); what falls out is mapped again in under a millisecond.
_OPEN_SHARDS = 256

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
        "label": pa.string(),
        "where": pa.string(),
    }
)

# In a shard's metadata: how many of its records have no example in it.
_LEFT_OUT = b"num_left_out"

Encode: TypeAlias = Callable[[Example], Sequence[EncodedExample]]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]


def content_hash(*parts: str) -> int:
    """Signed 64-bit hash of texts, the same everywhere; ``("ab", "c")`` is not ``("a", "bc")``."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


class EncodedDataset:
    """Encoded examples on disk, mapped into memory; only the columns below are held.

    Attributes:
        kind: the task's kind.
        format: how the rows were read, for the user to check.
        fingerprint: hash of the content of all rows.
        lengths: tokens of each example.
        num_targets: targets of each example.
        num_removed: tokens that truncation removed from each example.
        num_removed_targets: targets among them.
        input_hashes: see `EncodedExample.input_hash`.
        example_hashes: see `EncodedExample.example_hash`.
        num_bytes: see `EncodedExample.num_bytes`.
        label_names: the labels that occur; as numbers where all are whole numbers, else by name.
        labels: the place of each example's label in `label_names`; -1 without a label.
        num_records: rows of the sources.
        num_left_out: rows among them that encoding gave nothing for.
        num_duplicates_dropped: examples left out because an earlier one is the same.
    """

    def __init__(self, folder: Path, *, deduplicate: bool = False) -> None:
        """Open what `encode_dataset` has finished; raises `_CorruptFile` for a damaged file."""
        try:
            complete = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        except ValueError:
            raise _CorruptFile(folder / _COMPLETE) from None
        self.kind: TaskKind = complete["kind"]
        self.format: str = complete["format"]
        self.num_records: int = complete["num_records"]
        self._paths = [folder / name for name in complete["shards"]]
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

        columns = _Columns.read(self._paths)
        self.num_left_out = columns.num_left_out
        self._first_rows: Int64Array = np.cumsum([0, *columns.num_rows], dtype=np.int64)
        self._rows: Int64Array = np.arange(self._first_rows[-1], dtype=np.int64)
        if deduplicate:
            _, first = np.unique(columns.numbers["example_hash"], return_index=True)
            self._rows = np.sort(first).astype(np.int64)
        self.num_duplicates_dropped = int(self._first_rows[-1]) - len(self._rows)

        def kept(name: str) -> npt.NDArray[Any]:
            values = columns.numbers[name]
            return values[self._rows] if deduplicate else values

        self.lengths: Int32Array = kept("length")
        self.num_targets: Int32Array = kept("num_targets")
        self.num_removed: Int32Array = kept("num_removed")
        self.num_removed_targets: Int32Array = kept("num_removed_targets")
        self.input_hashes: Int64Array = kept("input_hash")
        self.example_hashes: Int64Array = kept("example_hash")
        self.num_bytes: Int64Array = kept("num_bytes")
        self.label_names, self.labels = _sorted_labels(columns.label_names, kept("label"))
        names = [path.name for path in self._paths]
        self.fingerprint = _digest(json.dumps([names, deduplicate]).encode())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard, row = self._find(index)
        return shard.example(row)

    def piece(self, index: int, start: int, stop: int) -> EncodedExample:
        """Some tokens of an example; only they are read. All that is no list is the whole's."""
        shard, row = self._find(index)
        return shard.example(row, slice(start, stop))

    def where(self, index: int) -> str:
        """File and line of an example's record."""
        shard, row = self._find(index)
        return str(shard.table["where"][row].as_py())

    def _find(self, index: int) -> tuple[_Shard, int]:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        with self._lock:
            shard = self._open.pop(number, None) or _Shard(self._paths[number])
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard, row - int(self._first_rows[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def encode_dataset(
    sources: Sequence[str],
    config: TaskConfig,
    encode: Encode,
    *,
    encode_fingerprint: str,
    num_workers: int,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
    needs_label: bool = True,
) -> EncodedDataset:
    """Encode all rows of the sources, or open what an earlier call encoded.

    Finished shards are kept under the hash of everything they depend on. A run that was killed goes
    on from them, and two runs at once write the same files, each replaced as a whole.

    Args:
        sources: as for `read_records`, in this order.
        config: kind, format, columns and `deduplicate` are read here.
        encode: example -> encoded examples: one, none (dropped), or the windows of a document. It
            must be picklable and give the same for the same example.
        encode_fingerprint: hash of all that `encode` depends on: tokenizer, template, lengths.
        num_workers: processes; 0 and 1 encode in this one, and so does any small input.
        cache_dir: where the shards are kept.
        progress: called with the number of records done so far.
        needs_label: False in prediction; see `make_example`.

    Raises:
        DataError: a row cannot be used; the same row is named whatever the number of workers.
    """
    if not sources:
        raise DataError("no data is named", hint="name a file in `task.train`")
    key = {
        "version": _FORMAT_VERSION,
        "sources": [(source, source_fingerprint(source)) for source in sources],
        "task": config.model_dump(mode="json", exclude={"train", "validation", "deduplicate"}),
        "encode": encode_fingerprint,
        "needs_label": needs_label,
    }
    folder = cache_dir.expanduser() / _digest(json.dumps(key, sort_keys=True).encode())
    if (folder / _COMPLETE).is_file():
        try:
            return EncodedDataset(folder, deduplicate=config.deduplicate)
        except _CorruptFile as error:
            with _writing(folder):
                (folder / _COMPLETE).unlink(missing_ok=True)
                error.path.unlink(missing_ok=True)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    work = _Work(folder, config.kind, needs_label, encode)
    formats: list[str] = []
    chunks = _chunks(sources, config, formats, needs_label=needs_label)
    shards, num_records = _encode_chunks(work, chunks, num_workers, progress or (lambda _: None))
    complete = {
        "kind": config.kind,
        "format": "; then ".join(dict.fromkeys(formats)),
        "num_records": num_records,
        "shards": shards,
    }
    _write_whole(folder / _COMPLETE, json.dumps(complete, indent=1).encode())
    _remove_stale(folder)
    dataset = EncodedDataset(folder, deduplicate=config.deduplicate)
    if not len(dataset):
        raise DataError(
            f"none of the {num_records} records of {', '.join(f'`{s}`' for s in sources)} is left "
            "after encoding",
            hint="with `task.too_long: drop` all were longer than `task.max_length`: raise it up "
            "to the model's context, or write `task.too_long: truncate`"
            if config.too_long == "drop"
            else "the tokenizer finds no token in any of their texts",
        )
    return dataset


# Chunks of records


@dataclass(frozen=True, slots=True)
class _Chunk:
    index: int
    records: list[Record]
    format: RecordFormat


def _chunks(
    sources: Sequence[str], config: TaskConfig, formats: list[str], *, needs_label: bool
) -> Iterator[_Chunk]:
    """Records in chunks, with each source's own format, whose description goes to `formats`."""
    index = 0
    for source in sources:
        records = read_records(source)
        first = list(itertools.islice(records, ROWS_LOOKED_AT))
        format = recognise_format(first, config, needs_label=needs_label)
        formats.append(format.description)
        chunk: list[Record] = []
        num_characters = 0
        for record in itertools.chain(first, records):
            chunk.append(record)
            num_characters += _num_characters(record.fields)
            if len(chunk) == CHUNK_RECORDS or num_characters >= CHUNK_CHARACTERS:
                yield _Chunk(index, chunk, format)
                index, chunk, num_characters = index + 1, [], 0
        if chunk:
            yield _Chunk(index, chunk, format)
            index += 1


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_num_characters, value))
    return 0


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker needs besides the chunk."""

    folder: Path
    kind: TaskKind
    needs_label: bool
    encode: Encode

    def shard(self, chunk: _Chunk) -> str:
        """The file of a chunk's examples, written unless it is there already."""
        for path in sorted(self.folder.glob(f"shard-{chunk.index:06d}-*.arrow")):
            if _is_whole(path):
                return path.name
            with _writing(self.folder):
                path.unlink(missing_ok=True)
        examples = _Builder()
        for record in chunk.records:
            example = make_example(
                record, chunk.format, kind=self.kind, needs_label=self.needs_label
            )
            examples.extend(self.encode(example))
        data = examples.to_ipc()
        path = self.folder / f"shard-{chunk.index:06d}-{_digest(data)}.arrow"
        _write_whole(path, data)
        return path.name


class _Builder:
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
        self._texts: dict[str, list[str]] = {"label": [], "where": []}
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
            "num_targets": sum(example["targets"]),
        }
        for name, numbers in self._numbers.items():
            numbers.append(row[name])
        for name, values in self._values.items():
            values.extend(row[name])
            self._offsets[name].append(len(values))
        for name, texts in self._texts.items():
            texts.append(row[name])

    def to_ipc(self) -> bytes:
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
            else:
                columns.append(pa.array(self._texts[field.name], field.type))
        sink = pa.BufferOutputStream()
        schema = _SCHEMA.with_metadata({_LEFT_OUT: str(self._num_left_out)})
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return bytes(sink.getvalue())


_NUMBER_COLUMNS = [field.name for field in _SCHEMA if pa.types.is_integer(field.type)]


# Processes


_work: _Work | None = None
"""What this worker process does; set once by `_start_worker`."""


def _encode_chunks(
    work: _Work, chunks: Iterator[_Chunk], num_workers: int, progress: Callable[[int], None]
) -> tuple[list[str], int]:
    shards: list[str] = []
    num_records = 0

    def finished(shard: str, count: int) -> None:
        nonlocal num_records
        shards.append(shard)
        num_records += count
        progress(num_records)

    # Starting a process costs more than encoding one chunk.
    items = _chunks_then_error(chunks)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if len(first) < 2 or num_workers <= 1:
        for item in items:
            if isinstance(item, FulltuneError):
                raise item
            finished(work.shard(item), len(item.records))
        return shards, num_records

    failure: FulltuneError | None = None
    waiting: deque[tuple[Future[str], int]] = deque()
    with ProcessPoolExecutor(
        num_workers,
        mp_context=process_context(__name__, work.encode.__module__),
        initializer=_start_worker,
        initargs=(work,),
    ) as pool:
        try:
            for item in items:
                if isinstance(item, FulltuneError):
                    failure = item
                    break
                with interrupted_afterwards():
                    future = pool.submit(_encode_chunk, item)
                waiting.append((future, len(item.records)))
                if len(waiting) == 2 * num_workers:
                    future, count = waiting.popleft()
                    finished(future.result(), count)
            while waiting:
                future, count = waiting.popleft()
                finished(future.result(), count)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes the data was killed, probably because memory ran out",
                hint="run again with a smaller `num_workers`; finished work is kept",
            ) from error
        finally:
            for future, _ in waiting:
                future.cancel()
    if failure is not None:
        raise failure
    return shards, num_records


def _chunks_then_error(chunks: Iterator[_Chunk]) -> Iterator[_Chunk | FulltuneError]:
    """Reading runs ahead of encoding, and an earlier row that fails there is named first."""
    try:
        yield from chunks
    except FulltuneError as error:
        yield error


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    # The tokenizers have no other switch. The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tie_to_parent()


def _encode_chunk(chunk: _Chunk) -> str:
    assert _work is not None
    return _work.shard(chunk)


# Files


_COMPLETE = "complete.json"


class _CorruptFile(Exception):
    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        # The reader keeps the mapping alive; the file itself may be replaced meanwhile.
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self._lists = {
            name: (self.table[name].values.to_numpy(), self.table[name].offsets.to_numpy())
            for name in ("input_ids", "targets", "token_type_ids", "boundaries")
        }

    def example(self, row: int, tokens: slice = slice(None)) -> EncodedExample:
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
        return cast(EncodedExample, {**lists, **others})


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of all shards that are held in memory."""

    num_rows: list[int]
    num_left_out: int
    numbers: dict[str, npt.NDArray[Any]]
    label_names: list[str]

    @staticmethod
    def read(paths: Sequence[Path]) -> _Columns:
        num_rows, num_left_out = [], 0
        parts: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("length", *_NUMBER_COLUMNS, "label")
        }
        codes: dict[str, int] = {}
        for path in paths:
            if not _is_whole(path):
                raise _CorruptFile(path)
            table = _Shard(path).table
            num_rows.append(table.num_rows)
            num_left_out += int(table.schema.metadata[_LEFT_OUT])
            parts["length"].append(np.diff(table["input_ids"].offsets.to_numpy()))
            for name in _NUMBER_COLUMNS:
                # A copy, or every file would stay mapped until the last is read.
                parts[name].append(table[name].to_numpy().copy())
            labels = table["label"].dictionary_encode()
            names = labels.dictionary.to_pylist()
            code_of = np.array(
                [-1 if name == "" else codes.setdefault(name, len(codes)) for name in names],
                dtype=np.int32,
            )
            parts["label"].append(code_of[labels.indices.to_numpy()])
        return _Columns(
            num_rows,
            num_left_out,
            {name: np.concatenate(part) for name, part in parts.items()},
            list(codes),
        )


def _sorted_labels(names: list[str], codes: Int32Array) -> tuple[list[str], Int32Array]:
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    order = sorted(range(len(names)), key=lambda i: (int(names[i]) if numbers else 0, names[i]))
    place = np.empty(len(names) + 1, np.int32)
    place[order] = np.arange(len(names), dtype=np.int32)
    place[-1] = -1  # the code of no label
    return [names[i] for i in order], place[codes]


def _is_whole(path: Path) -> bool:
    """Whether a shard still holds what its name says."""
    try:
        with path.open("rb") as stream:
            return path.stem.rpartition("-")[2] == _digest_of_file(stream)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"cached data `{path}` cannot be read: {error.strerror}") from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of_file(stream: io.BufferedReader) -> str:
    return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there either completely or not at all, even when power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with _writing(path.parent):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
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


def _remove_stale(folder: Path) -> None:
    """Temporary files of killed runs; young ones may belong to a run that is alive."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # finished by its own process meanwhile
