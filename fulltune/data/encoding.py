"""Examples as token ids: made in parallel worker processes, cached under their content's address.

Every objective encodes into the same columns, so that packing, batching, checks and previews are
written once for all tasks.
"""

from __future__ import annotations

from typing import TypedDict


class EncodedExample(TypedDict):
    """One example as tokens, after truncation.

    input_ids:          the tokens, special tokens included; at least one.
    targets:            as long as ``input_ids``; 1 where the token itself is to be learned (it is
                        predicted from the tokens before it), else 0. All 0 for classification.
    token_type_ids:     segment ids as long as ``input_ids``, or empty where the model has none.
    label:              the class by name; "" where the task has none.
    num_removed:        tokens that truncation removed.
    num_removed_targets: targets among them.
    input_hash:         signed 64-bit hash of what the model is given (prompt, or text and pair).
    example_hash:       signed 64-bit hash of input and target together; equal for exact duplicates.
    num_bytes:          UTF-8 bytes of the trained text (bits per byte), 0 for classification.
    where:              file and line of the record, ``train.jsonl:17``.
    """

    input_ids: list[int]
    targets: list[int]
    token_type_ids: list[int]
    label: str
    num_removed: int
    num_removed_targets: int
    input_hash: int
    example_hash: int
    num_bytes: int
    where: str
