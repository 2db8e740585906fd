"""Documents cut into windows of one length, each with the model's special tokens around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fulltune.data.arranged import Documents
from fulltune.data.encoding import EncodedExample, content_hash


class Windows:
    """Consecutive windows of documents; a window never holds tokens of two documents.

    Every token of every document is in exactly one window. Only two numbers a window are held.

    Args:
        documents: encoded without special tokens.
        indices: the documents of one split, in order.
        num_tokens: most tokens of a document in a window.
        before: token ids put in front of each window; they are no targets.
        after: the same behind it.
    """

    def __init__(
        self,
        documents: Documents,
        indices: Sequence[int] | npt.NDArray[Any],
        *,
        num_tokens: int,
        before: Sequence[int],
        after: Sequence[int],
    ) -> None:
        self._documents = documents
        self._num_tokens = num_tokens
        self._before, self._after = list(before), list(after)
        rows = np.asarray(indices, dtype=np.int64)
        sizes = np.asarray(documents.lengths)[rows].astype(np.int64)
        counts = -(-sizes // num_tokens)
        self._rows = np.repeat(rows, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = (np.arange(len(self._rows)) - first) * num_tokens
        rest = np.repeat(sizes, counts) - self._starts
        added = len(self._before) + len(self._after)
        self.lengths: npt.NDArray[np.int32] = (np.minimum(rest, num_tokens) + added).astype(
            np.int32
        )
        decides = (num_tokens, self._before, self._after, rows.tobytes().hex())
        number = content_hash("windows", documents.fingerprint, repr(decides))
        self.fingerprint = f"{number % 2**64:016x}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(self._starts[index])
        document = self._documents.piece(int(self._rows[index]), start, start + self._num_tokens)
        before, after = [0] * len(self._before), [0] * len(self._after)
        window = EncodedExample(
            input_ids=[*self._before, *document["input_ids"], *self._after],
            targets=[*before, *document["targets"], *after],
            token_type_ids=[],
            labels=[],
            num_removed=0,
            num_removed_targets=0,
            input_hash=document["input_hash"],
            example_hash=content_hash(str(document["example_hash"]), str(start)),
            num_bytes=0,
            where=document["where"],
        )
        if boundaries := document.get("boundaries"):
            window["boundaries"] = [*before, *boundaries, *after]
        return window

    def where(self, index: int) -> str:
        """File and line of a window's document."""
        return self._documents.where(int(self._rows[index]))
