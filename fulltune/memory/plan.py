"""How many tokens a forward pass may hold, from a formula, before anything is allocated.

The formula (bytes; N parameters, h width, L layers, V vocabulary, T tokens of a micro-batch) counts
weights, float32 masters, float32 gradients, optimizer state, the activations that the backward
pass needs, and the buffers of the loss. It is checked against the first steps of every run, and the
error is written into the run's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator

from fulltune.config import Units
from fulltune.errors import MemoryPlanError
from fulltune.tracking import format_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_UNITS = Units(("GiB", "MiB"))
_BYTES = {"GiB": 2**30, "MiB": 2**20}
MICRO_BATCH_TOKENS = {
    "cpu": (2048, 1024, 512, 256),
    "cuda": (32768, 16384, 8192, 4096, 2048, 1024, 512, 256),
}
"""Tried in turn. On a CPU more tokens are no faster: the products are saturated."""
LOSS_CHUNK_BYTES = 64 * 2**20


def _parse_memory(value: object) -> str:
    if value == "auto":
        return "auto"
    try:
        return str(_UNITS.parse(value))
    except ValueError as error:
        # A comma or a foreign unit has a reason of its own; the advice knows of `auto`.
        reason = str(error).partition(";")[0]
        named = "a comma" in reason or "is not a unit" in reason
        raise ValueError(
            f"{reason if named else 'not a size'}; write `auto` or a limit such as `20 GiB`"
        ) from None


MemorySetting = Annotated[str, BeforeValidator(_parse_memory)]
"""`auto`: what is free on this machine; or a limit, such as `20 GiB`."""


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen micro-batch and what it is predicted to need."""

    micro_batch_tokens: int
    parts: Mapping[str, int]
    """Bytes by what holds them."""

    @property
    def predicted_bytes(self) -> int:
        """The predicted peak of this process."""
        return sum(self.parts.values())


def plan_memory(
    memory: str,
    config: PretrainedConfig,
    *,
    num_parameters: int,
    num_trained: int,
    optimizer_bytes: int,
    compute_bytes: int,
    base_bytes: int,
    available_bytes: int,
    longest: int,
    has_vocabulary_loss: bool,
    has_lean_kernels: bool,
    device_type: str,
) -> MemoryPlan:
    """The largest micro-batch that fits.

    Args:
        memory: `auto` or a limit.
        config: of the model.
        num_parameters: of the whole model.
        num_trained: those that are trained.
        optimizer_bytes: of optimizer state for each trained parameter.
        compute_bytes: of a weight in the forward pass: 2 in bfloat16, 4 in float32.
        base_bytes: what the process held before the model was loaded.
        available_bytes: free memory of the device.
        longest: tokens of the longest example, which no micro-batch can be smaller than.
        has_vocabulary_loss: whether tokens are predicted.
        device_type: `cpu` or `cuda`.
        has_lean_kernels: whether norms and gated products are formed again in the backward pass.

    Raises:
        MemoryPlanError: even the smallest micro-batch does not fit.
    """
    if memory == "auto":
        limit = available_bytes + base_bytes
    else:
        quantity = _UNITS.parse(memory)
        limit = int(quantity.value * _BYTES[quantity.unit])
    text = config.get_text_config()
    width = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1))
    head_width = int(getattr(text, "head_dim", None) or width // heads)
    key_width = head_width * int(getattr(text, "num_key_value_heads", None) or heads)
    inner = int(
        getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    )
    layers = int(text.num_hidden_layers)
    vocabulary = int(text.vocab_size) * width
    # Inputs of norms and products, queries, keys and values, and the parts of the feed-forward
    # layer; without lean kernels also its product and two float32 copies for the norms.
    kept = 5 * width + head_width * heads + 2 * key_width + 2 * inner
    per_layer = compute_bytes * kept
    if not has_lean_kernels:
        per_layer += compute_bytes * (width + inner) + 8 * width
    per_token = layers * per_layer
    masters = 4 * num_trained if compute_bytes < 4 else 0
    for tokens in MICRO_BATCH_TOKENS[device_type]:
        held = max(tokens, longest)
        loss = LOSS_CHUNK_BYTES + vocabulary * (4 + 2 * compute_bytes) if has_vocabulary_loss else 0
        plan = MemoryPlan(
            tokens,
            {
                "process": base_bytes,
                "weights": compute_bytes * num_parameters + masters,
                "gradients": 4 * num_trained,
                "optimizer": optimizer_bytes * num_trained,
                "activations": held * per_token,
                "loss": loss,
            },
        )
        if plan.predicted_bytes <= limit:
            return plan
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.parts.items())
    free = "are free" if memory == "auto" else "are allowed by `memory`"
    raise MemoryPlanError(
        f"the run needs about {format_bytes(plan.predicted_bytes)} ({shown}), "
        f"and {format_bytes(limit)} {free}",
        hint="raise `memory`, lower `task.max_length`, or train less with `scope: last 4 layers`",
    )
