"""The objective of each kind of task: the one table that training and inference share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fulltune.data.tasks import TaskKind
from fulltune.errors import ConfigError, ModelError
from fulltune.models.families import Family, family_of
from fulltune.objectives.base import Objective, TooLong
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.classification import Classification

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fulltune.models.loading import Head


@dataclass(frozen=True)
class ObjectiveSettings:
    """What an objective of a task is made of."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    """Of the model."""
    max_length: int
    """Longest example in tokens."""
    labels: tuple[str, ...] = ()
    """The classes in order, where they are known already."""
    too_long: TooLong = "error"
    special_tokens: Literal["error", "text"] = "error"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class TaskObjective:
    """How a kind of task is trained and scored."""

    head: Head
    """What the model is loaded to predict."""
    make: Callable[[ObjectiveSettings], Objective]
    can: Callable[[Family], bool] = lambda family: True
    """Whether models of a family can do it."""


def _causal_lm(settings: ObjectiveSettings) -> CausalLM:
    return CausalLM(
        settings.tokenizer,
        settings.max_length,
        settings.too_long,
        packing=family_of(settings.config).can_pack,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        special_tokens=settings.special_tokens,
    )


def _classification(settings: ObjectiveSettings) -> Classification:
    family = family_of(settings.config)
    return Classification(
        settings.tokenizer,
        settings.labels,
        settings.max_length,
        pooling=family.pooling,
        too_long=settings.too_long,
        packing=family.can_pack,
        own_forward=family.pools_real_tokens,
        label_smoothing=settings.label_smoothing,
    )


def _predicts_the_next_token(family: Family) -> bool:
    return family.can_generate


OF_TASK: dict[TaskKind, TaskObjective] = {
    "chat": TaskObjective("causal_lm", _causal_lm, _predicts_the_next_token),
    "text": TaskObjective("causal_lm", _causal_lm, _predicts_the_next_token),
    "classification": TaskObjective("classification", _classification),
}


def kinds_of(family: Family) -> list[TaskKind]:
    """The kinds of task that models of a family can do."""
    return [kind for kind, task in OF_TASK.items() if task.can(family)]


def make_task_objective(kind: TaskKind, settings: ObjectiveSettings) -> Objective:
    """The objective of a kind of task on a model.

    Raises:
        ConfigError: a setting has no effect on this kind.
        ModelError: the model's family cannot do it.
    """
    task = OF_TASK[kind]
    if task.head != "causal_lm" and settings.z_loss:
        raise ConfigError(f"`z_loss` has no effect with `task.kind: {kind}`", hint="leave it out")
    family = family_of(settings.config)
    if not task.can(family):
        lacks = " does not predict the next token, so it" if task.head == "causal_lm" else ""
        possible = ", ".join(f"`{other}`" for other in kinds_of(family))
        raise ModelError(
            f"a model of type `{settings.config.model_type}`{lacks} cannot do `task.kind: {kind}`",
            hint=f"it can do {possible}; `fulltune models` says what others can",
        )
    return task.make(settings)
