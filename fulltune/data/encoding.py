"""Examples as token ids: the columns that every objective encodes into.

They are the same for all tasks, so that packing, batching, checks and previews are written once.
"""

from __future__ import annotations

import hashlib
from typing import NotRequired, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]


class EncodedExample(TypedDict):
    """One example as tokens, after truncation.

    input_ids:          the tokens, special tokens included; at least one.
    targets:            as long as ``input_ids``; 1 where the token itself is to be learned (it is
                        predicted from the tokens before it) or has a label, else 0. All 0 where
                        labels are of the whole example.
    token_type_ids:     segment ids as long as ``input_ids``, or empty where the model has none.
    labels:             the classes by name: none, one, several of the whole example, or one for
                        each target token, in order.
    num_removed:        tokens that truncation removed.
    num_removed_targets: targets among them.
    input_hash:         signed 64-bit hash of what the model is given (prompt, or text and pair).
    example_hash:       signed 64-bit hash of input and target together; equal for exact duplicates.
    num_bytes:          UTF-8 bytes of the trained text (bits per byte), 0 for classification.
    where:              file and line of the record, ``train.jsonl:17``.
    noise_seed:         seed of what is random about the example in this epoch; set in training by
                        whoever takes it from the data, absent in evaluation.
    reference:          what metrics compare answers with, in the objective's own words; absent
                        where labels or tokens are all there is to compare.
    boundaries:         as long as ``input_ids``, absent where no objective asks for it: the sum of
                        `WORD_START` and `SENTENCE_START` where a token begins one.
    """

    input_ids: list[int]
    targets: list[int]
    token_type_ids: list[int]
    labels: list[str]
    num_removed: int
    num_removed_targets: int
    input_hash: int
    example_hash: int
    num_bytes: int
    where: str
    noise_seed: NotRequired[int]
    reference: NotRequired[str]
    boundaries: NotRequired[list[int]]


WORD_START = 1
SENTENCE_START = 2


def content_hash(*parts: str) -> int:
    """Signed 64-bit hash of texts, the same everywhere; ``("ab", "c")`` is not ``("a", "bc")``."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)
