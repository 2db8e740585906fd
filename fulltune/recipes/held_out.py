"""What a run held out and what it trained on, read again as the run read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fulltune.config import build_config, read_yaml
from fulltune.errors import ConfigError, DataError
from fulltune.inference import Loaded, build_objective
from fulltune.recipes.finetune import Config
from fulltune.recipes.prepare import Prepared, prepare
from fulltune.train.run_folder import CONFIG, MANIFEST, MODEL, MODEL_LAST, has_run, read_manifest


def run_folder(path: Path) -> Path | None:
    """The run that a model is, or lies in. A `config.yaml` alone is settings, not a run."""
    folders = (path, path.parent) if path.name in (MODEL, MODEL_LAST) else (path,)
    runs = (folder for folder in folders if has_run(folder) and (folder / MANIFEST).is_file())
    return next(runs, None)


def fine_tuning_run(path: Path) -> tuple[Path, Config] | None:
    """The run that a model is, or lies in, where it was fine-tuned."""
    folder = run_folder(path)
    if folder is None or "objective" in (values := read_yaml(folder / CONFIG)):
        return None
    return folder, build_config(Config, values)


def run_with_validation(path: Path) -> tuple[Path, Config]:
    """The run that a model is, or lies in, which held something out.

    Raises:
        ConfigError: it is no run, or nothing was held out.
    """
    run = fine_tuning_run(path)
    if run is None:
        raise ConfigError(
            f"`{path}` is not a run, so there is no validation split",
            hint="name the data with `--data FILE`",
        )
    if run[1].task.validation is None:
        raise nothing_held_out(run[0])
    return run


def nothing_held_out(folder: Path) -> ConfigError:
    """The error of a run without a validation split."""
    return ConfigError(
        f"the run in `{folder}` held nothing out", hint="name the data with `--data FILE`"
    )


def read_own_data(loaded: Loaded, folder: Path, config: Config) -> Prepared:
    """The data of a run as its model reads it, with the same splits.

    Raises:
        DataError: the data changed since, so that another share would be held out.
    """
    objective = build_objective(
        loaded, too_long=config.task.too_long, special_tokens=config.task.special_tokens
    )
    prepared = prepare(objective, config.task, seed=config.seed)
    require_unchanged(folder, prepared.sources)
    return prepared


def require_unchanged(folder: Path, sources: Sequence[Mapping[str, Any]]) -> None:
    """Of other rows another share would be held out, and the model may have been trained on it."""
    recorded = {
        entry["source"]: entry["fingerprint"] for entry in read_manifest(folder).get("data", ())
    }
    changed = [
        source["source"]
        for source in sources
        if recorded.get(source["source"], source["fingerprint"]) != source["fingerprint"]
    ]
    if changed:
        raise DataError(
            f"{', '.join(f'`{name}`' for name in changed)} changed since the run in `{folder}`, so "
            "its validation split is not the one that was held out",
            hint="restore the data, or name other data with `--data FILE`",
        )
