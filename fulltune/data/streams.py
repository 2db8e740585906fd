"""Documents as one stream of tokens, cut into windows of one length: what pre-training reads.

Nothing is padded and nothing is wasted: a window ends where the next one begins, and documents
begin and end inside windows. Only where documents start is held in memory; tokens are read from the
mapped files when a window is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fulltune.data.arranged import Documents
from fulltune.data.encoding import EncodedExample, Int32Array, Int64Array
from fulltune.data.sections import Sections
from fulltune.errors import DataError


class TokenStream:
    """Windows of ``window_tokens`` tokens, cut from documents joined in a shuffled order.

    The last window is shorter where the documents end in it, and left out where only one token is
    in it.

    Args:
        documents: what is joined. Sections of one document stay in their order, and the end token
            follows the last of them alone.
        indices: the documents of the split; the result depends on their set, not on their order.
        seed: of the order of the documents.
        window_tokens: tokens of a window, at least 2.
        end_id: the token that follows each document.
        boundaries: whether windows have those of their documents, which must be encoded with them;
            nothing begins with an end token.
        room: tokens of a window that are left free for each document in it, or part of one, so that
            what noise adds to them fits. Windows then differ a little in length.

    Attributes:
        lengths: int32, tokens of each window without its room, which noise may leave free.
        fingerprint: hash of all that decides the windows.

    Raises:
        DataError: there is not one window.
    """

    def __init__(
        self,
        documents: Documents,
        indices: Sequence[int] | npt.NDArray[np.integer],
        seed: int,
        *,
        window_tokens: int,
        end_id: int,
        boundaries: bool = False,
        room: int = 0,
    ) -> None:
        if window_tokens < 2 + 2 * room:
            raise ValueError(f"a window of {window_tokens} tokens has nothing to predict")
        self._documents = documents
        self._end_id = end_id
        self._boundaries = boundaries
        order = np.sort(np.asarray(indices, dtype=np.int64))
        fingerprint = hashlib.blake2b(digest_size=16)
        # The last part was a setting once; checkpoints made then are still to be resumed.
        decisive = [documents.fingerprint, seed, window_tokens, end_id, True]
        for part in [*decisive, room] if room else decisive:
            fingerprint.update(f"{part}\0".encode())
        fingerprint.update(order.tobytes())
        self.fingerprint = fingerprint.hexdigest()

        generator = np.random.default_rng(np.random.SeedSequence(seed & (2**64 - 1)))
        ends: npt.NDArray[np.bool_] = np.ones(len(order), dtype=np.bool_)
        if isinstance(documents, Sections):
            order = _by_document(order, documents.documents_of(order), generator)
            # Also where its end lies in another split: what follows is no part of the document.
            document_of = documents.documents_of(order)
            ends[:-1] = document_of[1:] != document_of[:-1]
        else:
            generator.shuffle(order)
        self._order: Int64Array = order
        self._has_end = ends
        self._starts: Int64Array = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(documents.lengths[order].astype(np.int64) + ends, out=self._starts[1:])
        self._bounds: Int64Array = _cut(self._starts, window_tokens, room)
        lengths = np.diff(self._bounds)
        if len(lengths) and lengths[-1] < 2:
            lengths = lengths[:-1]
        self.lengths: Int32Array = lengths.astype(np.int32)
        if not len(self.lengths):
            raise DataError(
                f"the {len(order):,} documents of this split have {int(self._starts[-1]):,} tokens "
                f"in all, less than one window of {window_tokens:,}",
                hint="give more text, or shorter windows",
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedExample:
        """A window; its bytes are those of its documents, in proportion to its tokens of each.

        The first token's are left out: only losses of next tokens are measured per byte, and it has
        nothing before it to be predicted from.
        """
        start, end, first = self._place(index)
        input_ids: list[int] = []
        boundaries: list[int] = []
        num_bytes = 0
        where = self._documents.where(int(self._order[first]))
        for place in range(first, len(self._order)):
            document_start, document_end = map(int, self._starts[place : place + 2])
            if document_start >= end:
                break
            has_end = bool(self._has_end[place])
            length = document_end - has_end - document_start
            begin, stop = max(0, start - document_start), min(length, end - document_start)
            document = self._documents.piece(int(self._order[place]), begin, stop)
            input_ids += document["input_ids"]
            if self._boundaries:
                # Nothing of a document may be left for a window but its end token.
                boundaries += document["boundaries"] if begin < stop else []
                boundaries += [0] * (has_end and end >= document_end)
            if has_end and end >= document_end:
                input_ids.append(self._end_id)
            if length:
                # Rounded down at both ends, so that the windows of a document add up to it.
                total = document["num_bytes"]
                begin = max(begin, start + 1 - document_start)
                num_bytes += max(0, total * stop // length - total * begin // length)
        digest = tokens_hash(input_ids)
        example = EncodedExample(
            input_ids=input_ids,
            targets=[1] * len(input_ids),
            token_type_ids=[],
            labels=[],
            num_removed=0,
            num_removed_targets=0,
            input_hash=digest,
            example_hash=digest,
            num_bytes=num_bytes,
            where=where,
        )
        if self._boundaries:
            example["boundaries"] = boundaries
        return example

    def where(self, index: int) -> str:
        """File and line of the document that a window begins in."""
        _, _, first = self._place(index)
        return self._documents.where(int(self._order[first]))

    def _place(self, index: int) -> tuple[int, int, int]:
        """Where a window starts and ends in the stream, and the place of its first document."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = int(index) % len(self)
        start, end = map(int, self._bounds[window : window + 2])
        return start, end, int(np.searchsorted(self._starts, start, side="right")) - 1


def _by_document(
    order: Int64Array, document_of: Int64Array, generator: np.random.Generator
) -> Int64Array:
    """Documents in a drawn order, the sections of each in their own."""
    drawn, number = np.unique(document_of, return_inverse=True)
    place = generator.permutation(len(drawn))
    return order[np.argsort(place[number], kind="stable")]


def _cut(starts: Int64Array, window_tokens: int, room: int) -> Int64Array:
    """Where windows begin in a stream, and the end of the last.

    Args:
        starts: where each document starts, and the end of the last.
        window_tokens: most tokens of a window, with its room.
        room: tokens that are left free for each document or part of one in a window.
    """
    total = int(starts[-1])
    if not room:
        return np.append(np.arange(0, total, window_tokens, dtype=np.int64), total)
    # As if the room of each document stood before its tokens.
    spaced = starts + room * np.arange(len(starts))
    bounds, document = [0], 0
    while bounds[-1] < total:
        reached = bounds[-1] + room * document + window_tokens
        document = int(np.searchsorted(spaced, reached, side="right")) - 1
        inside = max(0, reached - int(spaced[document]) - room)
        bounds.append(min(int(starts[document]) + inside, total))
    return np.array(bounds, dtype=np.int64)


def tokens_hash(tokens: Sequence[int]) -> int:
    """A number of 64 bits, signed, that says which tokens these are."""
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
