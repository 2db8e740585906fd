"""Settings: YAML and `key=value` read into frozen pydantic models, and written back.

Nothing else in the package reads a file of settings; everything else receives typed values. Each
settings class stands beside the code that reads it, and a recipe's class only composes them.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticUndefined

from fulltune.errors import ConfigError, near_names, near_paths

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, meanings as docstrings under the fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )


# -- quantities: a number with its unit ------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, as it is written in a settings file: `3 epochs`, `5%`."""

    value: float
    unit: str

    def __str__(self) -> str:
        number = f"{self.value:.12g}"
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"


def has_wrong_comma(number: str) -> bool:
    """Whether a comma in a number does anything but part thousands.

    `0,5%` is half a per cent to some; that it is not five must be said.
    """
    return "," in number and not re.fullmatch(r"[1-9][0-9]{0,2}(,[0-9]{3})+([.eE].*)?", number)


@dataclass(frozen=True)
class Units:
    """The units a setting accepts; shown by `fulltune settings`."""

    names: tuple[str, ...]

    def parse(self, value: object) -> Quantity:
        """Read `32768 tokens`; a singular unit is accepted, a missing or foreign one is not."""
        if isinstance(value, bool) or not isinstance(value, Quantity | str | int | float):
            raise ValueError(f"must be a number with a unit; write {self.example()}")
        text = str(value)
        match = re.fullmatch(
            r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([^\s0-9]*)\s*", text
        )
        if match is None:
            raise ValueError(f"must be a number with a unit, not negative; write {self.example()}")
        if has_wrong_comma(match[1]):
            raise ValueError(f"a comma only parts thousands; write {self.example()}")
        number, unit = float(match[1].replace("_", "").replace(",", "")), match[2]
        known = {name.lower(): name for name in self.names}
        known |= {name.lower().removesuffix("s"): name for name in self.names}
        if unit.lower() not in known:
            said = f"`{unit}` is not a unit here" if unit else "the unit is missing"
            raise ValueError(f"{said}; write {self.example()}")
        if not math.isfinite(number):
            raise ValueError("it must be finite")
        return Quantity(number, known[unit.lower()])

    def example(self) -> str:
        """What one may write, as a phrase."""
        numbers = {"epochs": "3", "steps": "500", "tokens": "32768", "examples": "64", "%": "5"}
        words = [
            f"`{numbers.get(name, '20')}{'' if name == '%' else ' '}{name}`" for name in self.names
        ]
        return " or ".join(words)


def _quantity(*names: str) -> tuple[Units, BeforeValidator, PlainSerializer]:
    units = Units(names)
    return units, BeforeValidator(units.parse), PlainSerializer(str, return_type=str)


BROKEN_UNITS = ("epochs", "%", "minutes")
"""Units whose numbers need not be whole."""


def _positive(quantity: Quantity) -> Quantity:
    if quantity.value <= 0:
        raise ValueError("it must be more than zero")
    return quantity


def _whole(quantity: Quantity) -> Quantity:
    """Epochs, shares and times may be broken; steps, tokens and examples are counted."""
    if quantity.unit not in BROKEN_UNITS and quantity.value != int(quantity.value):
        raise ValueError("must be a whole number")
    return quantity


_DURATION = _quantity("epochs", "steps", "tokens")
_BATCH = _quantity("tokens", "examples")
_PERIOD = _quantity("steps", "epochs")
_WARMUP = _quantity("%", "steps")
_BUDGET = _quantity("trials", "minutes", "tokens")

Duration = Annotated[Quantity, *_DURATION, AfterValidator(_positive), AfterValidator(_whole)]
"""How long to train: `3 epochs`, `500 steps` or `2e9 tokens`."""
BatchSize = Annotated[Quantity, *_BATCH, AfterValidator(_positive), AfterValidator(_whole)]
"""How much one optimizer step sees: `32768 tokens` or `64 examples`."""
Period = Annotated[Quantity, *_PERIOD, AfterValidator(_positive), AfterValidator(_whole)]
"""How often: `100 steps`, or `1 epoch`, which ends where the epoch does."""
Warmup = Annotated[Quantity, *_WARMUP, AfterValidator(_whole)]
"""A share of all steps, `3%`, or a number, `100 steps`."""
Budget = Annotated[Quantity, *_BUDGET, AfterValidator(_positive), AfterValidator(_whole)]
"""What a search may take in all: `20 trials`, `30 minutes` or `2e6 tokens`."""


# -- reading ---------------------------------------------------------------------------------------


def load_config(settings: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Build ``settings`` from its defaults, then the file, then the overrides, in that order.

    Args:
        settings: the settings class of a recipe.
        path: a YAML file holding only what differs from the defaults, or None.
        overrides: ``section.key=value`` strings, the value in YAML syntax.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not possible; the
            message names the key, the nearest valid one, and what is possible.
    """
    values = read_yaml(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"`{override}` is not a setting", hint=f"write `{override}=VALUE`")
        section = values
        *parents, leaf = key.strip().split(".")
        for depth, parent in enumerate(parents):
            inner = section.setdefault(parent, {})
            if not isinstance(inner, dict):
                name = ".".join(parents[: depth + 1])
                raise ConfigError(
                    f"`{name}` is `{written_value(inner)}`, not a section, so there is no `{key}`",
                    hint=f"write `{name}=VALUE`",
                )
            section = inner
        try:
            section[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            section[leaf] = text
    return build_config(settings, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML (with line), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = near_paths(path, "*.y*ml") or near_paths(Path(path.name), "*.y*ml")
        hint = f"did you mean `{near[0]}`?" if near else "give the path of a YAML file"
        raise ConfigError(f"no settings file `{path}`", hint=hint) from None
    except IsADirectoryError:
        raise ConfigError(
            f"`{path}` is a folder, not a settings file", hint="give the path of a YAML file"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"`{path}` cannot be read: {error.strerror}", hint="give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None
    try:
        values = yaml.load(text, _UniqueKeyLoader)  # a safe loader, in spite of its name
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ConfigError(
            f"{where}: {problem}",
            hint="correct that line or the one before; a settings file is `key: value` lines",
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        names: dict[type, str] = {list: "a list", str: "text"}
        found = names.get(type(values), type(values).__name__)
        raise ConfigError(
            f"`{path}` holds {found}, not settings",
            hint="write `key: value` lines, such as `model: asset:smollm2-135m-instruct`",
        )
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win, unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"`{key.value}` is given twice", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def build_config(settings: type[S], values: Mapping[str, Any]) -> S:
    """Validate ``values``; every wrong key is named in one `ConfigError`."""
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        messages, hints = [], []
        for details in error.errors():
            message, hint = _explain(settings, details)
            if message not in messages:
                messages.append(message)
            if hint and hint not in hints:
                hints.append(hint)
        raise ConfigError("; ".join(messages), hint="; ".join(hints) or None) from None


def _explain(settings: type[BaseModel], details: ErrorDetails) -> tuple[str, str | None]:
    path, section = _setting_of(settings, details["loc"])
    key, given, kind = ".".join(path), details["input"], details["type"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        valid = list_keys(settings)
        prefix = ".".join(path[:-1])
        near = _nearest(key, settings)
        here = [name for name in section.model_fields] if section else valid
        hint = (
            f"did you mean `{near}`?"
            if near
            else f"settings {f'in `{prefix}`' if prefix else 'here'}: {', '.join(here)}"
        )
        return f"unknown setting `{key}`", hint
    if kind == "missing" and len(path) == len(details["loc"]):
        return f"`{key}` is not set, and has no default", f"add `{key}: ...`"
    if kind in ("model_type", "model_attributes_type"):
        inner = ", ".join(f"`{key}.{name}`" for name in section.model_fields) if section else ""
        return f"`{key}` is a section, but is given `{written_value(given)}`", f"set one of {inner}"
    why, semicolon, advice = details["msg"].removeprefix("Value error, ").partition("; ")
    if kind in _PLAIN_REASONS:
        why = _PLAIN_REASONS[kind].format(**context)
    if isinstance(given, dict) and kind == "value_error":  # settings that contradict each other
        return why, advice
    hint = advice if semicolon else _meaning(settings, key)
    return f"`{key}` cannot be `{written_value(given)}`: {why[:1].lower()}{why[1:]}", hint


_PLAIN_REASONS = {
    "literal_error": "no such choice",
    "int_type": "not a whole number",
    "int_parsing": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "float_parsing": "not a number",
    "finite_number": "not a finite number",
    "bool_type": "neither true nor false",
    "bool_parsing": "neither true nor false",
    "string_type": "not text, as it would be in quotes",
    "dict_type": "not a mapping",
    "tuple_type": "not a list",
    "missing": "too few values",
    "too_long": "too many values",
    "greater_than": "it must be more than {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be less than {lt:g}",
    "less_than_equal": "it must be at most {le:g}",
}
"""What a user reads for pydantic's kinds of error, with their context filled in."""


def _meaning(settings: type[BaseModel], key: str) -> str:
    """What a setting accepts and means, as `fulltune settings` says it."""
    rows = {row.key: f"`{key}` ({row.kind}): {row.meaning}" for row in list_settings(settings)}
    return rows.get(key, "`fulltune settings` lists what is possible")


_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
    "max_grad_norm": "optimizer.clip_norm",
    "epochs": "duration",
    "num_epochs": "duration",
    "num_train_epochs": "duration",
    "max_steps": "duration",
    "batch_size": "batch",
    "per_device_train_batch_size": "batch",
    "output_dir": "run_dir",
    "model_name_or_path": "model",
    "max_seq_length": "task.max_length",
    "eval_steps": "evaluate.every",
    "save_steps": "save_every",
    "bf16": "precision",
}
"""What other programs call a setting."""


def _nearest(key: str, settings: type[BaseModel]) -> str | None:
    """A setting of this name in another section, or of nearly this name."""
    valid = list_keys(settings)
    prefix, dot, leaf = key.rpartition(".")
    if (other := _OTHER_NAMES.get(leaf)) in valid:
        return other
    last_parts: dict[str, str] = {}  # `validation` is `task.validation`
    for name in valid:
        last_parts.setdefault(name.rpartition(".")[2], name)
    if leaf in last_parts:
        return last_parts[leaf]
    beside = [name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == prefix]
    for close in near_names(leaf, beside):
        return f"{prefix}{dot}{close}"
    return next((last_parts[close] for close in near_names(leaf, last_parts)), None)


def written_value(value: object) -> str:
    """A value as it stands in a settings file."""
    if isinstance(value, str) and value.strip():
        return value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()


def _setting_of(
    settings: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path of a setting; pydantic's own markers of union members are left out."""
    path: list[str] = []
    section: type[BaseModel] | None = settings
    for part in loc:
        if section is None:
            break
        path.append(str(part))
        field = section.model_fields.get(str(part))
        inner = _section_type(field.annotation) if field else None
        if inner is None:
            break
        section = inner
    return path, section


def _section_type(annotation: object) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


# -- listing and writing ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SettingRow:
    """One line of `fulltune settings`."""

    key: str
    kind: str
    default: str
    meaning: str


def list_settings(settings: type[BaseModel], prefix: str = "") -> Iterator[SettingRow]:
    """Every setting with what it accepts, its default and its meaning, as the class has them."""
    for name, field in settings.model_fields.items():
        section = _section_type(field.annotation)
        if section is not None:
            yield from list_settings(section, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else _show(default)
        yield SettingRow(
            key=f"{prefix}{name}",
            kind=_describe_type(field.annotation, field.metadata),
            default=shown,
            meaning=" ".join((field.description or "").split()),
        )


def list_keys(settings: type[BaseModel]) -> list[str]:
    """All dotted keys, sections included."""
    keys: list[str] = []
    for name, field in settings.model_fields.items():
        keys.append(name)
        section = _section_type(field.annotation)
        if section is not None:
            keys += [f"{name}.{inner}" for inner in list_keys(section)]
    return keys


def number_type(settings: type[BaseModel], key: str) -> type[float] | type[int] | Units | None:
    """What kind of number a setting is: a whole one, any, or one with a unit.

    Args:
        settings: the settings class of a recipe.
        key: dotted name of a setting.

    Returns:
        None where the setting is no number, or there is no such setting.
    """
    *parents, leaf = key.split(".")
    section: type[BaseModel] | None = settings
    for name in parents:
        field = section.model_fields.get(name) if section else None
        section = _section_type(field.annotation) if field else None
    field = section.model_fields.get(leaf) if section else None
    return _number_type(field.annotation, field.metadata) if field else None


def _number_type(
    annotation: object, metadata: Sequence[object]
) -> type[float] | type[int] | Units | None:
    for item in metadata:
        if isinstance(item, Units):
            return item
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _number_type(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        found = [_number_type(argument, ()) for argument in arguments]
        return next((kind for kind in found if kind is not None), None)
    return float if annotation is float else int if annotation is int else None


def dump_config(config: BaseModel) -> str:
    """The full settings as YAML; reading it again gives an equal object."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def differing_keys(left: BaseModel, right: BaseModel) -> list[str]:
    """Dotted keys whose values differ between two settings of one class."""
    keys: list[str] = []
    for name in type(left).model_fields:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, BaseModel) and isinstance(b, BaseModel):
            keys += [f"{name}.{key}" for key in differing_keys(a, b)]
        elif a != b:
            keys.append(name)
    return keys


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict) and not value:
        return "{}" if isinstance(value, dict) else "[]"
    return str(value)


def _describe_limits(metadata: Sequence[object]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [part for item in metadata for part in (item, *getattr(item, "metadata", ()))]
    return " and ".join(
        f"{sign} {getattr(part, name):g}"
        for part in found
        for name, sign in signs.items()
        if isinstance(getattr(part, name, None), int | float)
    )


def _describe_type(annotation: object, metadata: Sequence[object]) -> str:
    for item in metadata:
        if isinstance(item, Units):
            return item.example().replace("`", "")
    limits = _describe_limits(metadata)
    if limits:
        return f"{_describe_type(annotation, ())} {limits}"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _describe_type(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_describe_type(a, ()) for a in arguments))
    if origin is tuple:
        return f"list of {_describe_type(arguments[0], ())}"
    if origin is dict:
        return "mapping"
    names: dict[object, str] = {
        str: "text", int: "whole number", float: "number", bool: "true | false",
        types.NoneType: "null", Path: "path",
    }  # fmt: skip
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
