"""The verb that shows what a model looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fulltune.cli.app import USE, Json, Model, app
from fulltune.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from fulltune.report.attention_page import AttentionReport

SHOWN_QUERIES = 8
"""Tokens of a row of the table; `--json` has all."""


@app.command(rich_help_panel=USE)
def attention(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads.", metavar="TEXT")],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N-N", help="Layers from 0, or `all`; without it, the first and the last."
        ),
    ] = None,
    heads: Annotated[str, typer.Option(metavar="N,N-N", help="Heads from 0, or `all`.")] = "all",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show attention weights on a text, and verify the attention equation on them."""
    from fulltune.recipes import attention as recipe

    report = recipe.run(model, text, layers=layers, heads=heads, html=html, png=png)
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
        for path in (html, png):
            if path is not None:
                typer.echo(f"written to {path}")
    if not report.passed:
        raise typer.Exit(1)


def _print(report: AttentionReport) -> None:
    rows = []
    for layer in report.layers:
        entropies = layer.entropies()
        keys_NQ = layer.weights_NQK.argmax(-1).tolist()
        for head in report.heads:
            pairs = [
                f"{label}→{report.labels[key]}"
                for label, key in zip(report.labels, keys_NQ[head], strict=True)
            ]
            more = f" and {len(pairs) - SHOWN_QUERIES} more" if len(pairs) > SHOWN_QUERIES else ""
            rows.append(
                (
                    str(layer.layer), str(head), f"{entropies[head]:.3f}",
                    "  ".join(pairs[:SHOWN_QUERIES]) + more,
                )
            )  # fmt: skip
    print_table(
        f"Attention of {report.model} on {len(report.labels)} tokens",
        ("layer", "head", "entropy (nats)", "each token → what it looks at most"),
        rows,
    )
    typer.echo()
    typer.echo(f"Equation of {report.family}: {report.equation}")
    for layer in report.layers:
        typer.echo(
            f"layer {layer.layer}: {'verified' if layer.passed else 'NOT MET'}, "
            f"largest absolute difference of the weights {layer.weights_difference:.1e} "
            f"(tolerance {layer.weights_tolerance:.0e}), "
            f"of the output {layer.output_difference:.1e} (tolerance {layer.output_tolerance:.1e})"
        )


def _as_json(report: AttentionReport) -> dict[str, Any]:
    layers = []
    for layer in report.layers:
        entropies, keys_NQ = layer.entropies(), layer.weights_NQK.argmax(-1).tolist()
        layers.append(
            {
                "layer": layer.layer, "passed": layer.passed,
                "weights_difference": layer.weights_difference,
                "weights_tolerance": layer.weights_tolerance,
                "output_difference": layer.output_difference,
                "output_tolerance": layer.output_tolerance,
                "heads": [
                    {
                        "head": head, "entropy": entropies[head], "most_attended": keys_NQ[head],
                        "weights": layer.weights_NQK[head].tolist(),
                    }
                    for head in report.heads
                ],
            }
        )  # fmt: skip
    return {
        "model": report.model, "family": report.family, "equation": report.equation,
        "tokens": list(report.labels), "passed": report.passed, "layers": layers,
    }  # fmt: skip
