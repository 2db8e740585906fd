"""Next-token prediction over documents joined end to end, as GPT was pre-trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fulltune.data.arranged import ArrangedExamples, Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import Example
from fulltune.objectives.base import Batch, Scores, tokenizer_fingerprint
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.documents import encode_document

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalStream:
    """Windows of a stream of documents with an end token after each; a window sees all of itself.

    No token is filled up and none is left out, but a window may hold the end of one document and
    the beginning of the next. `CausalLM` keeps documents apart.
    """

    language_model: CausalLM

    @property
    def head(self) -> Literal["causal_lm"]:
        """The language-modelling head."""
        return "causal_lm"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the model."""
        return self.language_model.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens of a window."""
        return self.language_model.max_length

    @property
    def packing(self) -> bool:
        """Whether windows are packed into one row."""
        return self.language_model.packing

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(self.tokenizer, objective="documents")

    def encode(self, example: Example) -> list[EncodedExample]:
        """A document as it is, without special tokens."""
        return encode_document(self.tokenizer, example)

    def arrange(
        self, documents: Documents, indices: npt.NDArray[np.int64], seed: int
    ) -> ArrangedExamples:
        """The windows of the documents in a shuffled order."""
        return TokenStream(
            documents,
            indices,
            seed,
            window_tokens=self.max_length,
            end_id=self.tokenizer.eos_token_id,
        )

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """See `CausalLM.collate`."""
        return self.language_model.collate(examples)

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return self.language_model.num_targets(batch)

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed."""
        return self.language_model.loss_sum(model, batch)

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """See `CausalLM.score`."""
        return self.language_model.score(model, batch)
