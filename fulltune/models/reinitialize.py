"""New weights for the top layers of a trained model, before it is fine-tuned on little data.

The top layers of a pre-trained encoder are specialised on pre-training; started anew, fine-tuning
on up to some thousand examples is more stable and often better (Zhang, Wu, Katiyar, Weinberger and
Artzi, 2021, "Revisiting Few-sample BERT Fine-tuning", section 4). As there, the pooler of an
encoder that has one is made anew too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fulltune.errors import ConfigError
from fulltune.models.scope import require_own_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reinitialize_layers(
    model: PreTrainedModel,
    count: int,
    *,
    layer_of: Mapping[str, int | str],
    num_layers: int,
    seed: int,
) -> frozenset[str]:
    """Draw the weights of the top layers, and of the pooler, as the architecture draws new ones.

    Args:
        model: in float32, changed in place.
        count: layers from the top; of an encoder-decoder, in the encoder and in the decoder.
        layer_of: the layer of every parameter by name.
        num_layers: layers of the model.
        seed: the same seed gives the same weights, whatever was drawn before.

    Returns:
        The names of the new parameters.

    Raises:
        ConfigError: the model has fewer layers, or its layers share their weights.
    """
    require_own_weights(
        layer_of, num_layers, setting="reinitialize_layers", hint="leave it out for this model"
    )
    if count > num_layers:
        raise ConfigError(
            f"`reinitialize_layers` is {count}, but the model has {num_layers} layers",
            hint=f"write at most {num_layers}, or pre-train a new model",
        )
    pooler = f"{model.base_model_prefix}.pooler."
    new = set()
    for name, layer in layer_of.items():
        is_top = isinstance(layer, int) and layer >= num_layers - count
        if is_top or name.startswith(pooler):
            new.add(name)
    parameters = dict(model.named_parameters())
    for name in new:
        # transformers leaves alone what it has marked as loaded.
        parameters[name]._is_hf_initialized = False  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # A module within another comes first: what the outer one draws for it is what counts.
        for path, module in reversed(list(model.named_modules())):
            names = {f"{path}.{name}" for name, _ in module.named_parameters()}
            if names and names <= new:
                model._init_weights(module)
    return frozenset(new)
