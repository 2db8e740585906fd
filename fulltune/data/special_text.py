"""Special tokens that stand as text in a message: found, and encoded as the text that they are.

A chat template renders a conversation to one string, and a tokenizer reads `<|im_end|>` anywhere in
it as the token that ends a turn, whoever wrote it. So such texts are marked in the messages before
they are rendered, by characters that Unicode sets aside for use inside a program, and what is
marked is later encoded letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from fulltune.data.tasks import Message
from fulltune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""First character and the one after the last."""

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and a copy of it for which their text is plain text."""

    ids: dict[str, int]
    """All of them: an end of turn need not be the tokenizer's eos or have a name of its own."""
    flags: dict[str, AddedToken]
    backend: Tokenizer
    starts: re.Pattern[str]
    lengths: tuple[int, ...]
    """Longest first, as the tokenizer takes the longest that fits."""
    copies: dict[str, tuple[Tokenizer, dict[int, int]]] = field(default_factory=dict)

    def find(self, text: str, start: int = 0, stop: int | None = None) -> Iterator[Span]:
        """Where special tokens stand in a part of a text."""
        stop = len(text) if stop is None else stop
        while (begin := self.starts.search(text, start, stop)) is not None:
            start = begin.start()
            for length in self.lengths:
                if start + length <= stop and text[start : start + length] in self.ids:
                    yield start, start + length
                    start += length
                    break
            else:
                start += 1

    def plain_copy(self, mark: str) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that reads special tokens as text, and stand-ins for them as the tokens.

        The stand-in of token 7 is a 7 between two marks. It splits a text as the token itself does,
        so that the text beside it becomes the same tokens.

        Returns:
            The tokenizer, and the id of each stand-in -> the id of its special token.
        """
        if mark not in self.copies:
            copy = Tokenizer.from_str(self.backend.to_str())
            copy.encode_special_tokens = True
            stand_ins = {f"{mark}{index}{mark}": token for token, index in self.ids.items()}
            copy.add_tokens(
                [
                    AddedToken(
                        stand_in,
                        lstrip=self.flags[token].lstrip if token in self.flags else False,
                        rstrip=self.flags[token].rstrip if token in self.flags else False,
                        normalized=False,
                    )
                    for stand_in, token in stand_ins.items()
                ]
            )
            numbers = copy.get_vocab()
            ids_of_stand_ins = {numbers[name]: self.ids[token] for name, token in stand_ins.items()}
            self.copies[mark] = copy, ids_of_stand_ins
        return self.copies[mark]


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, SpecialTokens]] = WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a tokenizer; found once."""
    known = _KNOWN.get(tokenizer)
    if known is not None and known[0] == len(tokenizer):
        return known[1]
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items()}
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    ids |= {token.content: index for index, token in added.items() if token.special}
    first = "".join(sorted({re.escape(token[0]) for token in ids if token}))
    found = SpecialTokens(
        ids,
        {token.content: token for token in added.values()},
        tokenizer.backend_tokenizer,
        re.compile(f"[{first}]" if first else r"(?!)"),
        tuple(sorted({len(token) for token in ids if token}, reverse=True)),
    )
    _KNOWN[tokenizer] = (len(tokenizer), found)
    return found


def refuse_special_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> None:
    """Refuse a conversation whose messages hold the text of a special token.

    Raises:
        DataError: naming the first, with file and line.
    """
    special = special_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        for start, stop in special.find(message.content):
            raise DataError(
                f"{where}: the text of turn {number} (`{message.role}`) holds "
                f"`{message.content[start:stop]}`, which is a special token of this model",
                hint="take it out: the chat template writes such tokens itself, and text that was "
                "rendered before must be plain turns again; if these letters are meant, set "
                "`task.special_tokens: text`",
            )


def refuse_special_text_in(
    tokenizer: PreTrainedTokenizerBase, text: str, *, name: str, where: str
) -> None:
    """Refuse a field of a row that holds the text of a special token.

    Raises:
        DataError: naming the first, with file and line.
    """
    for start, stop in special_tokens(tokenizer).find(text):
        raise DataError(
            f"{where}: `{name}` holds `{text[start:stop]}`, which is a special token of this model",
            hint="take it out, or, if these letters are meant, set `task.special_tokens: text`",
        )


def encode_between(
    tokenizer: PreTrainedTokenizerBase, text: str, *, before: str = "", after: str = ""
) -> tuple[list[int], list[Span]]:
    """Tokens of a text between two others, and their places in all of it.

    Special tokens of ``before`` and ``after`` are the tokens; those in ``text`` are text.
    """
    start = len(before)
    spans = [(start + first, start + last) for first, last in special_tokens(tokenizer).find(text)]
    if spans:
        return encode_beside_special_text(tokenizer, before + text + after, spans)
    encoding = tokenizer.backend_tokenizer.encode(before + text + after, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)


@dataclass(frozen=True, slots=True)
class Marks:
    """The two characters around a text that is to stay text."""

    opening: str
    closing: str

    def remove(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """The text without marks, and where the marked texts stand in it."""
        parts: list[str] = []
        spans: list[Span] = []
        length, opened = 0, None
        for part in re.split(f"([{self.opening}{self.closing}])", text):
            if part == self.opening:
                opened = length
            elif part == self.closing:
                if opened is not None:
                    spans.append((opened, length))
                opened = None
            else:
                parts.append(part)
                length += len(part)
        return "".join(parts), tuple(spans)


def mark_special_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> tuple[Sequence[Message], Marks | None]:
    """Mark the texts of special tokens in messages; no marks where there are none.

    Raises:
        DataError: the messages hold every character that could mark them.
    """
    special = special_tokens(tokenizer)
    found = [list(special.find(message.content)) for message in messages]
    if not any(found):
        return messages, None
    marks = Marks(*_unused("".join(message.content for message in messages), 2, where))
    return [
        replace(message, content=_marked(message.content, spans, marks))
        for message, spans in zip(messages, found, strict=True)
    ], marks


def encode_beside_special_text(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[Span]]:
    """Token ids and their places in the text, where special tokens in ``spans`` are plain text.

    Raises:
        DataError: to this tokenizer a special token is a piece like any other, which it finds in
            plain text too.
    """
    special = special_tokens(tokenizer)
    (mark,) = _unused(text, 1, "the conversation")
    parts: list[str] = []
    origins: list[int] = []  # of each character of the parts
    position = 0

    def keep(until: int) -> None:
        parts.append(text[position:until])
        origins.extend(range(position, until))

    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        for start, stop in special.find(text, begin, end):
            keep(start)
            parts.append(f"{mark}{special.ids[text[start:stop]]}{mark}")
            origins.extend([start] * len(parts[-1]))
            position = stop
    keep(len(text))
    origins.append(len(text))
    backend, ids_of_stand_ins = special.plain_copy(mark)
    encoding = backend.encode("".join(parts), add_special_tokens=False)
    written = {text[start:stop] for start, stop in spans} - {tokenizer.unk_token}
    taken = {special.ids[token] for token in written} & set(encoding.ids)
    if taken:
        token = tokenizer.convert_ids_to_tokens(min(taken))
        raise DataError(
            f"a message holds `{token}`, which this tokenizer takes for the token even so",
            hint="take it out of the message",
        )
    return (
        [ids_of_stand_ins.get(index, index) for index in encoding.ids],
        [(origins[start], origins[end]) for start, end in encoding.offsets],
    )


def _unused(text: str, count: int, where: str) -> list[str]:
    unused = [character for character in _NONCHARACTERS if character not in text]
    if len(unused) < count:
        raise DataError(
            f"{where}: holds the characters that Unicode reserves for use inside a program "
            "(U+FDD0 to U+FDEF)",
            hint="take them out; no text has them",
        )
    return unused[:count]


def _marked(text: str, spans: Sequence[Span], marks: Marks) -> str:
    parts: list[str] = []
    position = 0
    for start, stop in spans:
        parts += [text[position:start], marks.opening, text[start:stop], marks.closing]
        position = stop
    return "".join([*parts, text[position:]])
