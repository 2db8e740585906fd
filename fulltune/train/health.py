"""Losses that are not finite, and losses that jump: which rows they come from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fulltune.data.encoding import EncodedExample
from fulltune.errors import TrainingError
from fulltune.objectives.base import Objective, to_device
from fulltune.optim.master_weights import MasterWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite. The weights are those of the step before.

    Args:
        step: the update that was not made.
        loss: mean loss of the step.
        grad_norm: norm of the whole gradient.
        micro_batches: indices of this rank's micro-batches whose loss is not finite.
    """

    def __init__(
        self, step: int, loss: float, grad_norm: float, micro_batches: Sequence[int]
    ) -> None:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
        super().__init__(f"step {step}: {what}; the update was not made")
        self.step = step
        self.micro_batches = tuple(micro_batches)


def nonfinite_rows(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[EncodedExample],
    masters: MasterWeights,
    device: torch.device,
) -> list[str]:
    """Where the examples stand whose own loss, or whose own gradient, is not finite."""
    rows = []
    for example in examples:
        loss = objective.loss_sum(model, to_device(objective.collate([example]), device))
        loss.backward()
        gradients = [tensor.grad for tensor in masters.tensors() if tensor.grad is not None]
        finite = math.isfinite(loss.item()) and all(
            bool(gradient.isfinite().all()) for gradient in gradients
        )
        masters.zero_grad()
        if not finite:
            rows.append(example["where"])
    return rows


@dataclass
class SpikeDetector:
    """Says when a loss lies far above the recent ones.

    The measure is robust: distance to the median of the last ``window`` losses, in units of their
    median absolute deviation scaled to a standard deviation. Small batches of a nearly learned task
    have losses near zero with a few hard rows between; so a spike also exceeds by half the largest
    of the last losses: what came up a moment ago is no news.
    """

    window: int = 64
    threshold: float = 8.0
    losses: list[float] = field(default_factory=list)

    def is_spike(self, loss: float) -> bool:
        """Judge one loss against those before it, then remember it."""
        spike = False
        if len(self.losses) >= 16:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(value - median) for value in self.losses)
            far = loss - median > self.threshold * max(spread, 0.02 * abs(median))
            spike = far and loss > 1.5 * max(self.losses)
        self.losses = [*self.losses[-self.window + 1 :], loss]
        return spike
