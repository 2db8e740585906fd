"""What a file of predictions was made with, in a small file beside it: `answers.jsonl.origin.json`.

Rows of two models, or of two temperatures, in one file could not be told apart. So what decides an
answer is written before the first row, and rows are only added where it is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import RunFolderError
from fulltune.inference import PREDICTORS, GenerationSettings, Loaded
from fulltune.train.run_folder import write_atomically

SUFFIX = ".origin.json"
# Weights, configuration, tokenizer and chat template; not the card.
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Origin:
    """What decides the predictions of a row."""

    model: str
    """As it was named."""
    model_hash: str
    """SHA-256 over the files of the model folder: another name for the same model is no other."""
    settings: dict[str, Any]
    """Of the command line: those that have an effect on this kind of model."""


def describe_origin(
    model: str,
    loaded: Loaded,
    settings: GenerationSettings | None,
    *,
    columns: Mapping[str, str],
    too_long: str,
) -> Origin:
    """What the predictions of a loaded model are made with."""
    digest = hashlib.sha256()
    for path in sorted({path for glob in MODEL_FILES for path in loaded.path.glob(glob)}):
        with path.open("rb") as stream:
            digest.update(
                f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
            )
    values: dict[str, Any] = {"column": dict(columns), "dtype": str(loaded.model.dtype)}
    predictor = PREDICTORS[loaded.kind]
    if predictor.truncates:
        values["too_long"] = too_long
        if loaded.quick is not None:
            values["quick"] = True
    if predictor.generates:
        values |= (settings or GenerationSettings()).model_dump(mode="json")
    return Origin(model, digest.hexdigest(), values)


def origin_path(output: Path) -> Path:
    """The file beside a file of predictions."""
    return output.with_name(output.name + SUFFIX)


def write_origin(output: Path, origin: Origin) -> None:
    """Say what is going to write ``output``; before its first row."""
    text = json.dumps(asdict(origin), ensure_ascii=False, indent=1)
    write_atomically(origin_path(output), text + "\n")


def require_same_origin(output: Path, origin: Origin) -> None:
    """Rows may be added to ``output`` only by what wrote those that are there.

    Raises:
        RunFolderError: another model or other settings wrote them, or nothing says what did.
    """
    path = origin_path(output)
    try:
        found = Origin(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunFolderError(
            f"`{output}` has rows, but `{path}`, which says what model and settings wrote them, "
            "is not there",
            hint="put that file back beside it, or give another `--output`",
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"`{path}`, which says what model and settings wrote `{output}`, cannot be read: "
            f"{error}",
            hint="give another `--output`",
        ) from None
    if found.model_hash != origin.model_hash:
        other = (
            f"by `{found.model}`, and `{origin.model}` is another model"
            if found.model != origin.model
            else f"by `{found.model}` before its files changed"
        )
        raise RunFolderError(
            f"the rows of `{output}` were written {other}",
            hint="go on with the model of the file, or give another `--output`",
        )
    names = dict.fromkeys((*found.settings, *origin.settings))
    differing = [
        f"`{name}` was {_shown(found.settings.get(name))} and is now "
        f"{_shown(origin.settings.get(name))}"
        for name in names
        if found.settings.get(name) != origin.settings.get(name)
    ]
    if differing:
        raise RunFolderError(
            f"the rows of `{output}` were written with other settings: {', '.join(differing)}",
            hint="go on with the settings of the file, or give another `--output`",
        )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
