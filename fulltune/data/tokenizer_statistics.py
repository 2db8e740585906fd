"""What a tokenizer makes of a text: how long it gets, and what it cannot write."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fulltune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_LONGEST = 10
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class TokenizerStatistics:
    """Measured on texts, without the special tokens around them."""

    vocab_size: int
    """Tokens with an id, added ones included."""
    num_documents: int
    num_characters: int
    num_bytes: int
    """Of the text in UTF-8."""
    num_tokens: int
    num_distinct_tokens: int
    """Tokens of the vocabulary that the text used."""
    tokens_per_byte: float
    bytes_per_token: float
    coverage: float
    """Share of the characters, white space left out, that are not part of an unknown token."""
    longest_tokens: tuple[str, ...]
    """Of those that the text used, as text; longest in characters first."""

    def to_json(self) -> dict[str, Any]:
        """As plain values, in the order of the fields."""
        return asdict(self)


def measure_tokenizer(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]
) -> TokenizerStatistics:
    """Read every document once; memory stays flat.

    Raises:
        DataError: there is no document, or none gives a token.
    """
    backend = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    num_documents = num_characters = num_bytes = num_visible = num_unknown = 0
    counts: Counter[int] = Counter()
    stream = iter(documents)
    while texts := list(itertools.islice(stream, _BATCH_DOCUMENTS)):
        for text, encoding in zip(
            texts, backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            num_documents += 1
            num_characters += len(text)
            num_bytes += len(text.encode())
            num_visible += _count_visible(text)
            counts.update(encoding.ids)
            if unknown is not None and unknown in encoding.ids:
                spans = zip(encoding.ids, encoding.offsets, strict=True)
                num_unknown += sum(
                    _count_visible(text[start:end]) for id, (start, end) in spans if id == unknown
                )
    num_tokens = counts.total()
    if num_tokens == 0:
        raise DataError("there is no text to measure on", hint="give documents that hold text")
    special = set(tokenizer.all_special_ids)
    shown = {id: str(tokenizer.decode([id])).strip() for id in counts if id not in special}
    longest = sorted(shown, key=lambda id: (-len(shown[id]), -counts[id], id))
    return TokenizerStatistics(
        vocab_size=len(tokenizer),
        num_documents=num_documents,
        num_characters=num_characters,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        num_distinct_tokens=len(counts),
        tokens_per_byte=num_tokens / num_bytes,
        bytes_per_token=num_bytes / num_tokens,
        coverage=1 - num_unknown / max(num_visible, 1),
        longest_tokens=tuple(shown[id] for id in longest[:NUM_LONGEST]),
    )


def _count_visible(text: str) -> int:
    return sum(map(len, text.split()))
