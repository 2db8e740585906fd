"""The arithmetic that a model needs, by which the use of a machine is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulltune.models.families import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, forward and backward: 6 a weight and token.

    Attention's own products, which grow with the length of a document, are not counted.
    """

    body: float
    """A token."""
    head: float
    """A predicted token."""


def count_flops(model: PreTrainedModel, layers: Mapping[str, Part]) -> Flops:
    """Count those of a model, given the layer of each of its parameters."""
    body = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and isinstance(layers[name], int)
    )
    output = model.get_output_embeddings()
    return Flops(6.0 * body, 6.0 * output.weight.numel() if output is not None else 0.0)
