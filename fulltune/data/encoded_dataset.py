"""Examples encoded in parallel worker processes and cached under their content's address."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fulltune.data.encoded_files import (
    FORMAT_VERSION,
    Columns,
    CorruptFile,
    Shard,
    ShardBuilder,
    digest_of,
    is_whole,
    remove_stale,
    write_whole,
    writing,
)
from fulltune.data.encoding import EncodedExample, Int32Array, Int64Array
from fulltune.data.formats import (
    ROWS_LOOKED_AT,
    RecordFormat,
    make_example,
    recognise_format,
)
from fulltune.data.processes import work_in_order
from fulltune.data.records import Record, read_records, source_fingerprint
from fulltune.data.tasks import Example, TaskConfig, TaskKind
from fulltune.errors import DataError

# One unit of work, of the cache and of recovery after a crash. Its bounds do not depend on the
# number of workers, so neither do the rows nor the files.
CHUNK_RECORDS = 2048
CHUNK_CHARACTERS = 4 * 2**20

# Open files are limited (often to 1024); what falls out is mapped again in under a millisecond.
_OPEN_SHARDS = 256

_COMPLETE = "complete.json"

# Settings of a task that what is encoded does not depend on.
NOT_OF_ENCODING = {
    "train",
    "validation",
    "deduplicate",
    "labels",
    "loss",
    "class_weights",
    "dpo_beta",
}

Encode: TypeAlias = Callable[[Example], Sequence[EncodedExample]]


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
        labels: the place of each example's label in `label_names`; -1 where it has none or several.
        label_codes: the places of all labels of all examples, end to end.
        label_offsets: where those of each example begin, and at last where they end.
        num_records: rows of the sources.
        num_left_out: rows among them that encoding gave nothing for.
        num_duplicates_dropped: examples left out because an earlier one is the same.
    """

    def __init__(self, folder: Path, *, deduplicate: bool = False) -> None:
        """Open what `encode_dataset` has finished; raises `CorruptFile` for a damaged file."""
        try:
            complete = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        except ValueError:
            raise CorruptFile(folder / _COMPLETE) from None
        self.kind: TaskKind = complete["kind"]
        self.format: str = complete["format"]
        self.num_records: int = complete["num_records"]
        self._paths = [folder / name for name in complete["shards"]]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

        columns = Columns.read(self._paths)
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
        self.label_names, place = _sorted_labels(columns.label_names)
        self.label_codes, self.label_offsets = _labels_of(
            place[columns.label_codes], columns.numbers["num_labels"], self._rows
        )
        self.labels = single_labels(self.label_codes, self.label_offsets)
        names = [path.name for path in self._paths]
        self.fingerprint = digest_of(json.dumps([names, deduplicate]).encode())

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

    def _find(self, index: int) -> tuple[Shard, int]:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        with self._lock:
            shard = self._open.pop(number, None) or Shard(self._paths[number])
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard, row - int(self._first_rows[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def single_labels(label_codes: Int32Array, label_offsets: Int64Array) -> Int32Array:
    """The label of each example; -1 where it has none or several."""
    labels = np.full(len(label_offsets) - 1, -1, np.int32)
    single = np.diff(label_offsets) == 1
    labels[single] = label_codes[label_offsets[:-1][single]]
    return labels


def _labels_of(
    codes: Int32Array, num_labels: Int32Array, rows: Int64Array
) -> tuple[Int32Array, Int64Array]:
    """The labels of some rows end to end, and where those of each begin."""
    kept = np.zeros(len(num_labels), dtype=bool)
    kept[rows] = True
    offsets = np.concatenate([[0], np.cumsum(num_labels[rows], dtype=np.int64)])
    return codes[np.repeat(kept, num_labels)], offsets


def _sorted_labels(names: list[str]) -> tuple[list[str], Int32Array]:
    """The names in their order, and the place there of each one that is given."""
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    order = sorted(range(len(names)), key=lambda i: (int(names[i]) if numbers else 0, names[i]))
    place = np.empty(len(names), np.int32)
    place[order] = np.arange(len(names), dtype=np.int32)
    return [names[i] for i in order], place


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
        "version": FORMAT_VERSION,
        "sources": [(source, source_fingerprint(source)) for source in sources],
        "task": config.model_dump(mode="json", exclude=NOT_OF_ENCODING),
        "encode": encode_fingerprint,
        "needs_label": needs_label,
    }
    folder = cache_dir.expanduser() / digest_of(json.dumps(key, sort_keys=True).encode())
    if (folder / _COMPLETE).is_file():
        try:
            return EncodedDataset(folder, deduplicate=config.deduplicate)
        except CorruptFile as error:
            with writing(folder):
                (folder / _COMPLETE).unlink(missing_ok=True)
                error.path.unlink(missing_ok=True)
    with writing(folder):
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
    write_whole(folder / _COMPLETE, json.dumps(complete, indent=1).encode())
    remove_stale(folder)
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
            if is_whole(path):
                return path.name
            with writing(self.folder):
                path.unlink(missing_ok=True)
        examples = ShardBuilder()
        for record in chunk.records:
            example = make_example(
                record, chunk.format, kind=self.kind, needs_label=self.needs_label
            )
            examples.extend(self.encode(example))
        data = examples.to_ipc()
        path = self.folder / f"shard-{chunk.index:06d}-{digest_of(data)}.arrow"
        write_whole(path, data)
        return path.name


def _encode_chunks(
    work: _Work, chunks: Iterator[_Chunk], num_workers: int, progress: Callable[[int], None]
) -> tuple[list[str], int]:
    shards: list[str] = []
    num_records = 0

    def finished(done: tuple[str, int]) -> None:
        nonlocal num_records
        shard, count = done
        shards.append(shard)
        num_records += count
        progress(num_records)

    try:
        work_in_order(
            chunks,
            partial(_start_work, work),
            finished,
            num_workers=num_workers,
            modules=[__name__, work.encode.__module__],
        )
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes the data was killed, probably because memory ran out",
            hint="run again with a smaller `num_workers`; finished work is kept",
        ) from error
    return shards, num_records


def _start_work(work: _Work) -> Callable[[_Chunk], tuple[str, int]]:
    return lambda chunk: (work.shard(chunk), len(chunk.records))
