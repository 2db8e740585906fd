"""`metrics.jsonl`: one JSON object a line, appended and flushed.

A killed run loses at most the line being written; a resumed one forgets what it will do again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fulltune.errors import DataError, RunFolderError
from fulltune.tracking.json_text import (
    NOT_FINITE,
    NOT_FINITE_KEY,
    name_not_finite,
    take_names,
)

# Written after the last checkpoint, and with its step.
_OF_THE_END = ("sample", "weight_change", "result", "end")


class MetricsLog:
    """Append-only log of events. A line torn by a killed run is removed when the log is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _named_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend_last_line(path)
            self._file = path.open("ab", buffering=0)

    def write(self, event: str, **values: Any) -> None:
        """Append one event with the time; it is with the operating system when this returns."""
        line = _encode_event({"event": event, "time": round(time.time(), 3), **values})
        size_before = self._file.seek(0, os.SEEK_END)
        with _named_write_errors(self.path):
            try:
                _write_all(self._file, line)
            except OSError:
                # Half a line on a full disk would spoil the next one.
                with suppress(OSError):
                    self._file.truncate(size_before)
                raise

    def sync(self) -> None:
        """Have everything written so far on the disk itself; called where a checkpoint is."""
        with _named_write_errors(self.path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Forget events of later steps, and of the end, which a resumed run makes again.

        Events without a step stay. The file is replaced in one rename, so it is never half cut.
        """
        self._file.close()
        kept = [
            event
            for event in read_metrics(self.path)
            if event.get("step", step) <= step
            and not (event["event"] in _OF_THE_END and event.get("step", 0) > 0)
        ]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with _named_write_errors(self.path):
            with temporary.open("wb") as file:
                file.writelines(_encode_event(event) for event in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a log, in order. Only the last line may be torn; it is then left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"`{path}` does not exist, so there are no metrics to read",
            hint="give the folder of a run that has made at least one step",
        ) from error
    lines = content.split(b"\n")
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        event = _decode_event(line)
        if event is not None:
            events.append(event)
        elif number < len(lines):  # A line that ends in a newline was written whole.
            raise DataError(
                f"{path}:{number} is not an event: a JSON object with a text `event` was "
                f"expected, and a list of its fields in `{NOT_FINITE_KEY}`, where it has that",
                hint="the file was changed after the run wrote it; remove that line to read on",
            )
    return events


def _write_all(file: Any, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[file.write(view) :]


def _encode_event(event: Mapping[str, Any]) -> bytes:
    not_finite: list[str] = []
    encoded = {}
    for key, value in event.items():
        encoded[key] = _encode_value(value, key, not_finite)
    if not_finite:
        encoded[NOT_FINITE_KEY] = sorted(set(not_finite))
    text = json.dumps(encoded, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"


def _encode_value(value: Any, key: str, not_finite: list[str]) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        not_finite.append(key)
        return name_not_finite(value)
    if isinstance(value, Mapping):
        return {str(name): _encode_value(item, key, not_finite) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_value(item, key, not_finite) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a scalar of NumPy or torch
        return _encode_value(value.item(), key, not_finite)
    raise TypeError(f"`{key}` of a logged event is a {type(value).__name__}, not a number or text")


def _decode_event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    try:
        for key in take_names(event):
            event[key] = _decode_value(event[key])
    except (ValueError, KeyError):
        return None
    return event


def _decode_value(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decode_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode_value(item) for item in value]
    return value


def _mend_last_line(path: Path) -> None:
    """Cut a torn last line, or end a whole one, so that the next event begins a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if _decode_event(content[start:]) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


@contextmanager
def _named_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(
            f"`{path}` cannot be written: {error.strerror or error}",
            hint="free space on that disk, or choose another `run_dir`",
        ) from error
