"""Windows of a token stream in XLNet's layout, each with the tokens before it as its memory.

Shape suffix: W windows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.streams import TokenStream

# Segments as XLNet's own tokenizer numbers them; only whether two are equal matters to the model.
TEXT_SEGMENT, CLASS_SEGMENT, PADDING_SEGMENT = 0, 2, 3


class PermutationWindows:
    """Windows of a token stream in XLNet's layout, with the tokens before them as memory.

    An example's ``input_ids`` are ``[memory ... tokens ... <sep> <cls>]``; its ``targets`` are 1 on
    the tokens, so the memory is what comes before the first 1.

    Attributes:
        lengths: int32, tokens of each example with its memory.
        fingerprint: hash of all that decides the examples.
    """

    def __init__(
        self, stream: TokenStream, *, memory_length: int, sep_id: int, cls_id: int
    ) -> None:
        self._stream = stream
        self._memory_length = memory_length
        self._sep_id, self._cls_id = sep_id, cls_id
        before_W = np.cumsum(stream.lengths, dtype=np.int64) - stream.lengths
        memory_W = np.minimum(before_W, memory_length)
        self.lengths: npt.NDArray[np.int32] = (stream.lengths + memory_W + 2).astype(np.int32)
        parts = (stream.fingerprint, str(memory_length), str(sep_id), str(cls_id))
        self.fingerprint = f"{content_hash(*parts) % 2**64:016x}"

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, index: int) -> EncodedExample:
        window = self._stream[index]
        index %= len(self._stream)
        tokens, memory = window["input_ids"], list[int]()
        while index and len(memory) < self._memory_length:
            index -= 1
            memory = self._stream[index]["input_ids"] + memory
        memory = memory[max(len(memory) - self._memory_length, 0) :]
        return EncodedExample(
            input_ids=[*memory, *tokens, self._sep_id, self._cls_id],
            targets=[*[0] * len(memory), *[1] * len(tokens), 0, 0],
            token_type_ids=[*[TEXT_SEGMENT] * (len(memory) + len(tokens) + 1), CLASS_SEGMENT],
            label="",
            num_removed=0,
            num_removed_targets=0,
            input_hash=window["input_hash"],
            example_hash=window["example_hash"],
            num_bytes=0,  # a sixth of the tokens is predicted, so there are no bits per byte
            where=window["where"],
        )

    def where(self, index: int) -> str:
        """File and line of the document that a window begins in."""
        return self._stream.where(index)
