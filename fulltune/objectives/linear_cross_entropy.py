"""Vocabulary projection and cross-entropy in one, without ever holding all logits.

Logits exist for one chunk of positions at a time. Gradients are formed on the way, while the chunk
is there, so nothing is computed twice; the backward pass only multiplies by what arrives. Logits
have the dtype of the model (bf16 products are what its speed comes from); everything that is summed
over them is float32.

Shape suffixes: N positions with a target, V vocabulary, H hidden size, C positions of one chunk,
R positions of one block of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Smaller chunks cost speed: the weight's gradient is read and written once per chunk.
CHUNK_BYTES = 64 * 2**20
# On a CPU the passes over float32 logits, and the sums of weight gradients, run inside the cache,
# one block of rows after another.
_CPU_BLOCK_BYTES = 4 * 2**20
# oneDNN compiles and keeps a kernel for each shape of a product, so there should be few shapes.
_ROWS_MULTIPLE = 32


@dataclass(frozen=True, eq=False)
class LossSums:
    """What one call of `linear_cross_entropy` found, as sums over its positions."""

    loss_sum: Tensor
    """float32 scalar to differentiate, with label smoothing and z-loss."""
    cross_entropy_sum: Tensor
    """float32 scalar without either, detached."""
    num_correct: Tensor
    """int64 scalar: positions whose target has the largest logit, the first of equals."""
    cross_entropy_N: Tensor
    """float32 [N]: of each position, without smoothing, z-loss and weights; detached."""
    is_correct_N: Tensor
    """bool [N], of which ``num_correct`` is the sum."""


class _Settings(NamedTuple):
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    chunk_bytes: int | None
    with_gradients: bool
    weights_N: Tensor | None = None


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    weights_N: Tensor | None = None,
) -> LossSums:
    """Summed cross-entropy of ``hidden_NH @ weight_VH.T + bias_V`` against ``targets_N``.

    Args:
        hidden_NH: last hidden states, only of positions that have a target.
        weight_VH: output embedding; its gradient is returned like any other, so a weight that is
            also the input embedding gets the sum of both uses.
        targets_N: int64 in [0, V).
        bias_V: added to the logits before scale and cap.
        label_smoothing: share of the target mass spread evenly over the vocabulary.
        z_loss: weight of the squared log of the softmax denominator, which keeps logits near 0.
        logit_scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's
            ``logits_scaling``).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma's
            ``final_logit_softcapping``), after ``logit_scale``.
        chunk_bytes: most bytes of logits held at once, in the model's dtype. None is `CHUNK_BYTES`,
            or more where a single chunk needs less memory than the float32 sum over several.
        weights_N: float32, what the loss of each position counts for in ``loss_sum``; None is 1.
    """
    inputs = (hidden_NH, weight_VH) if bias_V is None else (hidden_NH, weight_VH, bias_V)
    settings = _Settings(
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        with_gradients=torch.is_grad_enabled() and any(each.requires_grad for each in inputs),
        weights_N=weights_N,
    )
    return LossSums(*_LinearCrossEntropy.apply(hidden_NH, weight_VH, targets_N, bias_V, settings))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        bias_V: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        num_positions, vocabulary_size = hidden_NH.shape[0], weight_VH.shape[0]
        wanted = [settings.with_gradients and needed for needed in ctx.needs_input_grad]
        reduced = torch.promote_types(hidden_NH.dtype, torch.float32)
        losses_N = hidden_NH.new_empty(num_positions, dtype=reduced)
        token_losses_N = torch.empty_like(losses_N)
        is_correct_N = torch.zeros(num_positions, dtype=torch.bool, device=hidden_NH.device)

        chunk_bytes = settings.chunk_bytes
        row_bytes = vocabulary_size * hidden_NH.element_size()
        if chunk_bytes is None:
            chunk_bytes = CHUNK_BYTES
            spared = weight_VH.numel() * reduced.itemsize if wanted[1] else 0
            if num_positions * row_bytes <= CHUNK_BYTES + spared:
                chunk_bytes += spared
        rows = max(1, chunk_bytes // row_bytes)
        num_chunks = math.ceil(num_positions / rows)
        rows = math.ceil(num_positions / max(1, num_chunks))  # chunks of like size
        rows += -rows % _ROWS_MULTIPLE
        num_chunks = math.ceil(num_positions / max(1, rows))
        # Rows of zeros behind the last position are multiplied with the others and then forgotten.
        filled_NH = F.pad(hidden_NH, (0, 0, 0, -num_positions % _ROWS_MULTIPLE))
        grad_filled_NH = torch.empty_like(filled_NH) if wanted[0] else None
        grad_bias_V = weight_VH.new_zeros(vocabulary_size, dtype=reduced) if wanted[3] else None
        grad_weight_VH = product_VH = None
        if wanted[1]:
            # One chunk is summed inside its matrix product; more need float32 between them.
            product_VH = torch.empty_like(weight_VH)
            grad_weight_VH = product_VH
            if num_chunks > 1:
                grad_weight_VH = torch.empty_like(weight_VH, dtype=reduced)
            elif num_chunks == 0:
                product_VH.zero_()

        logits_CV = hidden_NH.new_empty(rows, vocabulary_size)
        block_rows = rows
        if hidden_NH.device.type == "cpu":
            block_rows = max(1, _CPU_BLOCK_BYTES // (vocabulary_size * reduced.itemsize))
        buffers = logits_CV.new_empty(2, min(block_rows, rows), vocabulary_size, dtype=reduced)

        for start in range(0, num_positions, max(1, rows)):
            end = min(num_positions, start + rows)
            hidden_CH = filled_NH[start : start + rows]
            chunk_CV = logits_CV[: hidden_CH.shape[0]]
            if bias_V is None:
                torch.mm(hidden_CH, weight_VH.T, out=chunk_CV)
            else:
                torch.addmm(bias_V, hidden_CH, weight_VH.T, out=chunk_CV)
            for block_start in range(0, end - start, block_rows):
                block = slice(block_start, min(end - start, block_start + block_rows))
                place = slice(start + block.start, start + block.stop)
                _score_block(
                    chunk_CV[block],
                    targets_N[place, None],
                    buffers[:, : block.stop - block.start],
                    settings,
                    losses_N[place],
                    token_losses_N[place],
                    is_correct_N[place],
                    grad_bias_V,
                    None if settings.weights_N is None else settings.weights_N[place, None],
                )
            # From here on the chunk holds the gradients of its logits.
            chunk_CV[end - start :].zero_()
            if grad_filled_NH is not None:
                torch.mm(chunk_CV, weight_VH, out=grad_filled_NH[start : start + rows])
            if grad_weight_VH is not None and product_VH is not None:
                torch.mm(chunk_CV.T, hidden_CH, out=product_VH)
                if start == 0 and grad_weight_VH is not product_VH:
                    grad_weight_VH.copy_(product_VH)
                elif grad_weight_VH is not product_VH:
                    _add_in_blocks(grad_weight_VH, product_VH)

        grad_hidden_NH = None if grad_filled_NH is None else grad_filled_NH[:num_positions]
        ctx.gradients = (grad_hidden_NH, grad_weight_VH, None, grad_bias_V, None)
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None, weight_VH.dtype, None)
        # The terms are added in float64: a step may hold more targets than float32 can count.
        loss_sum = losses_N.sum(dtype=torch.float64).to(reduced)
        cross_entropy_sum = token_losses_N.sum(dtype=torch.float64).to(reduced)
        num_correct = is_correct_N.sum()
        ctx.mark_non_differentiable(cross_entropy_sum, num_correct, token_losses_N, is_correct_N)
        return loss_sum, cross_entropy_sum, num_correct, token_losses_N, is_correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss can be differentiated only once")
        # Multiplied in place: new memory of this size costs more, page by page, than the product.
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(
            None if gradient is None else gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


def _add_in_blocks(sum_VH: Tensor, product_VH: Tensor) -> None:
    """``sum_VH += product_VH`` without a float32 copy of the whole product."""
    rows = len(sum_VH)
    if sum_VH.device.type == "cpu":
        rows = max(1, _CPU_BLOCK_BYTES // (sum_VH.shape[1] * sum_VH.element_size()))
    for part, added in zip(sum_VH.split(rows), product_VH.split(rows), strict=True):
        part.add_(added)


def _score_block(
    logits_RV: Tensor,
    targets_R1: Tensor,
    buffers_2RV: Tensor,
    settings: _Settings,
    losses_R: Tensor,
    token_losses_R: Tensor,
    is_correct_R: Tensor,
    grad_bias_V: Tensor | None,
    weights_R1: Tensor | None,
) -> None:
    """Writes losses, right guesses and, over the logits, their gradients, for some rows."""
    scores_RV, probabilities_RV = buffers_2RV
    scores_RV.copy_(logits_RV)
    if settings.logit_scale != 1.0:
        scores_RV.mul_(settings.logit_scale)
    if settings.softcap is not None:
        scores_RV.div_(settings.softcap).tanh_().mul_(settings.softcap)

    # `amax` is 25 times faster than `max` or `argmax` on a CPU, so the largest other logit is found
    # with the target out of the way, and only rows where both are equal are looked at again.
    target_scores_R1 = scores_RV.gather(1, targets_R1)
    scores_RV.scatter_(1, targets_R1, -torch.inf)
    largest_others_R1 = scores_RV.amax(1, keepdim=True)
    scores_RV.scatter_(1, targets_R1, target_scores_R1)
    is_correct_R.copy_((target_scores_R1 > largest_others_R1)[:, 0])
    tied = (target_scores_R1 == largest_others_R1)[:, 0].nonzero()[:, 0]
    if len(tied):
        first = scores_RV.index_select(0, tied).argmax(1, keepdim=True)
        is_correct_R[tied] = (first == targets_R1[tied])[:, 0]

    # The softmax kernel takes half the time of exp alone; its largest entry is one over the sum.
    torch.softmax(scores_RV, 1, out=probabilities_RV)
    log_sums_R1 = torch.maximum(target_scores_R1, largest_others_R1)
    log_sums_R1 = log_sums_R1 - probabilities_RV.amax(1, keepdim=True).log()
    token_losses_R.copy_((log_sums_R1 - target_scores_R1)[:, 0])
    smoothing, z_loss = settings.label_smoothing, settings.z_loss
    losses_R.copy_(token_losses_R)
    if smoothing:
        even_R = (log_sums_R1 - scores_RV.mean(1, keepdim=True))[:, 0]
        losses_R.lerp_(even_R, smoothing)
    if z_loss:
        losses_R.add_(log_sums_R1[:, 0].square(), alpha=z_loss)
    if weights_R1 is not None:
        losses_R.mul_(weights_R1[:, 0])
    if not settings.with_gradients:
        return

    gradients_RV = probabilities_RV
    if z_loss:
        gradients_RV.mul_(1 + 2 * z_loss * log_sums_R1)
    if smoothing:
        gradients_RV.sub_(smoothing / gradients_RV.shape[1])
    minus_target_R1 = target_scores_R1.new_full(target_scores_R1.shape, smoothing - 1)
    gradients_RV.scatter_add_(1, targets_R1, minus_target_R1)
    if settings.softcap is not None:
        scores_RV.div_(settings.softcap).square_().neg_().add_(1)
        gradients_RV.mul_(scores_RV)
    if settings.logit_scale != 1.0:
        gradients_RV.mul_(settings.logit_scale)
    if weights_R1 is not None:
        gradients_RV.mul_(weights_R1)
    if grad_bias_V is not None:
        grad_bias_V.add_(gradients_RV.sum(0))
    logits_RV.copy_(gradients_RV)
