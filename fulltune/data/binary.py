"""What is no text: bytes that are not UTF-8, half a character, or mostly control characters.

Where such rows are kept to be counted, a byte that is not UTF-8 is read as a lone surrogate
(`surrogateescape`, PEP 383), so that it is found in whatever field it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fulltune.data.cleaning import CONTROL
from fulltune.data.utf8 import guess_encoding, how_to_convert
from fulltune.errors import DataError

JUNK_SHARE = 0.1
"""A document with more control characters than this is no text."""
ESCAPE_BYTES = "surrogateescape"
ENOUGH_DOCUMENTS = 1000
"""Of a file that is no text so many documents are looked at, and not all of its gigabytes."""
UNREADABLE = "\0unreadable"
"""The only field of a row that is no text and cannot be cut into fields: all of it as it stands."""

_ESCAPED = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_HALF = re.compile(
    r"(\\\\|\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2})"
    r"|\\u[dD][cC][89a-fA-F][\da-fA-F]"
)
"""An escaped backslash or a whole character (group 1), or the half of one that would be read like a
byte that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class Binary:
    """Why a document is no text."""

    reason: str
    """In a few words, to be counted."""
    message: str
    hint: str


def find_binary(text: str, where: str, *, unreadable: bool = False) -> Binary | None:
    """Why a document is no text; None where it is one.

    Args:
        text: the document.
        where: file and line.
        unreadable: whether it is a row that could not be cut into fields.
    """
    if not text.isascii() and (surrogate := _SURROGATE.search(text)) is not None:
        if escaped := _ESCAPED.search(text):
            return _not_utf8(text, where, escaped.start())
        return Binary(
            "half a character",
            f"{where}: holds half a character (a lone surrogate), the {surrogate.start() + 1}th",
            "it was cut in the middle of an escaped character; write the row again",
        )
    first = CONTROL.search(text)
    if first is None:
        return None
    count = len(CONTROL.findall(text))
    if not unreadable and count <= JUNK_SHARE * len(text):
        return None
    return Binary(
        "control characters",
        f"{where}: {count:,} of {len(text):,} characters are control characters, the first "
        f"being character {first.start() + 1} (U+{ord(first[0]):04X}): this is no text",
        "take the binary file out of the sources, or convert it to text first",
    )


def _not_utf8(text: str, where: str, start: int) -> Binary:
    name, _, line = where.rpartition(":")
    begin, end = text.rfind("\n", 0, start) + 1, text.find("\n", start)
    row = text[begin : end if end >= 0 else None]
    encoding = guess_encoding(row.encode("utf-8", ESCAPE_BYTES)) if _only_escaped(row) else None
    if line == "1" and text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        encoding = "UTF-16"
    return Binary(
        "not UTF-8",
        f"{where}: not UTF-8: holds the byte 0x{ord(text[start]) - 0xDC00:02x}",
        how_to_convert(name, encoding),
    )


def _only_escaped(text: str) -> bool:
    return _SURROGATE.search(_ESCAPED.sub("", text)) is None


def has_escaped_bytes(text: str) -> bool:
    """Whether a text was read from bytes that are not UTF-8."""
    return not text.isascii() and _ESCAPED.search(text) is not None


def with_distinct_halves(text: str) -> str:
    """JSON whose escaped halves of characters are read as others than bytes that are not UTF-8.

    The text keeps its length.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return text
    return _JSON_HALF.sub(lambda found: found[1] or r"\udc00", text)


def is_binary_row(text: str) -> bool:
    """Whether a row that cannot be read is no text, and not a slip in writing it."""
    return "\0" in text or find_binary(text, "") is not None


def num_bytes_of(text: str) -> int:
    """Bytes of a text in UTF-8, also where it is none: half a character counts as one byte."""
    return len(text.encode("utf-8", "replace"))


# Files


@dataclass
class FileCount:
    """How many documents of a file are no text."""

    documents: int = 0
    binary: int = 0
    first: tuple[str, str] = ("", "")
    """What is said of the first of them, and what to do."""

    def add(self, message: str | None, hint: str = "") -> None:
        """Count one document, with what is said of it if it is no text."""
        self.documents += 1
        if message is not None:
            self.first = self.first if self.binary else (message, hint)
            self.binary += 1

    def merge(self, other: FileCount) -> None:
        """Count what was counted in a later chunk."""
        self.documents += other.documents
        self.first = self.first if self.binary else other.first
        self.binary += other.binary


def check_files(files: dict[str, FileCount], *, all_ended: bool = False) -> None:
    """Refuse a file most of whose documents are no text; others that have ended are forgotten.

    Args:
        files: in the order they are read; of the last one more may follow.
        all_ended: nothing follows.

    Raises:
        DataError: more than half of a file's documents, all or the first ones, are no text.
    """
    for number, (name, count) in enumerate(list(files.items()), start=1):
        has_ended = all_ended or number < len(files)
        if 2 * count.binary > count.documents and (
            has_ended or count.documents >= ENOUGH_DOCUMENTS
        ):
            message, hint = count.first
            which = "" if has_ended else "first "
            share = f"{count.binary:,} of the {which}{count.documents:,}"
            if count.binary == count.documents:
                share = f"all of the {which}{count.documents:,}"
            if count.documents > 1:
                message = f"{share} documents of `{name}` are no text; {message}"
            raise DataError(message, hint=hint)
    ended = list(files)[: None if all_ended else -1]
    for name in ended:
        del files[name]
