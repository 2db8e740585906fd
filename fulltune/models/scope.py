"""Which parameters are trained: all, the head only, or the last layers with the head.

LoRA stands beside them for comparison.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from fulltune.errors import ConfigError
from fulltune.models.adapters import is_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _check(text: str) -> str:
    if text in ("all", "head") or re.fullmatch(r"last [1-9][0-9]* layers?|lora [1-9][0-9]*", text):
        return text
    raise ValueError("no such choice; write `all`, `head`, `last N layers` or `lora RANK`")


Scope = Annotated[str, AfterValidator(_check)]
"""`all`, `head`, `last N layers`, or for comparison `lora RANK`."""


def lora_rank(scope: str) -> int | None:
    """The rank that a scope names; None where it is not LoRA."""
    return int(scope.split()[1]) if scope.startswith("lora") else None


def freeze(
    model: PreTrainedModel, scope: str, *, layer_of: Mapping[str, int | str], num_layers: int
) -> frozenset[str]:
    """Leave only the parameters of ``scope`` with ``requires_grad``.

    A head that is tied to the embeddings counts as the head: training it trains both.

    Returns:
        The names of embeddings that are trained for the head's sake, which they are tied to.

    Raises:
        ConfigError: the model has fewer layers than asked for, or its layers share their weights.
    """
    count = int(scope.split()[1]) if scope.startswith("last") else 0
    if count:
        require_own_weights(
            layer_of,
            num_layers,
            setting=f"scope: {scope}",
            hint="train them together with `scope: all`, or none of them with `scope: head`",
        )
    if count > num_layers:
        raise ConfigError(
            f"`scope` is `{scope}`, but the model has {num_layers} layers",
            hint=f"write at most `last {num_layers} layers`, or `all`",
        )
    output = model.get_output_embeddings()
    head_weight = output.weight if output is not None else None
    tied_heads = set()
    for name, parameter in model.named_parameters():
        layer = layer_of[name]
        is_head = layer == "head" or parameter is head_weight
        is_last = isinstance(layer, int) and layer >= num_layers - count
        is_added = lora_rank(scope) is not None and is_lora(name)
        parameter.requires_grad_(scope == "all" or is_head or is_added or (count > 0 and is_last))
        if scope != "all" and is_head and layer == "embeddings":
            tied_heads.add(name)
    return frozenset(tied_heads)


def require_own_weights(
    layer_of: Mapping[str, int | str], num_layers: int, *, setting: str, hint: str
) -> None:
    """Refuse a setting that tells layers apart where several of them are one, as in ALBERT.

    Raises:
        ConfigError: there are fewer sets of weights than layers.
    """
    own = len({layer for layer in layer_of.values() if isinstance(layer, int)})
    if own < num_layers:
        raise ConfigError(
            f"`{setting}` tells layers apart, but the {num_layers} layers of this model have "
            f"{own} {'set' if own == 1 else 'sets'} of weights between them",
            hint=hint,
        )
