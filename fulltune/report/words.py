"""Numbers, settings and names as the pages of a report write them."""

from __future__ import annotations

import math

from fulltune.tracking import format_bytes, format_number, name_of

_NAMES = {"cpu": "CPU", "gpu": "GPU"}


def is_share(metric: str) -> bool:
    """Whether a metric is a share between 0 and 1."""
    return metric.endswith(("accuracy", "_f1", "exact_match"))


def metric_text(metric: str, value: float) -> str:
    """A metric's value: a share in percent."""
    if is_share(metric) and math.isfinite(value):
        return f"{value:.1%}"
    return format_number(value)


def title_of(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def words_of(key: str) -> str:
    """The words of a key."""
    return _NAMES.get(key) or name_of(key).replace(".", " ")


def fact_text(key: str, value: object) -> str:
    """A value by the unit that its key names."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        if key.endswith("share"):
            return f"{value:.1%}"
        if key.endswith("bytes"):
            return format_bytes(value)
        return count_text(value) if isinstance(value, int) else format_number(value)
    return str(value)


def setting_text(value: object) -> str:
    """A setting as a user would say it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    if value is None or value == {}:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def count_text(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def percent_text(value: float) -> str:
    """A share in percent, a small one more exactly."""
    return f"{value:.1%}" if abs(value) >= 0.1 else f"{value:.3%}"


def large_text(value: float) -> str:
    """A number in millions or billions."""
    for factor, name in ((1e9, "B"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {name}"
    return f"{value:,.0f}"
