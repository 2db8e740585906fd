"""Pairs of segments of whole sentences: does the second follow the first?

The pairs of BERT (next sentence: half of the second segments are from another document) and of
ALBERT (sentence order: half of the pairs are swapped).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fulltune.config import Settings
from fulltune.data.arranged import Documents
from fulltune.data.encoding import SENTENCE_START, EncodedExample, content_hash
from fulltune.data.sections import Sections
from fulltune.errors import DataError

FOLLOWS, UNRELATED = 0, 1
"""Labels of a pair, as in transformers' heads; a swapped pair has that of an unrelated one."""

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]


class SentencePairsConfig(Settings):
    """Which pairs are made of the documents, and how much they count."""

    kind: Literal["next", "order"] = "next"
    """`next`: half of the second segments are from another document (BERT), or of a single one
    that was split in sections, from a section that does not follow. `order`: half of the pairs are
    swapped (ALBERT)."""
    copies: Annotated[int, Field(ge=1)] = 1
    """How often the documents are cut into pairs, each time with other draws."""
    short_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of passes over a document whose pairs are shorter than the longest possible, so that
    short inputs are seen too."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of the pairs beside that of the masked tokens."""


class Segment(NamedTuple):
    """Tokens ``start`` to ``end`` of a document, by its place among the given ones."""

    document: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return self.end - self.start


class Pair(NamedTuple):
    """Two segments and whether the second is not what follows the first."""

    first: Segment
    second: Segment
    label: int


class SentencePairs:
    """Pairs of the documents of one split: start, segment, separator, segment, separator.

    Only seven numbers a pair are held.

    Args:
        documents: encoded without special tokens, with their boundaries.
        indices: the documents of the split, in order.
        config: which pairs.
        max_length: longest pair in tokens, its three special tokens included.
        start_id: the token in front.
        separator_id: the token behind each segment.
        seed: decides the pairs, together with all of the above.

    Raises:
        DataError: no document has two sentences, or there is no other document to draw from.
    """

    def __init__(
        self,
        documents: Documents,
        indices: Sequence[int] | npt.NDArray[Any],
        config: SentencePairsConfig,
        *,
        max_length: int,
        start_id: int,
        separator_id: int,
        seed: int,
    ) -> None:
        self._documents = documents
        self._rows = np.asarray(indices, dtype=np.int64)
        self._start_id, self._separator_id = start_id, separator_id
        sentences = [_sentence_bounds(documents[int(row)]) for row in self._rows]
        related = _related(documents, self._rows)
        _check(documents, self._rows, sentences, related, config)
        pairs = array("i")
        generator = np.random.default_rng(np.random.SeedSequence(seed))
        for _ in range(config.copies):
            for pair in draw_pairs(sentences, config, max_length - 3, generator, related=related):
                pairs.extend((*pair.first, *pair.second, pair.label))
        self._pairs: Int32Array = np.array(pairs, dtype=np.int32).reshape(-1, 7)
        starts_and_ends = self._pairs[:, [1, 2, 4, 5]] * np.array([-1, 1, -1, 1], dtype=np.int32)
        self.lengths: Int32Array = (starts_and_ends.sum(1) + 3).astype(np.int32)
        decides = (max_length, start_id, separator_id, seed, self._rows.tobytes().hex())
        number = content_hash(
            "pairs", documents.fingerprint, config.model_dump_json(), repr(decides)
        )
        self.fingerprint = f"{number % 2**64:016x}"

    def __len__(self) -> int:
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """Where the segments of an example are, documents numbered as in ``indices``."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        numbers = self._pairs[index].tolist()
        return Pair(Segment(*numbers[0:3]), Segment(*numbers[3:6]), numbers[6])

    def __getitem__(self, index: int) -> EncodedExample:
        pair = self.pair(index)
        first, second = self._piece(pair.first), self._piece(pair.second)
        before, after = [self._start_id], [self._separator_id]
        num_first, num_second = pair.first.num_tokens + 2, pair.second.num_tokens + 1
        content = [
            *(str(first["example_hash"]), repr(pair.first[1:])),
            *(str(second["example_hash"]), repr(pair.second[1:])),
        ]
        marks = [each.get("boundaries", [0] * len(each["input_ids"])) for each in (first, second)]
        return EncodedExample(
            input_ids=[
                *(*before, *first["input_ids"], *after),
                *(*second["input_ids"], *after),
            ],
            targets=[0, *first["targets"], 0, *second["targets"], 0],
            token_type_ids=[0] * num_first + [1] * num_second,
            labels=[str(pair.label)],
            num_removed=0,
            num_removed_targets=0,
            input_hash=content_hash(*content),
            example_hash=content_hash(*content, str(pair.label)),
            num_bytes=0,
            where=first["where"],
            boundaries=[0, *marks[0], 0, *marks[1], 0],
        )

    def _piece(self, segment: Segment) -> EncodedExample:
        row = int(self._rows[segment.document])
        return self._documents.piece(row, segment.start, segment.end)

    def where(self, index: int) -> str:
        """File and line of the first segment's document."""
        return self._documents.where(int(self._rows[self.pair(index).first.document]))


def draw_pairs(
    sentences: Sequence[Int32Array],
    config: SentencePairsConfig,
    num_tokens: int,
    generator: np.random.Generator,
    *,
    related: Int64Array | None = None,
) -> Iterator[Pair]:
    """One pass over the documents, cutting each into pairs.

    Whole sentences are gathered until they are ``num_tokens`` long (in a share of the passes, a
    random shorter length), and cut at a random sentence into two segments. For the next sentence,
    the second is replaced in half of the pairs, and always if there is but one sentence, by
    sentences of another document; those it would have been are put back and are the next to be
    gathered. For the order, both are swapped in half of the pairs; two sentences are gathered at
    least, and a single one that is left at the end of a document is left out, having no order.
    What is too long loses tokens at random ends.

    Args:
        sentences: of each document, where its sentences start, and its length at the end.
        config: which pairs.
        num_tokens: most tokens of both segments.
        generator: all draws are made from it.
        related: int64 [N, 2], for each document the range of those that no wrong next sentence may
            be drawn from; None is itself alone.
    """
    least = 2 if config.kind == "order" else 1
    for document, bounds in enumerate(sentences):
        target = num_tokens
        if generator.random() < config.short_share:
            target = int(generator.integers(2, num_tokens + 1))
        num_sentences, start = len(bounds) - 1, 0
        while start + least <= num_sentences:
            end = _gather(bounds, start, target, least)
            middle = int(generator.integers(start + 1, end)) if end - start > 1 else end
            first = Segment(document, int(bounds[start]), int(bounds[middle]))
            if config.kind == "order":
                second = Segment(document, int(bounds[middle]), int(bounds[end]))
                start = end
                if generator.random() < 0.5:
                    yield _shortened(Pair(second, first, UNRELATED), num_tokens, generator)
                else:
                    yield _shortened(Pair(first, second, FOLLOWS), num_tokens, generator)
            elif middle == end or generator.random() < 0.5:
                apart = (document, document + 1) if related is None else related[document]
                second = _from_another(sentences, apart, target - first.num_tokens, generator)
                start = middle
                yield _shortened(Pair(first, second, UNRELATED), num_tokens, generator)
            else:
                second = Segment(document, int(bounds[middle]), int(bounds[end]))
                start = end
                yield _shortened(Pair(first, second, FOLLOWS), num_tokens, generator)


def _gather(bounds: Int32Array, start: int, num_tokens: int, least: int) -> int:
    """The first sentence behind as many as make ``num_tokens``, or all that are left."""
    end = int(np.searchsorted(bounds, bounds[start] + num_tokens))
    return min(max(end, start + least), len(bounds) - 1)


def _from_another(
    sentences: Sequence[Int32Array],
    apart: Sequence[int] | Int64Array,
    num_tokens: int,
    generator: np.random.Generator,
) -> Segment:
    """A segment of a document outside of the range ``apart``."""
    begin, end = map(int, apart)
    other = int(generator.integers(len(sentences) - (end - begin)))
    other += (end - begin) * (other >= begin)
    bounds = sentences[other]
    start = int(generator.integers(len(bounds) - 1))
    end = _gather(bounds, start, num_tokens, 1)
    return Segment(other, int(bounds[start]), int(bounds[end]))


def _shortened(pair: Pair, num_tokens: int, generator: np.random.Generator) -> Pair:
    """The pair without what is too long: always a token of the longer segment, at a random end."""
    first, second = pair.first, pair.second
    excess = first.num_tokens + second.num_tokens - num_tokens
    if excess <= 0:
        return pair
    uneven = min(excess, abs(first.num_tokens - second.num_tokens))
    half = (excess - uneven) // 2
    from_first = half + (uneven if first.num_tokens > second.num_tokens else 0)
    return Pair(
        _cut(first, from_first, generator), _cut(second, excess - from_first, generator), pair.label
    )


def _cut(segment: Segment, num_tokens: int, generator: np.random.Generator) -> Segment:
    in_front = int(generator.binomial(num_tokens, 0.5))
    return Segment(segment.document, segment.start + in_front, segment.end - num_tokens + in_front)


def _sentence_bounds(document: EncodedExample) -> Int32Array:
    """Where the sentences of a document start, and its length; its first token always starts one.

    Raises:
        ValueError: it was encoded without boundaries.
    """
    if "boundaries" not in document:
        raise ValueError(f"{document['where']}: encoded without the starts of sentences")
    marks = np.array(document["boundaries"], dtype=np.uint8) & SENTENCE_START
    marks[0] = SENTENCE_START
    return np.append(np.flatnonzero(marks), len(marks)).astype(np.int32)


def _related(documents: Documents, rows: Int64Array) -> Int64Array:
    """The range of rows that a document's wrong next sentences are not drawn from, [N, 2].

    It is itself. Of a section it is all of its document; where there is no other document, only
    itself and the section that follows it.
    """
    places = np.arange(len(rows), dtype=np.int64)
    if not isinstance(documents, Sections):
        return np.stack([places, places + 1], axis=1)
    document_of = documents.documents_of(rows)
    if len(rows) and (document_of != document_of[0]).any():
        # The rows ascend, so that those of one document are side by side.
        begin = np.searchsorted(document_of, document_of, side="left")
        end = np.searchsorted(document_of, document_of, side="right")
        return np.stack([begin, end], axis=1)
    is_followed = np.append(np.diff(rows) == 1, [False] * (len(rows) > 0))
    return np.stack([places, places + 1 + is_followed], axis=1)


def _check(
    documents: Documents,
    rows: npt.NDArray[np.int64],
    sentences: Sequence[Int32Array],
    related: Int64Array,
    config: SentencePairsConfig,
) -> None:
    if not len(rows):
        raise DataError("there are no documents to make pairs of sentences from")
    first = documents.where(int(rows[0]))
    if max(map(len, sentences)) < 3:
        raise DataError(
            f"{first}: neither this document nor any of the other {len(rows) - 1} has two "
            "sentences to make a pair of",
            hint="a document is one row; put the sentences of a text into one row, or train "
            "masked tokens without pairs",
        )
    if config.kind == "next" and (related[:, 1] - related[:, 0] == len(rows)).any():
        raise DataError(
            f"{first}: a single document has no other one to draw wrong next sentences from",
            hint="give two or more documents to each split, or set the pairs to `kind: order`",
        )
