"""A text as words with their places, for tasks that label words.

A word is a run of letters, digits and marks; every character of a script that is written without
spaces (Chinese, Japanese, Thai and others) and every punctuation mark is a word of its own. Where
the words of the training data end in commas, a text is cut at its spaces instead.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from fulltune.data.tags import Word

# Scripts without spaces, with their punctuation and full-width forms: first and last code point.
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x30FF),  # radicals, CJK punctuation, kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)

# Not the full stop, which abbreviations end in.
_ENDS = (",", ";", ":", "!", "?")


def without_spaces(character: str) -> bool:
    """Whether a character is of a script that sets no spaces between its words."""
    code = ord(character)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _WITHOUT_SPACES)


def split_words(text: str, *, at_spaces: bool = False) -> list[Word]:
    """The words of a text in order; only spaces and invisible characters lie between them.

    Args:
        text: the text.
        at_spaces: whether punctuation stays with the word that it stands at.
    """
    words: list[Word] = []
    start: int | None = None
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        # A mark belongs to what it stands on, and also ends a character that is alone.
        if category[0] == "M" and (start is not None or (words and words[-1].end == place)):
            if start is None:
                last = words.pop()
                words.append(Word(text[last.start : place + 1], last.start, place + 1))
            continue
        if category == "Cf" and start is not None:
            continue  # a joiner or a soft hyphen is in the middle of a word
        of_word = category[0] in ("LNPS" if at_spaces else "LN") or character == "_"
        goes_on = of_word and not without_spaces(character)
        if goes_on:
            start = place if start is None else start
            continue
        if start is not None:
            words.append(Word(text[start:place], start, place))
            start = None
        if not character.isspace() and category not in ("Cc", "Cf"):
            words.append(Word(character, place, place + 1))
    if start is not None:
        words.append(Word(text[start:], start, len(text)))
    return words


def spaces_before(words: Sequence[str]) -> list[bool]:
    """Whether a space stands before each of some words, whose text is not known.

    There is one between words of scripts that are written with spaces; none where either side is of
    a script without, nor in a row that is cut into single characters, some of them of such a
    script.
    """
    single = all(len(word) == 1 for word in words)
    by_character = single and any(without_spaces(word) for word in words)
    spaces = [False] * len(words)
    for place in range(1, len(words)):
        before, word = words[place - 1], words[place]
        spaces[place] = not (by_character or without_spaces(before[-1]) or without_spaces(word[0]))
    return spaces


def end_in_commas(rows: Iterable[Sequence[str]]) -> bool:
    """Whether words were cut at spaces alone: commas and their like stand at words, not alone."""
    words = [word for row in rows for word in row if word.endswith(_ENDS)]
    return sum(len(word) > 1 for word in words) * 2 > len(words)
