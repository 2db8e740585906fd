"""Heads whose logits are the last hidden states times the output weights, scaled and bounded.

Shape suffixes: B rows, T tokens, H hidden size, N targets, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.objectives.base import Batch
from fulltune.objectives.linear_cross_entropy import LossSums, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def plain_head_losses(
    model: PreTrainedModel,
    batch: Batch,
    hidden_BTH: Tensor,
    *,
    scale: float,
    label_smoothing: float,
    z_loss: float,
    weights_N: Tensor | None = None,
) -> LossSums:
    """The losses of a batch's ``target_ids`` at its ``prediction_positions``.

    Args:
        model: with a head that `is_plain`.
        batch: int64 [N] each, the positions into the flattened tokens of ``hidden_BTH``.
        hidden_BTH: the last hidden states.
        scale: factor on the logits.
        label_smoothing: see `linear_cross_entropy`.
        z_loss: see `linear_cross_entropy`.
        weights_N: see `linear_cross_entropy`.
    """
    head = model.get_output_embeddings()
    return linear_cross_entropy(
        hidden_BTH.flatten(0, 1)[batch["prediction_positions"]],
        head.weight,
        batch["target_ids"],
        bias_V=getattr(head, "bias", None),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=scale,
        softcap=logit_softcap(model.config),
        weights_N=weights_N,
    )


def is_plain(model: PreTrainedModel, hidden_BTH: Tensor, own_BTV: Tensor, *, scale: float) -> bool:
    """Whether a model's own float32 logits are those that `plain_head_losses` makes."""
    head = model.get_output_embeddings()
    logits_BTV = F.linear(hidden_BTH, head.weight, getattr(head, "bias", None)).float()
    logits_BTV *= scale
    if cap := logit_softcap(model.config):
        logits_BTV = cap * torch.tanh(logits_BTV / cap)
    # Rounding in bfloat16 stays below a hundredth of the largest logit. Logits that are not finite
    # are for the first step to name.
    return not (logits_BTV - own_BTV).abs().max() > 0.05 * own_BTV.abs().max()


def logit_softcap(config: PretrainedConfig) -> float | None:
    """The bound that Gemma puts on its logits; None without."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def logit_scale(config: PretrainedConfig) -> float:
    """The factor on a model's logits: Cohere multiplies them, Granite divides."""
    text = config.get_text_config()
    return float(getattr(text, "logit_scale", None) or 1.0) / float(
        getattr(text, "logits_scaling", None) or 1.0
    )
