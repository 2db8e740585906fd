"""What an objective must offer to the step, the evaluation and the preview.

An objective is the one place where data meets model: `encode` turns an example into tokens,
`collate` turns encoded examples into the tensors of one forward pass, `loss_sum` scores them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fulltune.data.arranged import ArrangedExamples, Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import Example
from fulltune.models.attention import make_document_kwargs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fulltune.models.loading import Head
    from fulltune.objectives.linear_cross_entropy import LossSums

Batch: TypeAlias = dict[str, Any]
"""A micro-batch: each objective's own TypedDict says what is in it."""

TooLong: TypeAlias = Literal["error", "truncate", "drop"]


PACKED_MULTIPLE = 32
"""A packed row is filled up to a multiple of this by a document of padding that nothing attends to
and nothing is trained on. oneDNN compiles and keeps a kernel for each shape of a product: with a
new length at every step it would compile all the time and its cache would grow for minutes."""


@dataclass
class Scores:
    """What a forward pass without gradients measured, as sums that add up over batches."""

    loss_sum: float
    num_targets: int
    num_correct: int = 0
    num_sentences: int = 0
    """Pairs of sentences whose relation was predicted, and how many rightly."""
    num_sentences_correct: int = 0
    sentence_loss_sum: float = 0.0
    """What of ``loss_sum`` is theirs and no loss of tokens."""
    outputs: list[Any] = field(default_factory=list)
    """Where metrics and predictions need more than sums: what came out for each document, in the
    order of the batch and on the CPU. The objective says what it is."""


class DocumentScore(NamedTuple):
    """What came out for a document whose targets are tokens, or for a window of one."""

    loss: float
    """Cross-entropy summed over its targets, in nats."""
    num_targets: int
    num_correct: int


def token_scores(sums: LossSums, document_targets: Sequence[int]) -> Scores:
    """The scores of an objective whose targets are tokens, without smoothing and z-loss.

    Args:
        sums: of the targets of all documents, one document after another.
        document_targets: how many each document has.

    Returns:
        Scores with a `DocumentScore` for each document as their ``outputs``.
    """
    counts = list(document_targets)
    losses = sums.cross_entropy_N.double().cpu().split(counts)
    correct = sums.is_correct_N.cpu().split(counts)
    return Scores(
        loss_sum=float(sums.cross_entropy_sum),
        num_targets=sum(counts),
        num_correct=int(sums.num_correct),
        outputs=[
            DocumentScore(float(losses_N.sum()), count, int(correct_N.sum()))
            for losses_N, count, correct_N in zip(losses, counts, correct, strict=True)
        ],
    )


class Objective(Protocol):
    """Encode, collate, score. Instances are immutable and can be sent to worker processes."""

    @property
    def head(self) -> Head:
        """Which head the model is loaded with."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the model."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of the longest example."""
        ...

    @property
    def packing(self) -> bool:
        """Whether a batch is documents packed into one row, and not rows that are filled up."""
        ...

    def encode(self, example: Example) -> list[EncodedExample]:
        """Tokens of an example; several where a document is cut into windows, none if dropped."""
        ...

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass, on the CPU."""
        ...

    def num_targets(self, batch: Batch) -> int:
        """Positions or labels of the batch that have a loss."""
        ...

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The loss summed over the targets of the batch: a float32 scalar."""
        ...

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss and what the metrics need, without gradients."""
        ...


class ArrangingObjective(Objective, Protocol):
    """An objective whose examples are made of whole documents, once these are split."""

    def arrange(
        self, documents: Documents, indices: npt.NDArray[np.int64], seed: int
    ) -> ArrangedExamples:
        """The examples of the documents of one split; they are read when asked for."""
        ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def collate_tokens(
    examples: Sequence[EncodedExample], *, packing: bool, padding: int
) -> tuple[Batch, Tensor]:
    """What the model's forward takes, for documents packed into one row or padded to one length.

    Args:
        examples: the documents.
        packing: end to end in one row with their boundaries, or one a row with a mask.
        padding: the token to the right of a shorter document.

    Returns:
        ``input_ids`` int64 [1, T] or [B, T], ``token_type_ids`` alike where the examples have them,
        and the boundaries or the ``attention_mask``; and where each document starts in the
        flattened tokens, int64 [D].
    """
    lengths = [len(example["input_ids"]) for example in examples]
    names: list[Literal["input_ids", "token_type_ids"]] = ["input_ids"]
    if examples[0]["token_type_ids"]:
        names.append("token_type_ids")
    if packing:
        filler = -sum(lengths) % PACKED_MULTIPLE
        batch: Batch = {
            name: torch.tensor(
                [
                    [value for example in examples for value in example[name]]
                    + [padding * (name == "input_ids")] * filler
                ]
            )
            for name in names
        }
        documents = [*lengths, filler] if filler else lengths
        batch |= make_document_kwargs(documents, torch.device("cpu"))
        return batch, torch.tensor([0, *lengths[:-1]]).cumsum(0)
    longest = max(lengths)
    batch = {
        name: torch.tensor(
            [
                [*example[name], *[padding * (name == "input_ids")] * (longest - length)]
                for example, length in zip(examples, lengths, strict=True)
            ]
        )
        for name in names
    }
    mask_BT = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    batch["attention_mask"] = mask_BT.long()
    return batch, torch.arange(len(examples)) * longest


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, **settings: object) -> str:
    """Address of everything that decides the tokens of an example."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()


def model_inputs(batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The entries of a batch that go to the model's forward."""
    return {name: batch[name] for name in names if name in batch}
