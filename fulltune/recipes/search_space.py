"""What a search varies: settings of `finetune`, each with a range or a list of choices."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

from fulltune.config import (
    BROKEN_UNITS,
    Units,
    build_config,
    list_keys,
    number_type,
    written_value,
)
from fulltune.data.splits import Source, parse_validation
from fulltune.data.tasks import TaskConfig
from fulltune.errors import ConfigError
from fulltune.recipes import finetune

MAX_COMBINATIONS = 512
"""Combinations of ends and choices that are all checked; of more, one setting varies at a time."""

_NUMBER = r"[-+]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*([^\s0-9]*?)\s*(\blog)?\s*")
HOW = "write a range such as `1e-5..1e-3 log`, `0.0..0.3` or `1..4 epochs`, or a list of choices"

NOT_SEARCHED = {
    "run_dir": "each trial has a folder of its own",
    "device": "it does not change what is learned",
    "memory": "it does not change what is learned",
    "num_workers": "it does not change what is learned",
    "save_every": "it does not change what is learned",
    "save_as": "it does not change what is learned",
    "keep_checkpoints": "it does not change what is learned",
    "tracking": "it does not change what is learned",
    "evaluate": "trials would be compared by different measures",
    "task.kind": "trials would be compared on different tasks",
    "task.validation": "trials would be compared on different data",
    "task.format": "trials would be compared on different data",
    "task.columns": "trials would be compared on different data",
    "task.labels": "trials would be compared on different data",
    "task.too_long": "trials would be compared on different data",
}
"""Settings and sections that a search cannot vary, and why."""
MOVES_THE_METRIC = {"task.dpo_beta": ("loss", "margin")}
"""Settings that are part of a metric, so that it cannot compare their values."""
MOVES_THE_SPLIT = ("seed", "task.train", "task.deduplicate")
"""Settings that decide which examples are held out, where these come from the training data."""


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, both possible."""

    low: float
    high: float
    log: bool = False
    """Whether equal ratios are equally likely, and not equal distances."""
    whole: bool = False
    unit: str = ""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{_short(self.low)}..{_short(self.high)}{unit}{' log' if self.log else ''}"

    def setting(self, value: float) -> float | int | str:
        """The value of the setting for a drawn number: four figures of it are enough to read."""
        number = int(value) if self.whole else float(f"{value:.4g}")
        if not self.whole:
            number = min(max(number, self.low), self.high)
        return f"{number:.12g} {self.unit}" if self.unit else number

    @property
    def corners(self) -> tuple[float | int | str, ...]:
        """Settings that stand for all in a check."""
        return self.setting(self.low), self.setting(self.high)

    @property
    def middle(self) -> float | int | str:
        """The setting half-way, on the scale of the range."""
        if self.log:
            return self.setting(math.sqrt(self.low * self.high))
        return self.setting((self.low + self.high) / 2)


def _short(number: float) -> str:
    """As people write it: `1e-6`, not `1e-06`."""
    return re.sub(r"e([-+])0(?=\d)", r"e\1", f"{number:g}").replace("e+", "e")


@dataclass(frozen=True)
class Choices:
    """A list of values of any kind."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"[{', '.join(self.texts)}]"

    @property
    def texts(self) -> tuple[str, ...]:
        """The choices as a settings file has them; distinct."""
        return tuple(written_value(value) for value in self.values)

    def setting(self, text: str) -> Any:
        """The choice that is written so."""
        return self.values[self.texts.index(text)]

    @property
    def corners(self) -> tuple[Any, ...]:
        """Settings that stand for all in a check."""
        return self.values

    @property
    def middle(self) -> Any:
        """The first choice."""
        return self.values[0]


Dimension: TypeAlias = Range | Choices
Space: TypeAlias = dict[str, Dimension]
"""Dotted setting of `finetune` -> what it may be."""


def parse_space(written: Mapping[str, Any]) -> Space:
    """Read the space of a settings file.

    Raises:
        ConfigError: it is empty, or a range or list cannot be read.
    """
    space = {key: _parse(key, value) for key, value in _flat(written)}
    if not space:
        raise ConfigError(
            "`space` is empty, so that all trials would be the same",
            hint="name settings, such as `space: {optimizer.lr: 1e-5..1e-3 log}`",
        )
    return space


def _flat(written: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections within each other as dotted names; the last one of a name counts."""
    for key, value in written.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse(key: str, value: object) -> Dimension:
    if isinstance(value, list | tuple):
        return _parse_choices(key, value)
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"`space.{key}` cannot be `{written_value(value)}`", hint=HOW)
    low, high = (float(text.replace("_", "")) for text in match.group(1, 2))
    said = f"`space.{key}` cannot be `{value}`"
    if not (low < high and math.isfinite(high)):
        raise ConfigError(f"{said}: a range goes from the lower to the higher end", hint=HOW)
    log = match[4] is not None
    if log and low <= 0:
        raise ConfigError(
            f"{said}: a range by ratios, `log`, begins above zero", hint="raise it, or drop `log`"
        )
    return Range(low, high, log, *_number_of(key, match[3], said))


def _number_of(key: str, unit: str, said: str) -> tuple[bool, str]:
    """Whether a setting is counted in whole numbers, and its unit."""
    kind = number_type(finetune.Config, key)
    if isinstance(kind, Units):
        try:
            unit = kind.parse(f"1 {unit}").unit
        except ValueError as error:
            why, _, hint = str(error).partition("; ")
            raise ConfigError(f"{said}: {why}", hint=f"{hint}, as `LOW..HIGH UNIT`") from None
        return unit not in BROKEN_UNITS, unit
    if unit:
        raise ConfigError(f"{said}: `{unit}` is not understood", hint=HOW)
    if kind is None and key in list_keys(finetune.Config):
        raise ConfigError(f"{said}: `{key}` is not a number", hint=f"write `{key}: [ONE, OTHER]`")
    return kind is int, ""


def _parse_choices(key: str, values: list[Any] | tuple[Any, ...]) -> Choices:
    choices = Choices(tuple(values))
    if not values:
        raise ConfigError(f"`space.{key}` is an empty list", hint=HOW)
    if len(set(choices.texts)) < len(values):
        raise ConfigError(
            f"`space.{key}` has a choice twice: {choices}", hint="name each choice once"
        )
    return choices


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `finetune` with dotted ones set to others; the base stays as it is.

    Raises:
        ConfigError: a section of the base is no section.
    """
    settings: dict[str, Any] = deepcopy(dict(base))
    for key, value in values.items():
        *parents, leaf = key.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    f"`finetune.{parent}` is `{written_value(section)}`, not a section, so there "
                    f"is no `{key}`",
                    hint=f"write `{parent}: {{...}}`",
                )
        section[leaf] = value
    return settings


def check_space(space: Space, base: Mapping[str, Any]) -> None:
    """Refuse a space in which a trial could not be run, as far as its settings show.

    Args:
        space: what is varied.
        base: the settings of all trials, with a `run_dir`.

    Raises:
        ConfigError: a setting is unknown or cannot be searched, a value is not possible, or values
            contradict each other.
    """
    for key in space:
        why = next((why for name, why in NOT_SEARCHED.items() if _lies_in(key, name)), None)
        if why is not None:
            raise ConfigError(
                f"`space.{key}` cannot be searched: {why}",
                hint=f"set it once, as `finetune.{key}`" if key != "run_dir" else "leave it out",
            )
    for values in _combinations(space):
        try:
            config = build_config(finetune.Config, with_values(base, values))
            metric = finetune.check_settings(config)
        except ConfigError as error:
            if str(error) == _fault_of(base):
                raise ConfigError(f"`finetune`: {error}", hint=error.hint) from None
            shown = ", ".join(f"{key}: {written_value(value)}" for key, value in values.items())
            raise ConfigError(f"`space`: {error} (a trial with {shown})", hint=error.hint) from None
        _refuse_moving_splits(space, config.task)
        for key, metrics in MOVES_THE_METRIC.items():
            if key in space and metric in metrics:
                raise ConfigError(
                    f"`space.{key}` cannot be searched by `{metric}`, of which it is a part",
                    hint="set another `finetune.evaluate.metric`, such as `preference_accuracy`",
                )


def _fault_of(base: Mapping[str, Any]) -> str | None:
    """What is wrong with the settings that all trials share, whatever they vary."""
    try:
        finetune.check_settings(build_config(finetune.Config, base))
    except ConfigError as error:
        return str(error)
    return None


def _lies_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _refuse_moving_splits(space: Space, task: TaskConfig) -> None:
    moving = [key for key in MOVES_THE_SPLIT if key in space]
    if moving and not isinstance(parse_validation(task.validation or "5%"), Source):
        raise ConfigError(
            f"`space.{moving[0]}` cannot be searched here: it decides which examples are held out, "
            "so that trials would be compared on different data",
            hint="name held-out data of its own as `task.validation`; what a seed alone changes is "
            "measured by `fulltune finetune FILE --seeds 5`",
        )


def _combinations(space: Space) -> Iterator[dict[str, Any]]:
    corners = [dimension.corners for dimension in space.values()]
    if math.prod(map(len, corners)) <= MAX_COMBINATIONS:
        for values in itertools.product(*corners):
            yield dict(zip(space, values, strict=True))
        return
    first = {key: dimension.corners[0] for key, dimension in space.items()}
    for key, dimension in space.items():
        for value in dimension.corners:
            yield {**first, key: value}
