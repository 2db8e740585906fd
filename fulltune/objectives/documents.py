"""A document as the tokens of its text and nothing else, for objectives that arrange it later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import Example, TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_document(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[EncodedExample]:
    """The whole document without special tokens; none where its text has no token."""
    if not isinstance(example, TextExample):
        raise TypeError(f"{type(example).__name__} is no document")
    input_ids = tokenizer.backend_tokenizer.encode(example.text, add_special_tokens=False).ids
    if not input_ids:
        return []
    document_hash = content_hash(example.text)
    return [
        EncodedExample(
            input_ids=input_ids,
            targets=[1] * len(input_ids),
            token_type_ids=[],
            label="",
            num_removed=0,
            num_removed_targets=0,
            input_hash=document_hash,
            example_hash=document_hash,
            num_bytes=len(example.text.encode()),
            where=example.where,
        )
    ]
