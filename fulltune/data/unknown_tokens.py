"""How much of the data the tokenizer cannot write: text that became its unknown token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fulltune.data.encoding import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SAMPLED = 1000
"""Most examples of a split that are read to count unknown tokens."""

MAX_SHARE = 0.05
"""Share of unknown tokens above which a user is warned. Emoji and rare signs stay below it; a
script that the tokenizer does not have is far above."""


class UnknownFacts(BaseModel):
    """Unknown tokens of a split, counted on a sample of its examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_sampled: int
    """Examples read."""
    num_tokens: int
    """Their tokens."""
    num_unknown: int
    """Those that are the unknown token."""
    where: tuple[str, ...]
    """The first examples that have one."""

    @property
    def share(self) -> float:
        """Of the tokens that were read."""
        return self.num_unknown / self.num_tokens if self.num_tokens else 0.0


class _Examples(Protocol):
    def where(self, index: int) -> str: ...
    def __getitem__(self, index: int, /) -> EncodedExample: ...


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of text that cannot be written; None where all text can.

    Tokenizers of bytes often name their end of text as the unknown token too, which they never
    make of text.
    """
    unknown = tokenizer.unk_token_id
    others = (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
        tokenizer.cls_token_id, tokenizer.sep_token_id,
    )  # fmt: skip
    return int(unknown) if unknown is not None and unknown not in others else None


def count_unknown(
    dataset: _Examples, indices: npt.NDArray[np.integer], token_id: int, *, num_shown: int
) -> UnknownFacts:
    """Count the unknown token in examples spread over a split."""
    positions = np.linspace(0, len(indices) - 1, min(len(indices), NUM_SAMPLED)).astype(int)
    num_tokens = num_unknown = 0
    where: list[str] = []
    for index in indices[positions].tolist():
        ids = np.asarray(dataset[index]["input_ids"])
        found = int((ids == token_id).sum())
        num_tokens, num_unknown = num_tokens + len(ids), num_unknown + found
        if found and len(where) < num_shown:
            where.append(dataset.where(index))
    return UnknownFacts(
        num_sampled=len(positions),
        num_tokens=num_tokens,
        num_unknown=num_unknown,
        where=tuple(where),
    )
