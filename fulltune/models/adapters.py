"""LoRA, for comparison only: low-rank additions to the products of every layer, by `peft`.

Hu et al., 2021. They are added to all linear products inside layers, as Dettmers et al., 2023, and
later work recommend; the head is trained whole, and the finished model has them merged into plain
weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fulltune.errors import ConfigError, MissingExtraError
from fulltune.models.families import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALPHA_PER_RANK = 2
"""What the additions are multiplied by: alpha / rank, the usual choice."""

_MARK = "lora_"


def is_lora(parameter_name: str) -> bool:
    """Whether a parameter is of such an addition."""
    return _MARK in parameter_name


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Give every linear product inside the layers of a model an addition, in place.

    Args:
        model: of any family.
        rank: of each addition.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the model has no such products.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"`scope: lora {rank}` needs peft", hint="pip install 'fulltune[compare]'"
        ) from None
    from transformers.pytorch_utils import Conv1D

    layers = layers_of(model)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and isinstance(layers.get(f"{name}.weight"), int)
    ]
    if not targets:
        raise ConfigError(
            f"a model of type `{model.config.model_type}` has no linear products in its layers",
            hint="compare without LoRA",
        )
    conv = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=ALPHA_PER_RANK * rank,
            target_modules=targets,
            fan_in_fan_out=conv,  # how GPT-2 stores its weights
        ),
        model,
    )


def merge_lora(model: PreTrainedModel) -> None:
    """Add what was learned to the weights themselves, so that the model is a plain one again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            merged: Any = module
            merged.merge()
            model.set_submodule(name, merged.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
