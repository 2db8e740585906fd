"""`fulltune attention --html`: heat maps of attention weights over the tokens of a text, as a page.

The page is one file: weights, style and script are inside it. Everything that comes from the text
is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fulltune.errors import ConfigError
from fulltune.models.attention_equation import TOLERANCE, LayerAttention

MAX_TOKENS = 128
"""Tokens of a drawn text; of more, neither labels nor cells could be told apart."""
MAX_WEIGHTS = 2_000_000
"""Weights in one page, about 14 MB."""


@dataclass(frozen=True)
class AttentionReport:
    """The attention of chosen layers and heads on one text, and how it was checked."""

    model: str
    family: str
    equation: str
    labels: Sequence[str]
    """One for each token."""
    layers: Sequence[LayerAttention]
    heads: Sequence[int]

    @property
    def passed(self) -> bool:
        """Whether the equation holds in every layer."""
        return all(layer.passed for layer in self.layers)


def require_drawable(report: AttentionReport) -> None:
    """Check that a heat map of the text can be read.

    Raises:
        ConfigError: the text has too many tokens.
    """
    if len(report.labels) > MAX_TOKENS:
        raise ConfigError(
            f"the text has {len(report.labels):,} tokens, and up to {MAX_TOKENS} can be drawn",
            hint="shorten the text, or read the weights from `--json`",
        )


def render_attention_page(report: AttentionReport) -> str:
    """The page as text.

    Raises:
        ConfigError: there are too many tokens or weights for a page.
    """
    require_drawable(report)
    num_weights = len(report.labels) ** 2 * len(report.layers) * len(report.heads)
    if num_weights > MAX_WEIGHTS:
        raise ConfigError(
            f"{num_weights:,} weights are too many for a page, which holds {MAX_WEIGHTS:,}",
            hint="choose fewer with `--layers` and `--heads`, or shorten the text",
        )
    environment = Environment(
        loader=PackageLoader("fulltune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("attention.html.j2").render(
        title="Attention weights",
        report=report,
        tolerance=f"{TOLERANCE:g}",
        most_entropy=math.log(len(report.labels)),
        entropies=[layer.entropies() for layer in report.layers],
        data=_script_data(report),
    )


def _script_data(report: AttentionReport) -> Markup:
    """The weights as JSON that cannot end the script element it stands in."""
    layers: list[dict[str, Any]] = []
    for layer in report.layers:
        entropies = layer.entropies()
        heads = []
        for head in report.heads:
            weights_QK = layer.weights_NQK[head]
            heads.append(
                {
                    "head": head,
                    "entropy": _rounded(entropies[head]),
                    "weights": [[_rounded(value) for value in row] for row in weights_QK.tolist()],
                    "sums": [_rounded(value) for value in weights_QK.double().sum(-1).tolist()],
                }
            )
        layers.append({"layer": layer.layer, "heads": heads})
    text = json.dumps({"labels": list(report.labels), "layers": layers}, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _rounded(value: float) -> float | None:
    """To four decimals; a NaN, which JSON does not have, is null."""
    return round(value, 4) if math.isfinite(value) else None
