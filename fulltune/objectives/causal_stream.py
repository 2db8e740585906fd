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
from fulltune.errors import ModelError
from fulltune.objectives.base import Batch, Scores, tokenizer_fingerprint
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.documents import encode_document
from fulltune.objectives.fill_in_the_middle import fill_in_each_document, fim_ids
from fulltune.objectives.noise import noise_generator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalStream:
    """Windows of a stream of documents with an end token after each; a window sees all of itself.

    No token is filled up and none is left out, but a window may hold the end of one document and
    the beginning of the next. `CausalLM` keeps documents apart.

    Args:
        language_model: the loss, and the length of a window.
        fim_rate: share of the documents, or of their parts in a window, that are written for
            fill-in-the-middle in training. The sentinels push the last tokens out of the window. In
            evaluation the text is as it is, so that losses with and without can be compared.

    Raises:
        ModelError: the tokenizer lacks an end token, or the sentinels of fill-in-the-middle.
    """

    language_model: CausalLM
    fim_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of `{self.tokenizer.name_or_path}` has no `eos_token`, which ends "
                "each document of a stream",
                hint="use a tokenizer made for GPT (`--family gpt`), or name the token in "
                "tokenizer_config.json",
            )
        if self.fim_rate:
            fim_ids(self.tokenizer)

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
        if self.fim_rate:
            examples = [self._rearranged(example) for example in examples]
        return self.language_model.collate(examples)

    def _rearranged(self, example: EncodedExample) -> EncodedExample:
        if "noise_seed" not in example:
            return example
        prefix_id, middle_id, suffix_id = fim_ids(self.tokenizer)
        input_ids = fill_in_each_document(
            example["input_ids"],
            noise_generator(example),
            rate=self.fim_rate,
            prefix_id=prefix_id,
            middle_id=middle_id,
            suffix_id=suffix_id,
            end_id=self.tokenizer.eos_token_id,
        )[: len(example["input_ids"])]
        return {**example, "input_ids": input_ids}

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return self.language_model.num_targets(batch)

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed."""
        return self.language_model.loss_sum(model, batch)

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """See `CausalLM.score`."""
        return self.language_model.score(model, batch)
