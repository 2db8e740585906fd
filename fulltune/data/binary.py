"""What is no text: bytes that are not UTF-8, half a character, or mostly control characters.

Where such rows are kept to be counted, a byte that is not UTF-8 is read as a lone surrogate
(`surrogateescape`, PEP 383), so that it is found in whatever field it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fulltune.data.cleaning import CONTROL
from fulltune.data.utf8 import guess_encoding, how_to_convert

JUNK_SHARE = 0.1
"""A document with more control characters than this is no text."""
ESCAPE_BYTES = "surrogateescape"
UNREADABLE = "\0unreadable"
"""The only field of a row that is no text and cannot be cut into fields: all of it as it stands."""

_ESCAPED = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def is_binary_row(text: str) -> bool:
    """Whether a row that cannot be read is no text, and not a slip in writing it."""
    return "\0" in text or find_binary(text, "") is not None


def num_bytes_of(text: str) -> int:
    """Bytes of a text in UTF-8, also where it is none: half a character counts as one byte."""
    return len(text.encode("utf-8", "replace"))
