"""Which verb a settings file is for: a file given to another one gets one clear answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from fulltune.config import Settings, load_config, read_yaml
from fulltune.errors import ConfigError

S = TypeVar("S", bound=Settings)
Verb: TypeAlias = Literal["chain", "compare", "corpus", "finetune", "pretrain", "search"]

_OF_A_RUN = ("task", "run_dir", "model")


def load(settings: type[S], path: Path, overrides: Sequence[str] = (), *, verb: Verb) -> S:
    """`load_config` for a verb, which refuses the file of another.

    Raises:
        ConfigError: the file is another verb's, or as `load_config`.
    """
    require(path, read_yaml(path), verb)
    return load_config(settings, path, overrides)


def require(path: Path, values: Mapping[str, Any], *verbs: Verb) -> None:
    """See that the settings of a file are not plainly those of another verb.

    Raises:
        ConfigError: they are.
    """
    found = _recognise(values)
    if found is None or found[0] in verbs:
        return
    verb, name = found
    if verb == "finetune" and "pretrain" in verbs:
        return  # a file of documents is either's: `pretrain` goes on with a trained model
    raise ConfigError(
        f"`{path}` is a file for `fulltune {verb}`: it has {name}",
        hint=f"run `fulltune {verb} {path}`",
    )


def _recognise(values: Mapping[str, Any]) -> tuple[Verb, str] | None:
    """The verb that settings belong to, and what says so; None where nothing does."""
    if isinstance(values.get("steps"), list):
        return "chain", "`steps`"
    if "space" in values:
        return "search", "`space`"
    if "methods" in values or isinstance(values.get("finetune"), dict):
        return "compare", "`methods`" if "methods" in values else "`finetune`"
    named = next((f"`{name}`" for name in _OF_A_RUN if name in values), None)
    if named is None:
        return ("corpus", "`sources`") if "sources" in values else None
    # Not above: they import torch, which `corpus` does without.
    from fulltune.models.presets import is_new_model
    from fulltune.recipes import finetune, pretrain

    task, model = values.get("task"), values.get("model")
    kind = task.get("kind", "text") if isinstance(task, dict) else "text"
    if kind == "text":
        names = pretrain.Config.model_fields.keys() - finetune.Config.model_fields.keys()
        only = next((f"`{name}`" for name in values if name in names), None)
        if only is not None:
            return "pretrain", only
    # A folder of that name is a trained model.
    if isinstance(model, str) and is_new_model(model) and not Path(model).is_dir():
        return "pretrain", f"the size of a new model, `model: {model}`"
    return "finetune", named
