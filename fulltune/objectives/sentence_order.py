"""Masked tokens and, of the same input, whether its second segment follows the first.

Next-sentence prediction is BERT's (Devlin et al. 2019), sentence order ALBERT's (Lan et al. 2020).

Shape suffixes: B rows, T tokens, H hidden size, D pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.arranged import ArrangedExamples, Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.sentence_pairs import SentencePairs, SentencePairsConfig
from fulltune.data.tasks import Example
from fulltune.errors import ConfigError
from fulltune.models.families import sentence_logits
from fulltune.objectives.base import Batch, Scores
from fulltune.objectives.masked_lm import (
    MaskedBatch,
    MaskedLM,
    MaskingConfig,
    last_hidden_states,
    masked_losses,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SentenceBatch(MaskedBatch):
    """A micro-batch of pairs; it has the entries of `MaskedBatch` and three more.

    first_positions:  int64 [D], into the flattened [B * T] tokens: where each pair starts.
    sentence_labels:  int64 [D], 0 where the second segment follows the first, else 1.
    num_masked:       int64 [D], the masked tokens of each pair; they add up to N.
    """

    first_positions: Tensor
    sentence_labels: Tensor
    num_masked: Tensor


@dataclass(frozen=True)
class SentenceOrder:
    """The sum of two losses: masked tokens, and the relation of two segments.

    The papers add the mean over the masked tokens of a batch and the mean over its pairs. Here a
    step has one number of targets, its masked tokens, by which the summed loss is divided once,
    so that no cut into micro-batches or ranks changes it. Hence the loss of a pair counts as often
    as the pair has masked tokens: the step's loss is the mean over masked tokens plus ``weight``
    times the mean over pairs, weighted by their masked tokens. Among pairs of one length, which
    most are, that is the papers' sum exactly; a short pair counts less than a long one.

    Args:
        tokenizer: a fast tokenizer with tokens for mask, start and separator.
        max_length: longest pair in tokens, special tokens included.
        masking: how many tokens are chosen, and in which groups; drawn anew in each epoch.
        pairs: which pairs are made; drawn once, from the run's seed.
        packing: whether the model isolates pairs packed into one row.

    Raises:
        ModelError: the tokenizer lacks one of the tokens.
        ConfigError: ``max_length`` leaves no room for two segments.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    pairs: SentencePairsConfig = field(default_factory=SentencePairsConfig)
    packing: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 5:
            raise ConfigError(
                f"`max_length` is {self.max_length}: three special tokens leave no room for a pair",
                hint="set it to 5 or more",
            )
        _ = self._masked_lm  # sees that the tokenizer has its special tokens

    @cached_property
    def _masked_lm(self) -> MaskedLM:
        return MaskedLM(self.tokenizer, self.max_length, self.masking, self.packing)

    @property
    def head(self) -> Literal["sentence_order"]:
        """The masked-LM head and the one on pairs."""
        return "sentence_order"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return self._masked_lm.fingerprint

    def encode(self, example: Example) -> list[EncodedExample]:
        """The whole document without special tokens, as `MaskedLM.encode` gives it."""
        return self._masked_lm.encode(example)

    def arrange(
        self, documents: Documents, indices: Sequence[int] | npt.NDArray[Any], seed: int
    ) -> ArrangedExamples:
        """Pairs of segments of the documents.

        Raises:
            DataError: no document has two sentences, or there is no other document to draw from.
        """
        return SentencePairs(
            documents,
            indices,
            self.pairs,
            max_length=self.max_length,
            start_id=self.tokenizer.cls_token_id,
            separator_id=self.tokenizer.sep_token_id,
            seed=seed,
        )

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `SentenceBatch`."""
        batch, starts_D, num_masked = self._masked_lm.collate_masked(examples)
        batch["first_positions"] = starts_D
        batch["sentence_labels"] = torch.tensor([int(example["labels"][0]) for example in examples])
        batch["num_masked"] = torch.tensor(num_masked)
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Masked tokens of the batch."""
        return self._masked_lm.num_targets(batch)

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Both losses, summed over the masked tokens as said above: a float32 scalar."""
        hidden_TH = last_hidden_states(model, batch)
        masked = masked_losses(model, batch, hidden_TH).loss_sum
        return masked + self._sentence_loss_sum(_logits(model, batch, hidden_TH), batch)

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss, the masked tokens guessed, and the pairs told right."""
        with torch.no_grad():
            hidden_TH = last_hidden_states(model, batch)
            masked = masked_losses(model, batch, hidden_TH)
            logits_D2 = _logits(model, batch, hidden_TH)
            sentences = self._sentence_loss_sum(logits_D2, batch)
        labels_D = batch["sentence_labels"]
        return Scores(
            loss_sum=float(masked.cross_entropy_sum) + float(sentences),
            num_targets=self.num_targets(batch),
            num_correct=int(masked.num_correct),
            num_sentences=int(labels_D.numel()),
            sentence_loss_sum=float(sentences),
            num_sentences_correct=int((logits_D2.argmax(-1) == labels_D).sum()),
        )

    def _sentence_loss_sum(self, logits_D2: Tensor, batch: Batch) -> Tensor:
        losses_D = F.cross_entropy(logits_D2, batch["sentence_labels"], reduction="none")
        loss_sum: Tensor = (losses_D * batch["num_masked"]).sum()
        return self.pairs.weight * loss_sum


def _logits(model: PreTrainedModel, batch: Batch, hidden_TH: Tensor) -> Tensor:
    return sentence_logits(model, hidden_TH[batch["first_positions"]]).float()
