"""Where words and sentences begin among the tokens of a text."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.errors import MissingExtraError

if TYPE_CHECKING:
    from tokenizers import Encoding

_CLOSING = "[\"'”’»」』）)\\]]*"
_SENTENCE_END = re.compile(rf"[.!?…]+{_CLOSING}(?=\s)|[。！？][。！？…]*{_CLOSING}|\n+")

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def word_starts(encoding: Encoding) -> list[bool]:
    """Whether each token begins a word.

    A word is what the tokenizer splits a text into before it looks for pieces (so ``##`` pieces
    go on with a word), or what SentencePiece marks by ``▁``. A Chinese character is a word to BERT.
    """
    words: list[int | None] = encoding.word_ids
    return [
        index == 0 or word is None or word != words[index - 1] or token.startswith("▁")
        for index, (word, token) in enumerate(zip(words, encoding.tokens, strict=True))
    ]


def join_chinese_words(
    starts: Sequence[bool], offsets: Sequence[tuple[int, int]], text: str
) -> list[bool]:
    """Word starts where Chinese characters of one word, as `jieba` cuts a text, stay together.

    Args:
        starts: whether each token begins a word, by `word_starts`.
        offsets: the characters of each token.
        text: what was encoded.

    Raises:
        MissingExtraError: `jieba` is not installed.
    """
    if not _HAN.search(text):
        return list(starts)
    inside: set[int] = set()
    for word, start, end in _load_jieba().tokenize(text):
        if _HAN.search(word):
            inside.update(range(start + 1, end))
    return [
        begins and start not in inside for begins, (start, _) in zip(starts, offsets, strict=True)
    ]


def sentence_starts(text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token is the first of a sentence.

    A sentence ends with its line; behind ``.``, ``!``, ``?`` or ``…`` and closing quotes before a
    space; and behind ``。``, ``！`` or ``？`` and closing quotes. `Mr. Smith` is cut in two: the
    rule knows no abbreviations, as it has to do for all languages.

    Args:
        text: what was encoded.
        offsets: the characters of each token.
    """
    ends = np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)
    firsts = np.array([start for start, _ in offsets], dtype=np.int64)
    sentences = np.searchsorted(ends, firsts, side="right")
    starts = np.diff(sentences, prepend=-1) > 0
    return [bool(start) for start in starts]


def _load_jieba() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that jieba imports in an old way
            import jieba
    except ImportError:
        raise MissingExtraError(
            "Chinese words are found with the package `jieba`, which is not installed",
            hint="pip install 'fulltune[chinese]', or set `chinese_words: false`",
        ) from None
    jieba.setLogLevel(logging.WARNING)
    return jieba
