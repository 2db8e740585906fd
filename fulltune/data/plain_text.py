"""Plain text cut into documents, and lines of a bounded length; nothing here holds a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, AnyStr

from fulltune.errors import DataError

LIMIT_HINT = "cut it into shorter documents, or raise `longest_document`"

# A longer plain text is cut into documents at paragraphs, so that it is never held as a whole.
TEXT_DOCUMENT_CHARACTERS = 4 * 2**20


def whole_text(stream: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole file is one document; a long one is cut at paragraphs, losing no character."""
    line, pending = 1, ""
    while block := stream.read(TEXT_DOCUMENT_CHARACTERS):
        pending += block
        if len(pending) <= TEXT_DOCUMENT_CHARACTERS:
            continue
        document, pending = _cut_at_paragraph(pending)
        yield line, {"text": document}
        line += document.count("\n")
    if pending.strip():
        yield line, {"text": pending}


def _cut_at_paragraph(text: str) -> tuple[str, str]:
    for boundary in ("\n\n", "\n", " "):
        end = text.rfind(boundary)
        if end > 0:
            end += len(boundary)
            return text[:end], text[end:]
    return text, ""


def split_documents(
    stream: IO[str], boundary: str, *, longest: int | None, name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The documents of a plain text with the line each begins at.

    Args:
        stream: the text, opened with universal line ends.
        boundary: `line`, `blank_line`, or what stands alone on the line between two documents.
        longest: most characters of a document; null for no limit.
        name: the file, for messages.

    Raises:
        DataError: a document is longer, with the line it begins at.
    """
    lines: list[str] = []
    start, num_characters = 1, 0
    most = -1 if longest is None else longest + 2
    number = 0
    while line := stream.readline(most):
        number += 1
        if _ends_document(line, boundary):
            if "".join(lines).strip():
                yield start, {"text": "".join(lines).rstrip("\n")}
            lines, num_characters = [], 0
            continue
        if not lines:
            start = number
        lines.append(line)
        num_characters += len(line.rstrip("\n"))
        if longest is not None and num_characters > longest:
            raise DataError(
                f"{name}:{start}: a document of more than {longest:,} characters", hint=LIMIT_HINT
            )
        if boundary == "line":
            if line.strip():
                yield number, {"text": line.rstrip("\n")}
            lines, num_characters = [], 0
    if "".join(lines).strip():
        yield start, {"text": "".join(lines).rstrip("\n")}


def _ends_document(line: str, boundary: str) -> bool:
    if boundary == "line":
        return False
    if boundary == "blank_line":
        return not line.strip()
    return line.rstrip("\n") == boundary


def bounded_lines(
    stream: IO[AnyStr], most: int, name: str, *, hint: str = LIMIT_HINT
) -> Iterator[AnyStr]:
    """The lines of a file, none of which is held if it is longer than ``most``.

    Args:
        stream: bytes, or text.
        most: bytes or characters of a line, its end included.
        name: the file, for messages.
        hint: what to do about a longer line.

    Raises:
        DataError: a line is longer.
    """
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            unit = "bytes" if isinstance(line, bytes) else "characters"
            raise DataError(f"{name}:{number}: a line of more than {most:,} {unit}", hint=hint)
        yield line
