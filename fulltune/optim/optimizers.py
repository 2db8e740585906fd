"""AdamW, Adafactor or Muon, over groups of parameters, on float32 masters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fulltune.config import Quantity, Settings, Warmup
from fulltune.errors import CheckpointError, ConfigError
from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.scaled_adamw import ScaledAdamW
from fulltune.optim.schedules import Schedule, lr_factor

Layer: TypeAlias = int | Literal["embeddings", "head"]


class OptimizerConfig(Settings):
    """The optimizer, its learning rate over the run, and clipping."""

    name: Literal["adamw", "adamw_scaled", "adafactor", "muon"] = "adamw"
    """`adamw` corrects the bias of its moments, without which fine-tuning on little data often
    fails (Zhang et al., 2021; Mosbach et al., 2021).
    `muon` steps the matrices of the layers; embeddings, head and vectors go to AdamW.
    The `lr` of `adafactor` and `adamw_scaled` is a share of a weight's size: 1e-3 is like 2e-5 with
    the others. `adamw_scaled` is AdamW for pre-training T5, with an `lr` of 1e-2 or 2e-2."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of a new head; null is `lr`."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor from each layer to the one below it; 1 trains all layers at `lr`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW: decay of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: added to the root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon: decay of its momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay of matrices; never of biases, norms or embeddings."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warmup."""
    warmup: Warmup = Quantity(3, "%")
    """Steps over which the learning rate rises."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`wsd`: share of all steps at the end in which the rate falls."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the learning rate ends, as a share of its peak."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> OptimizerConfig:
        only = {
            "betas": self.name != "adafactor",
            "epsilon": self.name != "adafactor",
            "momentum": self.name == "muon",
            "decay": self.schedule == "wsd",
            "final_lr": self.schedule != "constant",
        }
        for key, has_effect in only.items():
            if not has_effect and getattr(self, key) != type(self).model_fields[key].default:
                other = "schedule" if key in ("decay", "final_lr") else "name"
                raise ValueError(
                    f"`optimizer.{key}` has no effect with "
                    f"`optimizer.{other}: {getattr(self, other)}`; leave it out"
                )
        return self


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    lr: float
    weight_decay: float
    matrices_of_layers: bool
    """Whether these are what Muon orthogonalises."""


def group_parameters(
    masters: MasterWeights,
    config: OptimizerConfig,
    *,
    layer_of: Mapping[str, Layer],
    num_layers: int,
    tied_heads: Collection[str] = (),
) -> list[ParameterGroup]:
    """One group per (learning rate, weight decay, kind).

    Args:
        masters: the trained parameters.
        config: rates and decay.
        layer_of: the layer of every parameter; the head counts as above the last layer, the
            embeddings as below the first.
        num_layers: layers of the model.
        tied_heads: embeddings that are trained as a head only, and so at the rate above the last
            layer. Like all embeddings they do not decay.

    Raises:
        ConfigError: `head_lr` is set and no head is trained.
    """
    depth = {"embeddings": num_layers, "head": -1}
    groups: dict[tuple[float, float, bool], list[str]] = {}
    for name, master in masters.items():
        layer = layer_of[name]
        if name in tied_heads:
            below = depth["head"]
        else:
            below = depth[layer] if isinstance(layer, str) else num_layers - 1 - layer
        lr = config.lr * config.layer_lr_decay ** (below + 1)
        if layer == "head" and config.head_lr is not None:
            lr = config.head_lr
        is_matrix = master.ndim >= 2 and layer != "embeddings"
        decay = config.weight_decay if is_matrix else 0.0
        key = (lr, decay, is_matrix and master.ndim == 2 and layer != "head")
        groups.setdefault(key, []).append(name)
    if config.head_lr is not None and "head" not in {layer_of[name] for name, _ in masters.items()}:
        raise ConfigError(
            "`optimizer.head_lr` is set, but this model has no head of its own to train",
            hint="leave it out; a tied head is trained with the embeddings",
        )
    return [
        ParameterGroup(tuple(names), lr, decay, matrices)
        for (lr, decay, matrices), names in groups.items()
    ]


def _adamw(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=True)


def _adamw_scaled(
    groups: list[dict[str, object]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    return ScaledAdamW(groups, betas=config.betas, eps=config.epsilon, fused=True)


def _adafactor(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, foreach=False)


def _muon(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    # Scaled to the size of AdamW's updates (Moonlight, Liu et al., 2025): one `lr` serves both.
    return torch.optim.Muon(groups, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")


Build: TypeAlias = Callable[[list[dict[str, object]], OptimizerConfig], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Build, Build]] = {
    # name: (for the matrices of the layers, for everything else)
    "adamw": (_adamw, _adamw),
    "adamw_scaled": (_adamw_scaled, _adamw_scaled),
    "adafactor": (_adafactor, _adafactor),
    "muon": (_muon, _adamw),
}


class Optimizer:
    """Steps the masters by torch's optimizers, and rounds them into the model.

    Args:
        masters: the float32 weights.
        groups: from `group_parameters`.
        config: the optimizer and its schedule.
        num_steps: updates of the whole run.

    Raises:
        ConfigError: the warmup is longer than the run.
    """

    def __init__(
        self,
        masters: MasterWeights,
        groups: list[ParameterGroup],
        config: OptimizerConfig,
        *,
        num_steps: int,
    ) -> None:
        self.masters = masters
        self.config = config
        self.num_steps = num_steps
        warmup = config.warmup
        share = warmup.value / 100 if warmup.unit == "%" else 0
        self.warmup_steps = round(share * num_steps) if share else int(warmup.value)
        if self.warmup_steps > num_steps:
            raise ConfigError(
                f"`optimizer.warmup` is {warmup}, but the run has {num_steps:,} steps, so that the "
                "learning rate would never come to `optimizer.lr`",
                hint="warm up for fewer steps or a share such as `3%`, or train longer",
            )
        self.factor: Callable[[int], float] = self._scheduled
        """The factor on every rate after a number of updates; a range test puts its own here."""
        tensors = dict(masters.items())
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._names = names
        built: dict[Build, list[dict[str, object]]] = {}
        for group in groups:
            build = OPTIMIZERS[config.name][0 if group.matrices_of_layers else 1]
            built.setdefault(build, []).append(
                {
                    "params": [tensors[name] for name in group.names],
                    "lr": group.lr,
                    "weight_decay": group.weight_decay,
                    "peak_lr": group.lr,
                }
            )
        self._optimizers = [build(dicts, config) for build, dicts in built.items()]

    def lr(self, step: int) -> float:
        """The learning rate `lr` has come to after ``step`` finished updates."""
        return self.config.lr * self.factor(step)

    def _scheduled(self, step: int) -> float:
        return lr_factor(
            self.config.schedule,
            step,
            num_steps=self.num_steps,
            warmup_steps=self.warmup_steps,
            decay=self.config.decay,
            floor=self.config.final_lr,
        )

    def step(self, step: int) -> None:
        """Update the masters from their gradients and round them into the model."""
        factor = self.factor(step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        self.masters.write_back()
        self.masters.zero_grad()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the optimizers' state, named ``parameter/entry``."""
        for optimizer in self._optimizers:
            for tensor, entries in optimizer.state.items():
                for key, value in entries.items():
                    if not isinstance(value, Tensor):
                        raise TypeError(f"optimizer state `{key}` is {type(value).__name__}")
                    yield f"{self._names[id(tensor)]}/{key}", value

    def free_state(self) -> None:
        """Forget moments and gradients at the end of training."""
        for optimizer in self._optimizers:
            optimizer.state.clear()
        self.masters.zero_grad()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave.

        Raises:
            CheckpointError: it belongs to other parameters.
        """
        tensors = dict(self.masters.items())
        owners = {
            id(tensor): optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for tensor in group["params"]
        }
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name not in tensors:
                raise CheckpointError(
                    f"the checkpoint has optimizer state of `{name}`, which is not trained"
                )
            master = tensors[name]
            owner = owners[id(master)]
            # Fused kernels count their steps on the device, all others on the CPU.
            counts_on_cpu = entry == "step" and not owner.defaults.get("fused")
            owner.state[master][entry] = value.to("cpu" if counts_on_cpu else master.device).clone()
