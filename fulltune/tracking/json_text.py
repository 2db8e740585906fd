"""Documents of numbers as JSON, which has no NaN and no Infinity.

As in `metrics.jsonl`, such a number is written as a text, `"NaN"`, and `not_finite` names the
fields that hold one: nothing is lost, and an answer that happens to read "NaN" stays an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE_KEY = "not_finite"
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def name_not_finite(value: float) -> str:
    """`NaN`, `Infinity` or `-Infinity`."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def to_json_text(document: object, *, indent: int) -> str:
    """A mapping, or a list of them, as JSON that every program reads.

    A field inside of others is named by its path, `results.perplexity`; places in lists are not
    part of it.
    """
    if isinstance(document, list | tuple):
        plain: object = [_with_names(part) for part in document]
    else:
        plain = _with_names(document)
    return json.dumps(plain, ensure_ascii=False, indent=indent, default=str, allow_nan=False)


def restore_numbers(document: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that `to_json_text` was given, from what `json.loads` made of its text.

    Raises:
        ValueError: `not_finite` is no list of names.
    """
    restored = dict(document)
    for path in take_names(restored):
        restored = _restored(restored, path.split("."))
    return restored


def take_names(document: dict[str, Any]) -> list[str]:
    """Take the names of `not_finite` out of a document, where it has them.

    Raises:
        ValueError: they are no list of names.
    """
    names = document.pop(NOT_FINITE_KEY, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{NOT_FINITE_KEY}` is not a list of names")
    return names


def _with_names(value: object) -> object:
    paths: dict[str, None] = {}
    plain = _plain(value, "", paths)
    return {**plain, NOT_FINITE_KEY: list(paths)} if isinstance(plain, dict) and paths else plain


def _plain(value: object, path: str, paths: dict[str, None]) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        paths[path] = None
        return name_not_finite(value)
    if isinstance(value, Mapping):
        return {
            name: _plain(inner, f"{path}.{name}" if path else str(name), paths)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(inner, path, paths) for inner in value]
    return value


def _restored(value: Any, path: list[str]) -> Any:
    if isinstance(value, list):
        return [_restored(inner, path) for inner in value]
    if not path:
        return NOT_FINITE.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        return value
    # A name may hold a dot itself: `weights.0` is tried before `weights`.
    for length in range(len(path), 0, -1):
        name = ".".join(path[:length])
        if name in value:
            return {**value, name: _restored(value[name], path[length:])}
    return value
