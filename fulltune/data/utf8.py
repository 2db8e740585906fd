"""Where a file is not UTF-8: the line, the byte, and how to convert it."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO

from fulltune.errors import DataError

_READ_BYTES = 2**20


def bad_encoding(name: str, stream: BinaryIO) -> DataError:
    """The error of the first byte of a stream that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, num_before = 1, 0  # bytes of this line in the pieces before: a line may be huge
    while True:
        piece = stream.readline(_READ_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            return bad_line(name, number, error.object, error, num_before=num_before - pending)
        assert piece, f"{name} was undecodable a moment ago"
        num_before += len(piece)
        if piece.endswith(b"\n"):
            number, num_before = number + 1, 0


def bad_line(
    name: str, number: int, line: bytes, error: UnicodeDecodeError, *, num_before: int = 0
) -> DataError:
    """The error of a line, of which ``num_before`` bytes stand before ``line``."""
    byte = num_before + error.start + 1
    wide = (number, byte) == (1, 1) and line[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if wide else "WINDOWS-1252"
    found = "it begins like UTF-16" if wide else f"byte {byte} is 0x{line[error.start]:02x}"
    return DataError(
        f"{name}:{number}: not UTF-8: {found}",
        hint="convert it, for example "
        f"`iconv -f {encoding} -t UTF-8 {name} > utf8-{Path(name).name}`",
    )
