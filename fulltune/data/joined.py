"""Several encoded data sets under one numbering, as when validation has a source of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fulltune.data.encoded_dataset import EncodedDataset, single_labels
from fulltune.data.encoding import EncodedExample, content_hash


class JoinedDataset:
    """Data sets end to end; the columns are those of `EncodedDataset`."""

    def __init__(self, parts: Sequence[EncodedDataset]) -> None:
        self.parts = tuple(parts)
        self.kind = parts[0].kind
        self.format = "; validation: ".join(dict.fromkeys(part.format for part in parts))
        self.fingerprint = (
            parts[0].fingerprint
            if len(parts) == 1
            else f"{content_hash(*(part.fingerprint for part in parts)) & (2**64 - 1):016x}"
        )
        self.starts = np.cumsum([0, *map(len, parts)])
        self.num_records = sum(part.num_records for part in parts)
        self.num_duplicates_dropped = sum(part.num_duplicates_dropped for part in parts)

        def joined(name: str) -> npt.NDArray[np.integer]:
            return np.concatenate([getattr(part, name) for part in parts])

        self.lengths = joined("lengths")
        self.num_targets = joined("num_targets")
        self.num_bytes = joined("num_bytes")
        self.num_removed = joined("num_removed")
        self.num_removed_targets = joined("num_removed_targets")
        self.input_hashes = joined("input_hashes")
        self.example_hashes = joined("example_hashes")
        self.label_names = list(dict.fromkeys(name for part in parts for name in part.label_names))
        codes = {name: code for code, name in enumerate(self.label_names)}
        places = [
            np.array([codes[name] for name in part.label_names], np.int32)[part.label_codes]
            for part in parts
        ]
        ends = np.cumsum([0, *map(len, places)])
        self.label_codes = np.concatenate(places)
        self.label_offsets = np.concatenate(
            [[0], *(end + part.label_offsets[1:] for end, part in zip(ends, parts, strict=False))]
        ).astype(np.int64)
        self.labels = single_labels(self.label_codes, self.label_offsets)
        self.references: npt.NDArray[np.float32] | None = None
        """What an example is given as its `reference`, where training computed that."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> EncodedExample:
        part, row = self._find(index)
        example = part[row]
        if self.references is not None:
            example["reference"] = json.dumps(self.references[index].tolist())
        return example

    def piece(self, index: int, start: int, stop: int) -> EncodedExample:
        """Some tokens of an example; only they are read. All that is no list is the whole's."""
        part, row = self._find(index)
        return part.piece(row, start, stop)

    def where(self, index: int) -> str:
        """File and line of an example."""
        part, row = self._find(index)
        return part.where(row)

    def _find(self, index: int) -> tuple[EncodedDataset, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number], int(index - self.starts[number])
