"""Texts as hashed runs of tokens, on which near duplicates and evaluation data are recognised.

A token is a word; in scripts without spaces (Chinese, Japanese, Thai and their kin) a character.
Upper and lower case, forms of one character (NFKC) and punctuation make no difference.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fulltune.data.records import read_records
from fulltune.errors import DataError

UInt64Array: TypeAlias = npt.NDArray[np.uint64]

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_EVALUATION_FILES = 2**15 - 1


def fold(text: str) -> str:
    """A text without what makes no difference between two copies: case, forms, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokens_of(folded: str) -> list[str]:
    """The tokens of a folded text."""
    return _TOKEN.findall(folded)


@lru_cache(maxsize=2**17)
def _token_hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


def hash_tokens(tokens: Sequence[str]) -> UInt64Array:
    """A 64-bit hash of each token."""
    return np.fromiter(map(_token_hash, tokens), dtype=np.uint64, count=len(tokens))


def hash_ngrams(token_hashes: UInt64Array, length: int) -> UInt64Array:
    """A 64-bit hash of every run of ``length`` tokens, in order; none if there are fewer."""
    count = len(token_hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        mixed = mixed * _MULTIPLIER + token_hashes[offset : offset + count]
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(29))


# Evaluation data


@dataclass(frozen=True, slots=True)
class EvaluationSource:
    """What was taken from one file of evaluation data."""

    source: str
    num_records: int
    num_too_short: int
    """Records of which no text is as long as an n-gram: those cannot be found in a corpus."""
    num_ngrams: int


class EvaluationNgrams:
    """The n-grams of evaluation data, and from which of its sources each comes.

    Args:
        hashes: uint64, sorted.
        sources: int16, the index of the first source that holds each.
        length: tokens of an n-gram.
    """

    def __init__(self, hashes: UInt64Array, sources: npt.NDArray[np.int16], length: int) -> None:
        self._hashes = hashes
        self._sources = sources
        self._length = length

    @classmethod
    def read(
        cls, sources: Sequence[str], length: int
    ) -> tuple[EvaluationNgrams, list[EvaluationSource]]:
        """Every text of every record, whatever its column: questions, answers, turns.

        Raises:
            DataError: a source cannot be read, or holds no n-gram at all.
        """
        assert len(sources) <= _MAX_EVALUATION_FILES
        hashes, owners, found = [], [], []
        for index, source in enumerate(sources):
            parts = [np.empty(0, dtype=np.uint64)]
            num_records = num_too_short = 0
            for record in read_records(source):
                grams = [
                    hash_ngrams(hash_tokens(tokens_of(fold(text))), length)
                    for text in _texts(record.fields)
                ]
                num_records += 1
                num_too_short += not any(len(each) for each in grams)
                parts += grams
                if len(parts) > 2**16:
                    parts = [np.unique(np.concatenate(parts))]
            distinct = np.unique(np.concatenate(parts))
            if not len(distinct):
                raise DataError(
                    f"`{source}` holds no text of {length} tokens, so that nothing of it can be "
                    "found in a corpus",
                    hint="make `decontaminate.ngram` smaller, or leave this file out",
                )
            hashes.append(distinct)
            owners.append(np.full(len(distinct), index, dtype=np.int16))
            found.append(EvaluationSource(source, num_records, num_too_short, len(distinct)))
        table, first = np.unique(np.concatenate(hashes), return_index=True)
        return cls(table, np.concatenate(owners)[first], length), found

    def save(self, folder: Path) -> None:
        """Write the arrays, for `open`."""
        np.save(folder / "evaluation-hashes.npy", self._hashes)
        np.save(folder / "evaluation-sources.npy", self._sources)

    @classmethod
    def open(cls, folder: Path, length: int) -> EvaluationNgrams:
        """Map what `save` wrote: all processes share the memory."""
        hashes = np.load(folder / "evaluation-hashes.npy", mmap_mode="r")
        return cls(hashes, np.load(folder / "evaluation-sources.npy", mmap_mode="r"), length)

    def find(self, token_hashes: UInt64Array) -> int:
        """The index of the source whose n-gram stands first in a document; -1 if there is none."""
        ngrams = hash_ngrams(token_hashes, self._length)
        if not len(ngrams):
            return -1
        places = np.minimum(np.searchsorted(self._hashes, ngrams), len(self._hashes) - 1)
        (hits,) = np.nonzero(self._hashes[places] == ngrams)
        return int(self._sources[places[hits[0]]]) if len(hits) else -1


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for each in inner:
            yield from _texts(each)
