"""Direct preference optimization (Rafailov et al., 2023) of all weights, without a second model.

The loss of a pair is -log sigmoid(m), where the margin m is beta times how much more the chosen
answer's log-probability rose than the rejected one's since training began. What both were then is
computed once, before the first step, and kept with the examples (`EncodedExample.reference`).

Shape suffixes: D documents (two a pair), P pairs, N targets, B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import ChatExample, Example, PreferenceExample
from fulltune.errors import DataError
from fulltune.objectives.base import Batch, Scores, model_inputs
from fulltune.objectives.causal_lm import MODEL_INPUTS, CausalBatch, CausalLM
from fulltune.objectives.linear_cross_entropy import LossSums
from fulltune.objectives.plain_head import logit_scale, plain_head_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOSEN, REJECTED = 0, 1
"""Segment ids of an encoded pair's tokens."""


class PreferenceBatch(CausalBatch):
    """A micro-batch of pairs: document 2p is the chosen answer of pair p, 2p + 1 the rejected one.

    target_documents: int64 [N], the document of each target.
    reference:      float32 [P, 2], the log-probabilities of both when training began; NaN where
                    they are not known yet.
    """

    target_documents: Tensor
    reference: Tensor


class PreferenceOutput(NamedTuple):
    """What came out for one pair."""

    margin: float
    """Beta times how much more the chosen answer gained than the rejected one."""


@dataclass(frozen=True)
class Preference(CausalLM):
    """The loss of a preferred answer against another one to the same prompt.

    Tokens that both answers begin with cancel and are not targets.

    Args:
        beta: how dear it is to move away from where training began.
        label_smoothing: how often a pair is taken to be the wrong way round (Mitchell, 2023).
    """

    beta: float = 0.1

    def encode(self, example: Example) -> list[EncodedExample]:
        """Both conversations end to end as one example, or none if one was too long and is dropped.

        Raises:
            DataError: both answers are the same, or as `CausalLM.encode`.
        """
        if not isinstance(example, PreferenceExample):
            raise TypeError(f"{type(example).__name__} has no preferred answer")
        sides = [
            super(Preference, self).encode(ChatExample(messages, example.where))
            for messages in (example.chosen, example.rejected)
        ]
        if not all(sides):
            return []
        chosen, rejected = (side[0] for side in sides)
        if chosen["input_ids"] == rejected["input_ids"]:
            raise DataError(
                f"{example.where}: the chosen and the rejected answer are the same",
                hint="drop the row, or raise `task.max_length` where both were cut"
                if chosen["num_removed"]
                else "drop the row",
            )
        shared = 0
        for one, other in zip(chosen["input_ids"], rejected["input_ids"], strict=False):
            if one != other:
                break
            shared += 1
        return [
            EncodedExample(
                input_ids=chosen["input_ids"] + rejected["input_ids"],
                targets=[
                    target if place >= shared else 0
                    for side in (chosen, rejected)
                    for place, target in enumerate(side["targets"])
                ],
                token_type_ids=[CHOSEN] * len(chosen["input_ids"])
                + [REJECTED] * len(rejected["input_ids"]),
                labels=[],
                num_removed=chosen["num_removed"] + rejected["num_removed"],
                num_removed_targets=chosen["num_removed_targets"] + rejected["num_removed_targets"],
                input_hash=chosen["input_hash"],
                example_hash=content_hash(
                    str(chosen["example_hash"]), str(rejected["example_hash"])
                ),
                num_bytes=0,
                where=example.where,
            )
        ]

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `PreferenceBatch`."""
        documents = [side for example in examples for side in _sides(example)]
        batch = super().collate(documents)
        counts_D = torch.tensor([sum(document["targets"][1:]) for document in documents])
        batch["target_documents"] = torch.repeat_interleave(counts_D)
        unknown = [float("nan")] * 2
        batch["reference"] = torch.tensor(
            [
                json.loads(example["reference"]) if "reference" in example else unknown
                for example in examples
            ]
        )
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Pairs of the batch."""
        return len(batch["reference"])

    def log_probabilities(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Of the chosen and the rejected answer of each pair: float32 [P, 2], without gradients."""
        with torch.no_grad():
            return self._log_probabilities(model, batch, _hidden_states(model, batch))

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The loss of every pair, summed and not averaged: a float32 scalar.

        The gradient of a pair's loss is that of its two cross-entropies, weighted; the weights need
        the log-probabilities first, so the vocabulary is passed twice, and logits are never held.
        """
        hidden_BTH = _hidden_states(model, batch)
        with torch.no_grad():
            margins_P = self._margins(
                self._log_probabilities(model, batch, hidden_BTH.detach()), batch
            )
            losses_P = self._losses_of(margins_P)
            right, wrong = 1 - self.label_smoothing, self.label_smoothing
            slopes_P = self.beta * (
                right * torch.sigmoid(-margins_P) - wrong * torch.sigmoid(margins_P)
            )
            weights_D = torch.stack([slopes_P, -slopes_P], dim=1).flatten()
        surrogate = self._cross_entropy(
            model, batch, hidden_BTH, weights_D[batch["target_documents"]]
        ).loss_sum
        return losses_P.sum() + (surrogate - surrogate.detach())

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss without smoothing; ``outputs`` are a `PreferenceOutput` for each pair."""
        margins_P = self._margins(self.log_probabilities(model, batch), batch)
        return Scores(
            loss_sum=float(-F.logsigmoid(margins_P).sum()),
            num_targets=self.num_targets(batch),
            num_correct=int((margins_P > 0).sum()),
            outputs=[PreferenceOutput(margin) for margin in margins_P.tolist()],
        )

    def _margins(self, log_probabilities_P2: Tensor, batch: Batch) -> Tensor:
        gains_P2: Tensor = log_probabilities_P2 - batch["reference"]
        return self.beta * (gains_P2[:, CHOSEN] - gains_P2[:, REJECTED])

    def _losses_of(self, margins_P: Tensor) -> Tensor:
        right, wrong = 1 - self.label_smoothing, self.label_smoothing
        return -right * F.logsigmoid(margins_P) - wrong * F.logsigmoid(-margins_P)

    def _log_probabilities(
        self, model: PreTrainedModel, batch: Batch, hidden_BTH: Tensor
    ) -> Tensor:
        costs_N = self._cross_entropy(model, batch, hidden_BTH, None).cross_entropy_N
        costs_D = costs_N.new_zeros(2 * self.num_targets(batch))
        return -costs_D.index_add(0, batch["target_documents"], costs_N).view(-1, 2)

    def _cross_entropy(
        self, model: PreTrainedModel, batch: Batch, hidden_BTH: Tensor, weights_N: Tensor | None
    ) -> LossSums:
        return plain_head_losses(
            model,
            batch,
            hidden_BTH,
            scale=logit_scale(model.config),
            label_smoothing=0.0,
            z_loss=0.0,
            weights_N=weights_N,
        )


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    output = model.base_model(**model_inputs(batch, MODEL_INPUTS), use_cache=False)
    hidden_BTH: Tensor = output.last_hidden_state
    return hidden_BTH


def _sides(example: EncodedExample) -> list[EncodedExample]:
    """The two conversations of an encoded pair."""
    start = example["token_type_ids"].index(REJECTED)
    return [
        {
            **example,
            "input_ids": example["input_ids"][part],
            "targets": example["targets"][part],
            "token_type_ids": [],
        }
        for part in (slice(0, start), slice(start, None))
    ]
