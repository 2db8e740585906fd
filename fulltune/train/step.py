"""One optimizer update from micro-batches, however the step is cut and over however many ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulltune.data.encoding import EncodedExample
from fulltune.objectives.base import Batch, Objective, to_device
from fulltune.optim.master_weights import MasterWeights, RoundingProbe
from fulltune.optim.optimizers import Optimizer
from fulltune.runtime import Runtime
from fulltune.train.health import NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass and the examples they were made of."""

    batch: Batch
    examples: Sequence[EncodedExample]


@dataclass(frozen=True)
class StepResult:
    """What one update measured, over all ranks."""

    loss: float
    """Mean over the targets, in nats."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    num_targets: int
    num_tokens: int
    """Real tokens; padding is not counted."""
    updates_rounded_away: float | None
    """Share of updates that plain bfloat16 weights would have lost; None in float32."""


def train_step(
    model: PreTrainedModel,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    optimizer: Optimizer,
    step: int,
    *,
    runtime: Runtime,
    clip_norm: float | None,
    measure_rounding: bool,
) -> StepResult:
    """Update ``model`` once from the micro-batches that this rank holds.

    Every target weighs the same in the update, in whichever micro-batch and on whichever rank it
    is: losses are summed, and divided once by the number of targets over all ranks.

    Raises:
        NonFiniteError: a loss or the gradient is not finite; on every rank, before any update.
    """
    counts = torch.tensor(
        [
            sum(objective.num_targets(micro.batch) for micro in micro_batches),
            sum(len(example["input_ids"]) for micro in micro_batches for example in micro.examples),
        ],
        device=runtime.device,
    )
    if runtime.world_size > 1:
        dist.all_reduce(counts)
    num_targets, num_tokens = (int(count) for count in counts)
    divisor = max(num_targets, 1)  # a step may hold no target: its gradient is zero, not nan

    losses: list[Tensor] = []
    for micro in micro_batches:
        loss = objective.loss_sum(model, to_device(micro.batch, runtime.device))
        (loss / divisor).backward()
        losses.append(loss.detach())
    masters = optimizer.masters
    if runtime.world_size > 1:
        _sum_gradients(masters)

    # One transfer brings every loss and the norm to the host; nothing is updated before it is read.
    loss_sums = torch.stack(losses).double() if losses else torch.zeros(0, dtype=torch.float64)
    total = loss_sums.sum().to(runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(total)
    gradients = [tensor.grad for tensor in masters.tensors() if tensor.grad is not None]
    grad_norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if not math.isfinite(float(total)) or not math.isfinite(grad_norm):
        bad = [index for index, loss in enumerate(loss_sums.tolist()) if not math.isfinite(loss)]
        masters.zero_grad()
        raise NonFiniteError(step + 1, float(total) / divisor, grad_norm, bad)

    if clip_norm is not None and grad_norm > clip_norm:
        for gradient in gradients:
            gradient.mul_(clip_norm / grad_norm)
    probe = RoundingProbe(masters) if measure_rounding else None
    optimizer.step(step)
    return StepResult(
        loss=float(total) / divisor,
        grad_norm=grad_norm,
        num_targets=num_targets,
        num_tokens=num_tokens,
        updates_rounded_away=probe.share_lost() if probe else None,
    )


def _sum_gradients(masters: MasterWeights) -> None:
    """Add up the gradients of all ranks; a rank without micro-batches adds nothing.

    A weight that no rank used keeps no gradient, so that it is not decayed either.
    """
    tensors = masters.tensors()
    used = torch.tensor([tensor.grad is not None for tensor in tensors], dtype=torch.int32)
    used = used.to(tensors[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for tensor, is_used in zip(tensors, used.tolist(), strict=True):
        if is_used:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            dist.all_reduce(tensor.grad)
