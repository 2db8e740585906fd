"""Numbers and answers as people write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fulltune.tracking.json_text import name_not_finite


def show_answer(sample: Mapping[str, Any]) -> str:
    """The answer of a sample, with a mark where the longest length cut it off."""
    return f"{sample['answer']}{'' if sample.get('stopped', True) else ' …'}"


def format_bytes(num_bytes: float) -> str:
    """Memory in the units of a system monitor: `1.9 GiB`, `412 MiB`."""
    if num_bytes >= 1024**3:
        return f"{num_bytes / 1024**3:.1f} GiB"
    return f"{num_bytes / 1024**2:.0f} MiB"


def format_miss(error: float) -> str:
    """A prediction's relative error in words: `13% too low`."""
    percent = round(abs(error) * 100)
    if percent == 0:
        return "right within 1%"
    return f"{percent}% too {'high' if error > 0 else 'low'}"


def format_duration(seconds: float) -> str:
    """A time as on a clock: `0:41`, `12:05`, `3:20:00`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    if total >= 48 * 3600:
        return f"{total // 86400} d {total % 86400 // 3600} h"
    hours, minutes = total // 3600, total % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02}:{total % 60:02}"
    return f"{minutes}:{total % 60:02}"


def format_number(value: float) -> str:
    """A count as it is; else four figures at most, with an exponent only where people write one."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return name_not_finite(value)
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude < 0.001:
        return f"{value:.2e}"
    decimals = max(0, 3 - math.floor(math.log10(magnitude)))
    return f"{value:.{min(decimals, 4)}f}"


def name_of(key: str) -> str:
    """A metric or a value as people call it: `macro F1`, `learning rate`."""
    return _NAMES.get(key) or key.replace("_", " ")


_NAMES = {
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "span_f1": "span F1",
    "matthews": "Matthews correlation",
    "f1": "F1",
    "lr": "learning rate",
}


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values as a row of bars; a value that is not finite is an `x`."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    bars = "▁▂▃▄▅▆▇█"
    spread = (high - low) or 1.0
    return "".join(
        bars[round((value - low) / spread * (len(bars) - 1))] if math.isfinite(value) else "x"
        for value in shown
    )


def printable(text: str) -> str:
    """The text on one line, without the control characters that data or answers may hold."""
    spaced = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(spaced.split())
