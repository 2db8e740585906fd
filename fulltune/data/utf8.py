"""Where a file is not UTF-8: the line, the byte, and how to convert it.

The encoding is guessed only where the line decodes as it into characters of daily use. Of a wrong
one `iconv` makes other characters without a word, so that a guess must not be a habit.
"""

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
    encoding = "UTF-16" if wide else guess_encoding(line)
    found = "it begins like UTF-16" if wide else f"byte {byte} is 0x{line[error.start]:02x}"
    return DataError(f"{name}:{number}: not UTF-8: {found}", hint=how_to_convert(name, encoding))


def guess_encoding(line: bytes) -> str | None:
    """`GB18030`, `BIG5` or `SHIFT_JIS`, where nearly all of the line is common in it; else None."""
    shares = {name: _common_share(line, codec) for name, codec in _CODECS.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _LEAST_SHARE else None


_CODECS = {"GB18030": "gb18030", "BIG5": "big5", "SHIFT_JIS": "cp932"}
_LEAST_SHARE = 0.8


def _common_share(line: bytes, codec: str) -> float:
    """The share of the characters outside ASCII that a text of this encoding is mostly made of."""
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        text = decoder.decode(line)  # not final: a long line is cut anywhere
    except UnicodeDecodeError:
        return 0.0
    wide = [character for character in text if not character.isascii()]
    if not wide:
        return 0.0
    return sum(_is_common(character.encode(codec), codec) for character in wide) / len(wide)


def _is_common(code: bytes, codec: str) -> bool:
    if len(code) != 2:
        return False
    if codec == "gb18030":  # GB 2312: punctuation, full width, and the 3755 most frequent
        return code[1] >= 0xA1 and (code[0] in (0xA1, 0xA3) or 0xB0 <= code[0] <= 0xD7)
    if codec == "big5":  # punctuation, and the 5401 most frequent
        return code[0] in (0xA1, 0xA2) or 0xA4 <= code[0] <= 0xC6
    # Punctuation and kana, and the 2965 most frequent.
    return 0x81 <= code[0] <= 0x83 or 0x88 <= code[0] <= 0x98


def how_to_convert(name: str, encoding: str | None) -> str:
    """The command, with the encoding it is probably in."""
    command = f"`iconv -f {encoding or 'ENCODING'} -t UTF-8 {name} > utf8-{Path(name).name}`"
    if encoding is None:
        return (
            f"convert it by {command}, where ENCODING is the one it was saved in, for example "
            "WINDOWS-1252 (Western) or GB18030 (Chinese Excel)"
        )
    guessed = "" if encoding == "UTF-16" else f"; it looks like {encoding}, so read the result"
    return f"convert it, for example by {command}{guessed}"
