"""Training examples made of whole documents: windows, streams or pairs, formed when read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fulltune.data.encoding import EncodedExample, content_hash


class Documents(Protocol):
    """Encoded documents by position; an `EncodedDataset` or a `JoinedDataset`."""

    fingerprint: str

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens of each document."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> EncodedExample: ...

    def where(self, index: int, /) -> str:
        """File and line of a document."""
        ...


class ArrangedExamples(Protocol):
    """The examples of one split. Only numbers are held; tokens are read when asked for."""

    fingerprint: str
    """Hash of everything that decides the examples."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens of each example, before noise."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> EncodedExample: ...

    def where(self, index: int, /) -> str:
        """File and line of the document an example begins in."""
        ...


class JoinedExamples:
    """The arranged examples of several splits under one numbering."""

    def __init__(self, parts: Sequence[ArrangedExamples]) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *map(len, parts)])
        self.lengths = np.concatenate([np.asarray(part.lengths, np.int32) for part in parts])
        self.fingerprint = f"{content_hash(*(part.fingerprint for part in parts)) % 2**64:016x}"

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> EncodedExample:
        part, row = self._find(index)
        return part[row]

    def where(self, index: int) -> str:
        """File and line of an example."""
        part, row = self._find(index)
        return part.where(row)

    def _find(self, index: int) -> tuple[ArrangedExamples, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number], int(index - self.starts[number])
