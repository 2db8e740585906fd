"""Documents of a corpus in chunks: cleaned, filtered, hashed and kept in a working folder.

This is the part that many processes share. A chunk depends on the sources and the settings alone,
so that a run that was killed goes on after its finished chunks, and so that the number of processes
changes nothing. What compares documents with each other is in `corpus_shards.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator

from fulltune.config import Settings
from fulltune.data.binary import (
    UNREADABLE,
    FileCount,
    check_files,
    find_binary,
    num_bytes_of,
)
from fulltune.data.cleaning import (
    CleaningConfig,
    LanguageFilter,
    LengthConfig,
    clean,
    refusal_by_length,
)
from fulltune.data.corpus_counts import Amount, Tally
from fulltune.data.deduplication import (
    DIGEST_BYTES,
    NearDuplicatesConfig,
    Signer,
    document_digest,
)
from fulltune.data.files import TextReading
from fulltune.data.ngrams import EvaluationNgrams, fold, hash_tokens, tokens_of
from fulltune.data.plain_text import LIMIT_HINT
from fulltune.data.processes import work_in_order
from fulltune.data.records import Record, read_records
from fulltune.errors import DataError, listed

CHUNK_CHARACTERS = 2**21
CHUNK_DOCUMENTS = 4096


class DecontaminateConfig(Settings):
    """Evaluation data that must not be in a corpus."""

    against: tuple[str, ...] = ()
    """Files of evaluation data, in any format that is read; all their texts are looked for."""
    ngram: Annotated[int, Field(ge=3, le=64)] = 13
    """A document that shares a run of so many tokens (words, or characters of a script without
    spaces) with evaluation data is removed."""


class CorpusConfig(Settings):
    """What a corpus is made of. The stages follow each other in this order."""

    sources: str | tuple[str, ...]
    """A file, a folder, `asset:NAME`, `hub:OWNER/NAME[:SPLIT]`, or a list of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The column that holds the text, if it has another name: `{text: content}`."""
    documents: str = "file"
    """Where a document of plain text ends: `file`, `blank_line`, `line`, or what stands alone on
    the line between two documents, such as `<|endoftext|>`. A file of more than 4 Mi characters is
    cut at paragraphs."""
    longest_document: Annotated[int, Field(ge=1, le=2**28)] = 2**24
    """Longest document in characters that is read; a longer one is an error."""
    binary: Literal["drop", "error"] = "drop"
    """What becomes of a document that is no text: whose bytes are not UTF-8, that holds half a
    character, or more than a tenth of control characters (a row that they make unreadable, any).
    `drop` leaves it out, as a filter of its own with its count and the first places; `error` stops
    at the first one. In either case a file is an error if more than half of its documents (or of
    its first thousand or so) are no text, as it is a binary file or has another encoding; and so is
    a plain text that is not UTF-8 and is read whole, by `documents: file`."""
    cleaning: CleaningConfig = CleaningConfig()
    length: LengthConfig = LengthConfig()
    languages: tuple[str, ...] | None = None
    """Languages that are kept, such as `[en, zh]`; null keeps all."""
    exact_duplicates: bool = True
    """Remove documents that repeat an earlier one, but for case, white space and Unicode forms."""
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    validation: str | None = "1%"
    """Share of the documents that is set aside by their hashes; null sets none aside."""
    shard_bytes: Annotated[int, Field(ge=1)] = 2**28
    """A file of the corpus ends after so many bytes of text."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Another seed sets other documents aside."""

    @field_validator("columns")
    @classmethod
    def _only_text(cls, columns: dict[str, str]) -> dict[str, str]:
        if set(columns) - {"text"}:
            raise ValueError("a document has the field `text` alone; write `{text: YOURS}`")
        return columns

    @field_validator("documents")
    @classmethod
    def _one_line(cls, documents: str) -> str:
        if not documents or "\n" in documents:
            raise ValueError("it must be one line; write `file`, `blank_line`, `line` or a line")
        return documents

    @property
    def source_list(self) -> tuple[str, ...]:
        """The sources in order."""
        return (self.sources,) if isinstance(self.sources, str) else self.sources


# One chunk


class RawDocument(NamedTuple):
    """A document as it was read."""

    source: str
    text: str
    where: str
    unreadable: bool
    """Whether it is a row that could not be cut into fields."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Documents of the sources, in order."""

    index: int
    documents: list[RawDocument]


CHUNK_SCHEMA = pa.schema(
    {
        "text": pa.large_string(),
        "source": pa.string(),
        "where": pa.string(),
        "characters": pa.int64(),
        "bytes": pa.int64(),
        "digest": pa.binary(DIGEST_BYTES),
        "split": pa.uint64(),
        "evaluation": pa.int16(),
        "signature": pa.binary(),
    }
)


class ChunkWork:
    """Makes a chunk of documents a file of the working folder.

    Args:
        config: the settings of the corpus.
        folder: the working folder; the n-grams of the evaluation data lie there.
    """

    def __init__(self, config: CorpusConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._languages = LanguageFilter(config.languages) if config.languages else None
        near = config.near_duplicates
        self._signer = Signer(near) if near.threshold is not None else None
        self._evaluation = None
        if config.decontaminate.against:
            self._evaluation = EvaluationNgrams.open(folder, config.decontaminate.ngram)

    def write(self, chunk: Chunk) -> Tally:
        """Process and write a chunk.

        Raises:
            DataError: a document is no text.
        """
        tally = Tally()
        rows = [
            row for document in chunk.documents if (row := self._row(tally, document)) is not None
        ]
        columns = zip(*rows, strict=True) if rows else ((),) * len(CHUNK_SCHEMA)
        arrays = [
            pa.array(column, kind.type) for column, kind in zip(columns, CHUNK_SCHEMA, strict=True)
        ]
        schema = CHUNK_SCHEMA.with_metadata({"tally": tally.to_json()})
        path = chunk_path(self._folder, chunk.index)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_file(file, schema, options=options) as writer:
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        return tally

    def _row(self, tally: Tally, document: RawDocument) -> tuple[Any, ...] | None:
        source, text, where, unreadable = document
        size = num_bytes_of(text)
        tally.read.setdefault(source, Amount()).add(1, len(text), size)
        count = tally.files.setdefault(where.rpartition(":")[0], FileCount())
        binary = find_binary(text, where, unreadable=unreadable)
        if binary is not None:
            if self._config.binary == "error":
                raise DataError(binary.message, hint=binary.hint)
            count.add(binary.message, binary.hint)
            tally.binary.add(binary.reason, len(text), size, where)
            return None
        count.add(None)
        cleaned, changes = clean(text, self._config.cleaning)
        num_bytes = len(cleaned.encode())
        if changes:
            taken = (len(text) - len(cleaned), size - num_bytes)
            tally.add_change(changes, *taken, where)
        reason = refusal_by_length(cleaned, self._config.length)
        if reason is not None:
            tally.length.add(reason, len(cleaned), num_bytes, where)
            return None
        reason = self._languages.refusal(cleaned) if self._languages is not None else None
        if reason is not None:
            tally.language.add(reason, len(cleaned), num_bytes, where)
            return None
        folded = fold(cleaned)
        digest = document_digest(folded)
        evaluation, signature = -1, b""
        if self._signer is not None or self._evaluation is not None:
            token_hashes = hash_tokens(tokens_of(folded))
            if self._signer is not None:
                signature = self._signer.sign(token_hashes, digest)
            if self._evaluation is not None:
                evaluation = self._evaluation.find(token_hashes)
        key = f"{self._config.seed}".encode()
        split = int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")
        sizes = (len(cleaned), num_bytes)
        return cleaned, source, where, *sizes, digest, split, evaluation, signature


def chunk_path(folder: Path, index: int) -> Path:
    """Where a chunk lies in the working folder."""
    return folder / f"chunk-{index:08}.arrow"


def read_chunk(path: Path, columns: Sequence[str]) -> tuple[Any, Tally]:
    """Some columns of a finished chunk as a record batch, and its tally."""
    fields = [CHUNK_SCHEMA.get_field_index(name) for name in columns]
    with path.open("rb") as file:
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        return reader.get_batch(0), Tally.from_json(reader.schema.metadata[b"tally"].decode())


# All chunks


def read_chunks(config: CorpusConfig) -> Iterator[Chunk]:
    """The documents of all sources in order, in chunks that depend on nothing else.

    Raises:
        DataError: a source cannot be read, has no text column, or a document is too long.
    """
    index, num_characters = 0, 0
    documents: list[RawDocument] = []
    column = config.columns.get("text", "text")
    reading = TextReading(
        config.documents, config.longest_document, keep_binary=config.binary == "drop"
    )
    for source in config.source_list:
        for record in read_records(source, reading=reading):
            unreadable = _unreadable(record, column)
            text = unreadable or _text_of(record, column, config.longest_document)
            documents.append(RawDocument(source, text, record.where, unreadable is not None))
            num_characters += len(text)
            if num_characters >= CHUNK_CHARACTERS or len(documents) == CHUNK_DOCUMENTS:
                yield Chunk(index, documents)
                index, documents, num_characters = index + 1, [], 0
    if documents:
        yield Chunk(index, documents)


def _unreadable(record: Record, column: str) -> str | None:
    """All of a row that is no text and has no such column; None of any other row."""
    if UNREADABLE in record.fields:
        return str(record.fields[UNREADABLE])
    if column not in record.fields and find_binary("".join(record.fields), "") is not None:
        return " ".join(map(str, (*record.fields, *record.fields.values())))
    return None


def _text_of(record: Record, column: str, longest: int) -> str:
    if column not in record.fields:
        found = listed(record.fields)
        raise DataError(
            f"{record.where}: there is no column `{column}`",
            hint=f"the columns are {found}; name the one with the text, `columns={{text: NAME}}`",
        )
    text = record.fields[column]
    if text is None:
        return ""  # counted among the empty ones
    if not isinstance(text, str):
        raise DataError(
            f"{record.where}: `{column}` must be a text, not {type(text).__name__}",
            hint="name the column with the text, `columns={text: NAME}`",
        )
    if len(text) > longest:
        raise DataError(
            f"{record.where}: a document of {len(text):,} characters, and `longest_document` is "
            f"{longest:,}",
            hint=LIMIT_HINT,
        )
    return text


def write_chunks(
    config: CorpusConfig, folder: Path, *, num_workers: int, progress: Callable[[int], None]
) -> tuple[int, Tally]:
    """Process all chunks that are not in the working folder yet.

    Args:
        config: the settings of the corpus.
        folder: the working folder.
        num_workers: processes; 0 and 1 work in this one.
        progress: called with the number of documents done so far.

    Returns:
        The number of chunks, and what was counted in all of them.

    Raises:
        DataError: the first document in order that cannot be used, or a file that is no text.
    """
    total = Tally()
    num_chunks = 0

    def finished(tally: Tally) -> None:
        nonlocal num_chunks
        num_chunks += 1
        total.merge(tally)
        check_files(total.files)
        progress(sum(amount.documents for amount in total.read.values()))

    try:
        work_in_order(
            read_chunks(config),
            partial(_start_work, config, folder),
            finished,
            num_workers=num_workers,
            modules=[__name__],
            known=partial(_finished_chunk, folder),
        )
    except BrokenProcessPool as error:
        raise DataError(
            "a process that prepares the corpus was killed, probably because memory ran out",
            hint="go on with `--resume num_workers=1`; finished work is kept",
        ) from error
    check_files(total.files, all_ended=True)
    return num_chunks, total


def _start_work(config: CorpusConfig, folder: Path) -> Callable[[Chunk], Tally]:
    return ChunkWork(config, folder).write


def _finished_chunk(folder: Path, chunk: Chunk) -> Tally | None:
    path = chunk_path(folder, chunk.index)
    try:
        return read_chunk(path, ["characters"])[1]
    except FileNotFoundError:
        return None
    # Damaged since, or counted by an earlier version: it is made again.
    except (pa.ArrowException, OSError, KeyError):
        return None
