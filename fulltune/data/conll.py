"""CoNLL files: a word a line with its tag in the last column, and an empty line after a sentence.

The columns are parted by tabs, or else by spaces; between word and tag there may be others, such as
parts of speech (Tjong Kim Sang and De Meulder, 2003).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fulltune.errors import DataError

DOCUMENT_START = "-DOCSTART-"


def read_conll(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The sentences of a file as rows of words and tags, with the line each begins at.

    A file of one column holds words alone, for prediction.

    Raises:
        DataError: a line has another number of columns than the first.
    """
    words: list[str] = []
    tags: list[str] = []
    start, num_columns, first = 1, 0, 1
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        columns = text.split("\t") if "\t" in text else text.split()
        if not columns or columns[0] == DOCUMENT_START:
            if words:
                yield start, _row(words, tags)
            words, tags = [], []
            continue
        if not num_columns:
            num_columns, first = len(columns), number
        if len(columns) != num_columns:
            raise DataError(
                f"{name}:{number}: {len(columns)} columns, but line {first} has {num_columns}",
                hint="part word and tag by a tab, and sentences by an empty line",
            )
        if not words:
            start = number
        words.append(columns[0])
        if num_columns > 1:
            tags.append(columns[-1])
    if words:
        yield start, _row(words, tags)


def _row(words: list[str], tags: list[str]) -> dict[str, Any]:
    return {"words": words, "tags": tags} if tags else {"words": words}
