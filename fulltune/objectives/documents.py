"""A document as the tokens of its text and nothing else, for objectives that arrange it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import Example, TextExample

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


def encode_document(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    boundaries: Callable[[Encoding, str], list[int]] | None = None,
) -> list[EncodedExample]:
    """The whole document without special tokens; none where its text has no token.

    Args:
        tokenizer: a fast tokenizer.
        example: a `TextExample`.
        boundaries: gives `EncodedExample.boundaries` from the encoding and its text.
    """
    if not isinstance(example, TextExample):
        raise TypeError(f"{type(example).__name__} is no document")
    encoding = tokenizer.backend_tokenizer.encode(example.text, add_special_tokens=False)
    if not encoding.ids:
        return []
    document_hash = content_hash(example.text)
    document = EncodedExample(
        input_ids=list(encoding.ids),
        targets=[1] * len(encoding.ids),
        token_type_ids=[],
        labels=[],
        num_removed=0,
        num_removed_targets=0,
        input_hash=document_hash,
        example_hash=document_hash,
        num_bytes=len(example.text.encode()),
        where=example.where,
    )
    if boundaries is not None:
        document["boundaries"] = boundaries(encoding, example.text)
    return [document]
