"""Any source that the main job reads as a stream of documents, and a share of them held out.

A long document is cut at paragraphs, so that memory stays flat and one book is not one document:
its parts are held out, or not, each by its own hash.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import read_records
from fulltune.data.tasks import TaskConfig, TextExample

Side: TypeAlias = Literal["training", "held_out", "both"]

DOCUMENT_CHARACTERS = 2**14
"""A longer document is cut into parts of at most so many characters."""
_FORMAT_ROWS = 100


def read_documents(
    sources: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    held_out: float = 0.0,
    side: Side = "both",
) -> Iterator[str]:
    """Texts of the sources in order, one at a time.

    Args:
        sources: as for `read_records`.
        columns: our field `text` -> the column's name in the data.
        held_out: the share of documents that is held out, between 0 and 1; which ones depends on
            their text alone.
        side: which documents to give.

    Raises:
        DataError: a source is empty, or a row is no text, with its file and line.
    """
    for source in sources:
        for text in _read_texts(source, columns or {}):
            for part in cut_document(text):
                if side == "both" or is_held_out(part, held_out) == (side == "held_out"):
                    yield part


def cut_document(text: str, length: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut at paragraphs if possible, into at most ``length`` characters; joined it is ``text``."""
    start = 0
    while len(text) - start > length:
        end = next(
            (
                found + len(boundary)
                for boundary in ("\n\n", "\n", " ")
                if (found := text.rfind(boundary, start + 1, start + length - len(boundary))) > 0
            ),
            start + length,
        )
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is among the held-out share: equal texts are on one side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _read_texts(source: str, columns: Mapping[str, str]) -> Iterator[str]:
    config = TaskConfig(kind="text", train=source, columns=dict(columns))
    records = read_records(source)
    first = list(itertools.islice(records, _FORMAT_ROWS))
    format = recognise_format(first, config)
    for record in itertools.chain(first, records):
        example = make_example(record, format, kind="text")
        assert isinstance(example, TextExample)
        yield example.text
