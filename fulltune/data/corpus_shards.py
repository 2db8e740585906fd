"""From finished chunks to the files of a corpus: duplicates, evaluation data, and the split.

The chunks are in the order of the sources, and of equal documents the first one stays. Only hashes
of the documents are held; their texts are read once more while the files are written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulltune.data.corpus import CorpusConfig, chunk_path, read_chunk
from fulltune.data.corpus_counts import Amount, Removed
from fulltune.data.deduplication import (
    Int64Array,
    as_pairs,
    find_exact_duplicates,
    find_near_duplicates,
)
from fulltune.data.ngrams import UInt64Array
from fulltune.data.splits import ShareOfTrain, parse_validation
from fulltune.errors import ConfigError, DataError

EXACT, NEAR, EVALUATION = "exact duplicates", "near duplicates", "evaluation data"
TRAIN, VALIDATION = "train", "validation"
SHARD_SCHEMA = pa.schema({"text": pa.large_string(), "source": pa.string(), "where": pa.string()})

_KEPT, _EXACT, _NEAR, _EVALUATION = range(4)
_SIGNATURES = "signatures.u32"


def validation_share(config: CorpusConfig) -> float:
    """The share that is set aside.

    Raises:
        ConfigError: the setting says something else.
    """
    if config.validation is None:
        return 0.0
    wanted = parse_validation(config.validation, setting="validation")
    if not isinstance(wanted, ShareOfTrain):
        raise ConfigError(
            f"`validation` is `{config.validation}`, and a corpus sets a share aside",
            hint="write `1%`, or null for none",
        )
    return wanted.share


@dataclass(frozen=True)
class Documents:
    """What is held of all documents: 26 bytes each.

    digests:     uint64 [N, 2].
    splits:      uint64 [N], pseudo-random.
    evaluations: int16 [N], the index of the evaluation source a document holds; -1 for none.
    """

    digests: UInt64Array
    splits: UInt64Array
    evaluations: npt.NDArray[np.int16]


def gather(config: CorpusConfig, folder: Path, num_chunks: int) -> Documents:
    """The hashes of all chunks; signatures go into one file of the working folder."""
    digests, splits, evaluations = [], [], []
    with (folder / _SIGNATURES).open("wb") as signatures:
        for index in range(num_chunks):
            columns = ["digest", "split", "evaluation"]
            if config.near_duplicates.threshold is not None:
                columns.append("signature")
            batch, _ = read_chunk(chunk_path(folder, index), columns)
            digests.append(as_pairs(batch["digest"].to_pylist()))
            splits.append(batch["split"].to_numpy().copy())
            evaluations.append(batch["evaluation"].to_numpy().copy())
            if config.near_duplicates.threshold is not None:
                signatures.write(b"".join(batch["signature"].to_pylist()))
    return Documents(np.concatenate(digests), np.concatenate(splits), np.concatenate(evaluations))


@dataclass(frozen=True)
class Decisions:
    """What becomes of every document.

    fates:      uint8 [N], kept or the stage that removes it.
    validation: bool [N].
    likes:      a few removed documents -> the document each is like.
    """

    fates: npt.NDArray[np.uint8]
    validation: npt.NDArray[np.bool_]
    likes: Mapping[int, int]


def decide(
    config: CorpusConfig,
    documents: Documents,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decisions:
    """Which documents stay, and on which side.

    Raises:
        ConfigError: one side of the split would be empty.
        DataError: nothing is left.
    """
    count = len(documents.splits)
    fates = np.zeros(count, dtype=np.uint8)
    likes: dict[int, int] = {}
    if config.exact_duplicates:
        first = find_exact_duplicates(documents.digests)
        fates[first != np.arange(count)] = _EXACT
        for document in np.flatnonzero(fates)[:8].tolist():
            likes[document] = int(first[document])
        del first
    if config.near_duplicates.threshold is not None:
        candidates: Int64Array = np.flatnonzero(fates == _KEPT)
        near = find_near_duplicates(
            folder / _SIGNATURES, candidates, config.near_duplicates, progress=progress
        )
        fates[list(near)] = _NEAR
        likes |= {document: near[document] for document in sorted(near)[:8]}
    fates[(fates == _KEPT) & (documents.evaluations >= 0)] = _EVALUATION
    return Decisions(fates, _validation(config, documents, fates == _KEPT), likes)


def _validation(
    config: CorpusConfig, documents: Documents, kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    share = validation_share(config)
    chosen = np.zeros(len(kept), dtype=bool)
    if share == 0 or not kept.any():
        return chosen
    chosen = kept & (documents.splits < np.uint64(int(share * 2**64)))
    if not chosen.any():  # a small corpus: the one document that a larger share would take first
        chosen = kept & (documents.splits == documents.splits[kept].min())
    if (chosen == kept).all():
        raise ConfigError(
            f"`validation` is `{config.validation}`, which leaves none of the {kept.sum():,} "
            "documents for training",
            hint="give a smaller share, more documents, or null for none",
        )
    return chosen


# The files


@dataclass
class Shard:
    """One file of the corpus."""

    file: str
    amount: Amount
    sha256: str


@dataclass
class Written:
    """What the corpus holds and what was removed at the end."""

    shards: dict[str, list[Shard]] = field(default_factory=dict)
    removed: dict[str, Removed] = field(default_factory=dict)

    def amount(self, split: str) -> Amount:
        """How much is in a split."""
        total = Amount()
        for shard in self.shards.get(split, []):
            total.merge(shard.amount)
        return total


def write_shards(
    config: CorpusConfig,
    decisions: Decisions,
    documents: Documents,
    folder: Path,
    num_chunks: int,
    output: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write the files of the corpus under ``output``, and count what is not written.

    Raises:
        DataError: nothing is left.
    """
    if not (decisions.fates == _KEPT).any():
        raise DataError(
            f"nothing is left of the {len(decisions.fates):,} documents that passed the filters of "
            "length and language",
            hint="all hold evaluation data; look at `decontaminate.against`",
        )
    written = Written(removed={EXACT: Removed(), NEAR: Removed(), EVALUATION: Removed()})
    writers = {
        split: _SplitWriter(output, split, config.shard_bytes) for split in (TRAIN, VALIDATION)
    }
    likely_wheres: dict[int, str] = {}
    wanted = {like for like in decisions.likes.values()}
    start = 0
    for index in range(num_chunks):
        progress(index, num_chunks)
        batch, _ = read_chunk(
            chunk_path(folder, index), ["text", "source", "where", "characters", "bytes"]
        )
        here = slice(start, start + batch.num_rows)
        fates, validation = decisions.fates[here], decisions.validation[here]
        for document in wanted.intersection(range(here.start, here.stop)):
            likely_wheres[document] = batch["where"][document - start].as_py()
        for row in np.flatnonzero(fates != _KEPT).tolist():
            where = batch["where"][row].as_py()
            like = decisions.likes.get(start + row)
            if like is not None:
                where = f"{where} (like {likely_wheres[like]})"
            stage, reason = EXACT, "the same"
            if fates[row] == _NEAR:
                stage, reason = NEAR, f"similarity {config.near_duplicates.threshold:g} or more"
            elif fates[row] == _EVALUATION:
                stage = EVALUATION
                reason = config.decontaminate.against[documents.evaluations[start + row]]
            written.removed[stage].add(
                reason, batch["characters"][row].as_py(), batch["bytes"][row].as_py(), where
            )
        writers[TRAIN].write(batch, (fates == _KEPT) & ~validation)
        writers[VALIDATION].write(batch, (fates == _KEPT) & validation)
        start = here.stop
    written.shards = {split: shards for split in writers if (shards := writers[split].finish())}
    return written


class _SplitWriter:
    """The shards of one split, each ended by the size of its texts."""

    def __init__(self, output: Path, split: str, shard_bytes: int) -> None:
        self._folder = output / split
        self._split = split
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._amount = Amount()
        self._file: Any = None
        self._writer: Any = None

    def write(self, batch: Any, mask: npt.NDArray[np.bool_]) -> None:
        rows = np.flatnonzero(mask)
        if not len(rows):
            return
        sizes = batch["bytes"].to_numpy()[rows]
        # Where a shard ends is decided by document, so that no shard is much longer than asked.
        ends = self._amount.bytes + np.cumsum(sizes)
        begin = 0
        while begin < len(rows):
            end = int(np.searchsorted(ends, self._shard_bytes)) + 1
            end = min(max(end, begin + 1), len(rows))
            self._append(batch, rows[begin:end])
            begin = end
            if self._amount.bytes >= self._shard_bytes:
                self._end_shard()
                ends = np.cumsum(sizes[begin:])
                ends = np.concatenate([np.zeros(begin, dtype=ends.dtype), ends])

    def _append(self, batch: Any, rows: Int64Array) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._split}-{len(self._shards):05}.arrow"
            self._file = path.open("wb")
            self._writer = pa.ipc.new_file(self._file, SHARD_SCHEMA)
        taken = batch.take(pa.array(rows))
        self._writer.write_batch(taken.select(SHARD_SCHEMA.names))
        characters, num_bytes = taken["characters"].to_numpy(), taken["bytes"].to_numpy()
        self._amount.add(len(rows), int(characters.sum()), int(num_bytes.sum()))

    def _end_shard(self) -> None:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = Path(self._file.name)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(Shard(f"{self._split}/{path.name}", self._amount, digest))
        self._amount, self._file, self._writer = Amount(), None, None

    def finish(self) -> list[Shard]:
        if self._writer is not None:
            self._end_shard()
        return self._shards
