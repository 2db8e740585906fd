"""Files, folders, assets and Hub data sets as a stream of rows, each knowing its file and line.

What a row means is the business of `formats.py`. Memory stays flat: nothing here holds a file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fulltune.assets import fetch, find_asset, list_assets
from fulltune.data.files import (
    WHOLE_FILES,
    DataFile,
    TextReading,
    known_suffixes,
    read_file,
    recognise_file,
    row_lines,
    unreadable,
)
from fulltune.data.json_rows import parse_json_lines
from fulltune.errors import DataError, MissingExtraError, listed, near_paths

STANDARD_INPUT = "-"
ASSET_PREFIX = "asset:"
HUB_PREFIX = "hub:"

_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row."""

    fields: dict[str, Any]
    where: str
    """File and line as the user named it, ``data/train.jsonl:17``; a row if it has no lines."""


def read_records(
    source: str, *, limit: int | None = None, reading: TextReading = WHOLE_FILES
) -> Iterator[Record]:
    """Rows of a source in a fixed order, one at a time.

    Args:
        source: a file, a folder (its files of known formats, sorted; plain text only where there is
            nothing else, so that a README is not data), `asset:NAME`, `hub:OWNER/NAME[:SPLIT]`, a
            folder saved by `datasets`, or `-` for JSON Lines from standard input.
        limit: stop after so many rows.
        reading: how plain text is cut into documents.

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    return itertools.islice(_read_source(source, reading), limit)


def check_source(source: str) -> None:
    """Refuse a source that cannot be there, before anything slow is begun or fetched.

    Raises:
        DataError: no such file, or none of a known format.
        AssetError: no such asset.
    """
    if source.startswith(ASSET_PREFIX):
        _find_data_asset(source)
    elif source == STANDARD_INPUT:
        source_fingerprint(source)
    elif not _is_datasets_source(source):
        _list_files(source)


def source_fingerprint(source: str) -> str:
    """Hash of the content of a source, wherever it lies; for a file what `b2sum -l 256` prints."""
    if source == STANDARD_INPUT:
        raise DataError(
            "standard input `-` can be read only once, and data for training is read again",
            hint="save it to a .jsonl file and name that file",
        )
    if _is_datasets_source(source):
        paths = sorted(Path(entry["filename"]) for entry in _load_datasets(source).cache_files)
        return _hash_text("\n".join(_hash_file(path) for path in paths))
    files = _list_files(source)
    root = _local_path(source)
    if root.is_file():
        return _hash_file(root)
    lines = (f"{_hash_file(file.path)} {file.path.relative_to(root).as_posix()}" for file in files)
    return _hash_text("\n".join(lines))


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise unreadable(str(path), error) from error
    return digest.hexdigest()


def _read_source(source: str, reading: TextReading) -> Iterator[Record]:
    if source == STANDARD_INPUT:
        rows: Iterable[tuple[int, dict[str, Any]]] = parse_json_lines(
            row_lines(sys.stdin.buffer, "standard input"), "standard input"
        )
        yield from _named_rows("standard input", rows)
    elif _is_datasets_source(source):
        yield from _named_rows(source, _read_datasets(source))
    else:
        for file in _list_files(source):
            yield from _named_rows(file.name, read_file(file, reading))


def _named_rows(name: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Record]:
    empty = True
    for line, fields in rows:
        empty = False
        yield Record(fields, f"{name}:{line}")
    if empty:
        raise DataError(
            f"`{name}` is empty: it holds no records", hint="was it written completely?"
        )


# Where the files are


def _local_path(source: str) -> Path:
    if source.startswith(ASSET_PREFIX):
        return fetch(_find_data_asset(source))
    return Path(source).expanduser()


def _find_data_asset(source: str) -> str:
    asset = find_asset(source)
    if asset.kind != "data":
        names = (f"`{ASSET_PREFIX}{other.name}`" for other in list_assets() if other.kind == "data")
        raise DataError(f"`{source}` is a model, not data", hint=f"data are {', '.join(names)}")
    return asset.name


def _list_files(source: str) -> list[DataFile]:
    if "://" in source:
        raise DataError(
            f"`{source}` is an address, and data is read from files",
            hint="download it, or name a Hub data set as `hub:OWNER/NAME`",
        )
    path = _local_path(source)
    if path.is_dir():
        return _list_folder(path, source.rstrip("/"))
    if not path.exists():
        raise _missing(path)
    file = recognise_file(path, source)
    if file is None:
        raise DataError(
            f"`{source}`: the suffix `{path.suffix}` is not a known data format",
            hint=f"known are {known_suffixes()}",
        )
    return [file]


def _list_folder(folder: Path, name: str) -> list[DataFile]:
    if (folder / "manifest.json").is_file() and (folder / "train" / "train-00000.arrow").is_file():
        raise DataError(
            f"`{name}` is a prepared corpus, which holds training and validation apart",
            hint=f"name one: `{name}/train` or `{name}/validation`",
        )
    files = []

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error)

    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        # A link may lead back up, or to what stands here under its own name: each is read once.
        real = {entry: os.path.realpath(Path(parent, entry)) for entry in folders}
        for entry in sorted(folders, key=lambda entry: Path(parent, entry).is_symlink()):
            if real[entry] in seen:
                folders.remove(entry)
            seen.add(real[entry])
        for entry in sorted(names):
            path = Path(parent, entry)
            file = recognise_file(path, f"{name}/{path.relative_to(folder).as_posix()}")
            if file is not None and not entry.startswith("."):
                files.append(file)
    tables = [file for file in files if not file.is_plain_text]
    if not files:
        raise DataError(f"folder `{name}` holds no data file", hint=f"known are {known_suffixes()}")
    return sorted(tables or files, key=lambda file: file.name)


def _missing(path: Path) -> DataError:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return DataError(
            f"`{path}` does not exist, nor does its folder `{path.parent}`",
            hint=f"`{folder.resolve()}` is the nearest folder that does",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = [str(other) for other in near_paths(path, count=3)]
    if near:
        return DataError(f"`{path}` does not exist", hint=f"did you mean {listed(near)}?")
    data = [name for name in names if recognise_file(Path(name), name) is not None]
    found = f"data files there: {listed(data[:8])}" if data else "there is no data file"
    return DataError(f"`{path}` does not exist", hint=f"looked in `{folder.resolve()}`; {found}")


# Data sets of the `datasets` package


def _is_datasets_source(source: str) -> bool:
    if source.startswith(HUB_PREFIX):
        return True
    if "://" in source or source.startswith(ASSET_PREFIX):
        return False
    folder = _local_path(source)
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def _load_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f"`{source}` is read with the package `datasets`, which is not installed",
            hint="pip install 'fulltune[hub]'",
        ) from None
    if not source.startswith(HUB_PREFIX):
        return _load_saved(source, datasets)
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    # The package raises OSError for what it does not find or reach, ValueError for a wrong split.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"`{source}` cannot be loaded: {reason}",
            hint="the form is `hub:OWNER/NAME` or `hub:OWNER/NAME:SPLIT`",
        ) from error


def _load_saved(source: str, datasets: Any) -> Any:
    path = _local_path(source)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in path.glob("*/dataset_info.json"))
        folder = source.rstrip("/")
        raise DataError(
            f"`{source}` holds several splits",
            hint=f"name one: {listed(f'{folder}/{split}' for split in splits)}",
        )
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(source, error) from error


def _read_datasets(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    dataset = _load_datasets(source)
    names = {}
    for column, feature in dataset.features.items():
        # A list of labels, one for each word, holds the names in what its items are.
        item = getattr(feature, "feature", feature)
        if type(item).__name__ == "ClassLabel":
            names[column] = item.names
    for number, row in enumerate(dataset, start=1):
        for column, labels in names.items():
            row[column] = _label_names(row[column], labels)
        yield number, row


def _label_names(code: Any, labels: Sequence[str]) -> Any:
    if isinstance(code, list):
        return [_label_names(each, labels) for each in code]
    # -1 is how these data sets write "no label", as in hidden test sets.
    return None if code is None or code < 0 else labels[code]
