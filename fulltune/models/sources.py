"""Sources to model folders.

A source is a folder, a run folder, a `.gguf` file, `asset:NAME`, or a name on the model hub.
`resolve_model` makes a checked folder in plain Hugging Face layout of any of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fulltune import assets
from fulltune.assets.building import built_whole
from fulltune.assets.dequantize import dequantize_gguf
from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import AssetError, ModelError, first_line, near_paths
from fulltune.runtime import cache_dir

POSSIBLE_SOURCES = (
    "give a run folder, a model folder, a .gguf file, a Hub name OWNER/NAME, or asset:NAME "
    "(`fulltune models` lists them)"
)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve_model(source: str) -> Path:
    """Give the local folder of a model, fetching or converting it the first time.

    Raises:
        AssetError: an asset or hub model cannot be had.
        ModelError: the folder or file is incomplete or corrupt.
    """
    check_model_source(source)
    if source.startswith(assets.PREFIX):
        folder = assets.fetch(source)
    elif source.lower().endswith(".gguf"):
        folder = _converted_gguf(Path(source).expanduser())
    elif (path := Path(source).expanduser()).exists():
        folder = path / "model" if (path / "model" / "config.json").is_file() else path
    else:
        folder = _from_hub(source)
    _check_folder(folder)
    return folder


def check_model_source(source: str) -> None:
    """Refuse a source that cannot be there, before anything slow is begun or fetched.

    Raises:
        AssetError: no such asset, or it is no model.
        ModelError: no such file or folder, and no name of the hub.
    """
    if not source.strip():
        raise ModelError("`model` is empty", hint=POSSIBLE_SOURCES)
    if source.startswith(assets.PREFIX):
        if assets.find_asset(source).kind != "model":
            names = (
                f"`{assets.PREFIX}{other.name}`"
                for other in assets.list_assets()
                if other.kind == "model"
            )
            raise AssetError(
                f"`{source}` is data, not a model", hint=f"models are {', '.join(names)}"
            )
    elif not Path(source).expanduser().exists() and not (
        source.lower().endswith(".gguf") or is_hub_name(source)
    ):
        raise ModelError(
            f"`{source}` does not exist", hint=_near_folders(source) or POSSIBLE_SOURCES
        )


def is_hub_name(source: str) -> bool:
    """Whether a source that is not there could be a model of the hub: `OWNER/NAME` or `NAME`."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", source) is not None


def _converted_gguf(gguf_file: Path) -> Path:
    if not gguf_file.is_file():
        raise ModelError(f"`{gguf_file}` does not exist", hint="give the path of a .gguf file")
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{gguf_file.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    with built_whole(folder) as building:
        dequantize_gguf(gguf_file, building)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with quiet_transformers():
            return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "it is offline or not reached" if offline else first_line(error)
        if Path(name).parent.is_dir() and "/" in name:  # a path here, if there ever was one
            raise ModelError(
                f"there is no folder `{name}`; a model of this name on the hub was not had either: "
                f"{reason}",
                hint=_near_folders(name) or POSSIBLE_SOURCES,
            ) from error
        raise AssetError(
            f"`{name}` does not exist here, and the model hub did not give it: {reason}",
            hint="check the path or name, and the network; without a hub, use a folder or "
            "asset:NAME (`fulltune models` lists them)",
        ) from error


def _near_folders(source: str) -> str | None:
    near = near_paths(Path(source).expanduser(), count=3)
    return f"did you mean {' or '.join(f'`{path}`' for path in near)}?" if near else None


def _check_folder(folder: Path) -> None:
    """Fail with the name of what is missing or corrupt."""
    if not folder.is_dir():
        raise ModelError(f"`{folder}` is not a folder", hint="give the folder of the model")
    if not (folder / "config.json").is_file():
        unfinished = (folder / "checkpoints").is_dir()
        raise ModelError(
            f"`{folder}` has no config.json",
            hint="it is a run that has not finished: go on with it by `--resume`"
            if unfinished
            else "is it a model folder?",
        )
    for path in _weight_files(folder):
        if not path.is_file():
            raise ModelError(f"`{path}` is missing", hint="copy or download it again")
        try:
            with safe_open(path, framework="pt"):
                pass  # opening checks the header against the file's length
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"`{path}` is corrupt or cut short: {error}", hint="copy or download it again"
            ) from error


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"`{index}` is not a weight index", hint="download it again"
            ) from error
        return [folder / name for name in sorted(set(weight_map.values()))]
    if not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"`{folder}` has no model.safetensors",
            hint=f"convert {pickled[0]} to safetensors: pickled weights can run code"
            if pickled
            else "is the download complete?",
        )
    return [folder / "model.safetensors"]
