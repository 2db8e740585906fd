"""Next-token prediction over documents joined end to end, as GPT was pre-trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fulltune.data.arranged import ArrangedExamples, Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import Example
from fulltune.errors import DataError, ModelError
from fulltune.objectives.base import Batch, Scores, tokenizer_fingerprint
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.documents import encode_document
from fulltune.objectives.fill_in_the_middle import NUM_ADDED, fill_in_each_document, fim_ids
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
            fill-in-the-middle in training. Windows are cut with room for the sentinels, so that no
            token is pushed out. In evaluation the text is as it is, in the windows of
            `held_out`, so that losses with and without can be compared.

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
        """Changes whenever `encode` would give other tokens, or refuse others."""
        kind = "documents without sentinels" if self.fim_rate else "documents"
        return tokenizer_fingerprint(self.tokenizer, objective=kind)

    @property
    def held_out(self) -> CausalStream:
        """The same without noise: how held-out documents are arranged."""
        return replace(self, fim_rate=0.0)

    def encode(self, example: Example) -> list[EncodedExample]:
        """A document as it is, without special tokens.

        Raises:
            DataError: with fill-in-the-middle, one of its tokens stands in the text itself.
        """
        documents = encode_document(self.tokenizer, example)
        for document in documents:
            if self.fim_rate and not set(fim_ids(self.tokenizer)).isdisjoint(document["input_ids"]):
                raise DataError(
                    f"{document['where']}: the text holds a token such as `<fim_prefix>`, which "
                    "only fill-in-the-middle may write",
                    hint="take it out of the text",
                )
        return documents

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
            room=NUM_ADDED if self.fim_rate else 0,
        )

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """See `CausalLM.collate`."""
        return self.language_model.collate([self.rearranged(example) for example in examples])

    def rearranged(self, example: EncodedExample) -> EncodedExample:
        """A window as the model reads it in training; in evaluation it stays as it is."""
        if not self.fim_rate or "noise_seed" not in example:
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
            room=self.max_length - len(example["input_ids"]),
        )
        return {**example, "input_ids": input_ids, "targets": [1] * len(input_ids)}

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return self.language_model.num_targets(batch)

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed."""
        return self.language_model.loss_sum(model, batch)

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """See `CausalLM.score`."""
        return self.language_model.score(model, batch)
