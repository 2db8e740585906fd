"""A tag for each word, on a model of any family: named entities, parts of speech.

The tag of a word is learned and read at its first token; see `word_pieces`. Tags are IOB2.

Shape suffixes: D documents, N words of all documents, C tags.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import Example, TaggingExample
from fulltune.data.word_pieces import encode_words
from fulltune.errors import DataError
from fulltune.objectives.base import (
    Batch,
    Scores,
    TooLong,
    collate_tokens,
    model_inputs,
    tokenizer_fingerprint,
)
from fulltune.objectives.causal_lm import MODEL_INPUTS, too_long_error
from fulltune.objectives.tag_decoding import decode_tags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLABELLED = -1


class TokenClassificationBatch(TypedDict):
    """A micro-batch of tagged documents.

    input_ids:      int64 [1, T] packed documents, or [B, T] right-padded where packing is off.
    target_positions: int64 [N], into the flattened tokens: the first token of each word.
    label_indices:  int64 [N], the tag of each word; ``UNLABELLED`` when only predicting.
    num_words:      int64 [D], words of each document.
    token_type_ids: int64, shaped like ``input_ids``; absent where the model has no segments.
    attention_mask: int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: document boundaries, present when packed.
    """

    input_ids: Tensor
    target_positions: Tensor
    label_indices: Tensor
    num_words: Tensor
    token_type_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


class TaggingOutput(NamedTuple):
    """What came out for one document: of each of its words that is kept."""

    predicted: list[str]
    """The likeliest tags that are valid in IOB2 together."""
    probabilities: list[float]
    """Of each predicted tag."""
    right: list[str]
    """The right tags; empty when only predicting."""
    loss_sum: float
    """Cross-entropy of the right tags, in nats; nan without them."""


@dataclass(frozen=True)
class TokenClassification:
    """Cross-entropy of one tag a word.

    Args:
        tokenizer: a fast tokenizer.
        labels: the tags of IOB2 in order.
        max_length: longest document in tokens.
        too_long: what happens to a longer one.
        packing: whether the model isolates documents packed into one row.
        label_smoothing: share of each target's probability that is spread over all tags.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    too_long: TooLong = "error"
    packing: bool = True
    label_smoothing: float = 0.0

    @property
    def head(self) -> Literal["token_classification"]:
        """A head that gives each token the scores of all tags."""
        return "token_classification"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens; tags are kept by name."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="words",
            max_length=self.max_length,
            too_long=self.too_long,
        )

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        Truncation takes words from the end.

        Raises:
            DataError: a word has no token, or the document is too long and ``too_long`` is "error".
        """
        if not isinstance(example, TaggingExample):
            raise TypeError(f"{type(example).__name__} has no words")
        pieces = encode_words(
            self.tokenizer,
            example.words,
            example.spaces,
            max_length=self.max_length,
            where=example.where,
        )
        if pieces.num_removed:
            if self.too_long == "drop":
                return []
            if self.too_long == "error":
                length = len(pieces.input_ids) + pieces.num_removed
                raise too_long_error(example.where, length, self.max_length)
        tags = example.tags or ()
        input_hash = content_hash(*example.words, *map(str, example.spaces))
        return [
            EncodedExample(
                input_ids=pieces.input_ids,
                targets=pieces.is_target,
                token_type_ids=pieces.token_type_ids,
                labels=list(tags[: pieces.num_words]),
                num_removed=pieces.num_removed,
                num_removed_targets=len(example.words) - pieces.num_words,
                input_hash=input_hash,
                example_hash=content_hash(str(input_hash), *tags),
                num_bytes=0,
                where=example.where,
            )
        ]

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `TokenClassificationBatch`.

        Raises:
            DataError: a tag the model does not have.
        """
        batch, starts_D = collate_tokens(
            examples, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        places = {label: index for index, label in enumerate(self.labels)}
        positions: list[int] = []
        indices: list[int] = []
        num_words: list[int] = []
        for start, example in zip(starts_D.tolist(), examples, strict=True):
            of_example = [
                start + place for place, target in enumerate(example["targets"]) if target
            ]
            positions += of_example
            num_words.append(len(of_example))
            if example["labels"]:
                indices += [self._index(tag, places, example) for tag in example["labels"]]
            else:
                indices += [UNLABELLED] * len(of_example)
        batch["target_positions"] = torch.tensor(positions, dtype=torch.int64)
        batch["label_indices"] = torch.tensor(indices, dtype=torch.int64)
        batch["num_words"] = torch.tensor(num_words)
        return batch

    def _index(self, tag: str, places: dict[str, int], example: EncodedExample) -> int:
        if tag not in places:
            raise DataError(
                f"{example['where']}: tag {tag!r} is not one of the model's tags: "
                f"{', '.join(self.labels)}",
                hint="add rows with this tag to the training data, or drop the row",
            )
        return places[tag]

    def num_targets(self, batch: Batch) -> int:
        """Words of the batch; each has one tag."""
        return int(batch["target_positions"].numel())

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Scores of the tags of each word before the softmax: float32 [N, C]."""
        inputs = model_inputs(batch, (*MODEL_INPUTS, "token_type_ids"))
        logits: Tensor = model(**inputs).logits
        return logits.flatten(0, 1)[batch["target_positions"]].float()

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every tag, summed and not averaged: a float32 scalar."""
        return F.cross_entropy(
            self.logits(model, batch),
            batch["label_indices"],
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy, and the valid tags of every document that are the likeliest."""
        with torch.no_grad():
            logits_NC = self.logits(model, batch)
        indices_N = batch["label_indices"]
        labelled = bool((indices_N != UNLABELLED).all())
        losses_N = (
            F.cross_entropy(logits_NC, indices_N, reduction="none")
            if labelled
            else torch.full((len(indices_N),), float("nan"))
        )
        log_probabilities_NC = logits_NC.log_softmax(dim=-1).cpu()
        ends = [0, *itertools.accumulate(batch["num_words"].tolist())]
        cuts = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
        of_documents = [log_probabilities_NC[cut] for cut in cuts]
        outputs = [
            TaggingOutput(
                predicted=[self.labels[index] for index in tags],
                probabilities=scores_TC[range(len(tags)), tags].exp().tolist(),
                right=[self.labels[index] for index in indices_N[cut].tolist()] if labelled else [],
                loss_sum=float(losses_N[cut].sum()),
            )
            for cut, scores_TC, tags in zip(
                cuts, of_documents, decode_tags(of_documents, self.labels), strict=True
            )
        ]
        return Scores(
            loss_sum=float(losses_N.sum()),
            num_targets=self.num_targets(batch),
            num_correct=sum(
                tag == right
                for output in outputs
                for tag, right in zip(output.predicted, output.right, strict=False)
            ),
            outputs=outputs,
        )
