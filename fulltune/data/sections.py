"""Long documents cut into sections, so that a corpus of a few books can be split at all.

A section is an example of its own for the split alone. It is not a document: a text does not end
where its section does, and the next section is what follows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fulltune.data.arranged import Documents
from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import TaskKind


class Sections:
    """Documents in pieces of at most ``num_tokens``; a view, with the columns a split needs."""

    kind: TaskKind = "text"

    def __init__(self, documents: Documents, num_tokens: int) -> None:
        self._documents, self._num_tokens = documents, num_tokens
        counts = -(-documents.lengths.astype(np.int64) // num_tokens)
        self._document = np.repeat(np.arange(len(documents)), counts)
        firsts = np.cumsum(counts) - counts
        self._start = (np.arange(len(self._document)) - firsts[self._document]) * num_tokens
        rest = documents.lengths[self._document] - self._start
        self.lengths: npt.NDArray[Any] = np.minimum(rest, num_tokens).astype(np.int32)
        self.fingerprint = f"{documents.fingerprint}-{num_tokens}-in-order"
        places = zip(self._document.tolist(), self._start.tolist(), strict=True)
        hashes = [content_hash(self.fingerprint, f"{row}:{start}") for row, start in places]
        self.input_hashes = self.example_hashes = np.array(hashes, dtype=np.int64)

    def documents_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The document that each section is of."""
        return self._document[indices]

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> EncodedExample:
        """Some tokens of a section."""
        document, before = int(self._document[index]), int(self._start[index])
        piece = self._documents.piece(document, before + start, before + stop)
        piece["input_hash"] = piece["example_hash"] = int(self.example_hashes[index])
        # The section's share of the document's bytes, rounded so that all shares add up to it.
        length, end = int(self._documents.lengths[document]), before + int(self.lengths[index])
        total = piece["num_bytes"]
        piece["num_bytes"] = total * end // length - total * before // length
        return piece

    def where(self, index: int) -> str:
        """File and line of the document."""
        return self._documents.where(int(self._document[index]))
