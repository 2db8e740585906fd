"""How an evaluation looks on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from fulltune.cli.printing import print_table

if TYPE_CHECKING:
    from fulltune.recipes.evaluate import EvaluationReport

LARGEST_MATRIX = 12
"""Labels of a confusion matrix that is printed whole; of more, the most frequent confusions are."""

WIDEST_MATRIX = 80
NUM_CONFUSIONS = 10


def print_evaluation(report: EvaluationReport) -> None:
    """All that was measured, the most important first."""
    from fulltune.report.evaluation_words import (
        calibration_rows,
        calibration_sentence,
        label_rows,
        length_rows,
        metric_rows,
    )

    document = report.as_json()
    typer.echo(f"{report.model} on {report.data}: {report.num_examples:,} examples")
    for note in report.notes:
        _print_note(f"Note: {note}.")
    typer.echo()
    print_table("Metrics", ("", "value", "95% interval"), metric_rows(document), right=(1,))
    if document["intervals"]:
        _print_note(
            f"Intervals: where these values would lie on as many other {document['resampled']} of "
            "the same kind, 19 times of 20. What another seed of training gives is not in them."
        )
    for name, signature in report.details.get("signatures", {}).items():
        typer.echo(f"{name}  {signature}")
    _print_questions(report.details)
    if document["against"] is not None:
        _print_comparison(report.model, document["against"])
    if labels := label_rows(document):
        typer.echo()
        header = ("label", "precision", "recall", "F1", "95% interval of F1", "examples")
        print_table("Labels", header, labels, right=(1, 2, 3, 5))
    if "confusion_matrix" in report.details:
        _print_confusions(list(report.details["per_label"]), report.details["confusion_matrix"])
    if (calibration := document["calibration"]) is not None:
        typer.echo()
        names, rows = calibration_rows(calibration)
        title = "Calibration: are labels given with 90% right nine times of ten?"
        print_table(title, names, rows, right=(1, 2))
        _print_note(calibration_sentence(calibration))
    if len(document["by_length"]) > 1:
        typer.echo()
        names, rows = length_rows(document["by_length"])
        print_table("By length", names, rows, right=(1, *range(2, len(names), 2)))
    if document["worst_errors"]:
        _print_errors(document["worst_errors"])


def _print_comparison(model: str, against: Mapping[str, Any]) -> None:
    from fulltune.report.evaluation_words import comparison_rows, comparison_sentences

    typer.echo()
    print_table(
        f"Against {against['model']}, on the same {against['num_examples']:,} {against['unit']}",
        ("", "this", "other", "difference", "95% interval", "p"),
        comparison_rows(against),
        right=(1, 2, 3, 5),
    )
    for sentence in comparison_sentences(model, against):
        typer.echo(sentence)


def _print_questions(details: Mapping[str, Any]) -> None:
    """Questions whose answer stands in their context, and others, where some have none."""
    kinds = {"has_answer": "with an answer", "no_answer": "without one"}
    parts = {kind: details[name] for name, kind in kinds.items() if name in details}
    if not parts:
        return
    typer.echo()
    rows = [
        (kind, f"{part['f1']:.1%}", f"{part['exact_match']:.1%}", f"{part['num_questions']:,}")
        for kind, part in parts.items()
    ]
    header = ("in their context", "F1", "exact match", "questions")
    print_table("Questions", header, rows, right=(1, 2, 3))
    _print_note(
        f"Best F1 {details['best_f1']:.1%}, with no answer above a probability of "
        f"{details['best_f1_threshold']:.3f} instead of 0.5."
    )


def _print_confusions(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> None:
    typer.echo()
    columns = tuple(range(1, len(labels) + 1))
    width = sum(max(3, len(label)) + 2 for label in labels)
    if len(labels) <= LARGEST_MATRIX and width <= WIDEST_MATRIX:
        rows = [
            (label, *(str(count) if count else "·" for count in counts))
            for label, counts in zip(labels, matrix, strict=True)
        ]
        print_table(
            "Confusion matrix: the right label down, the predicted one across",
            ("", *labels),
            rows,
            right=columns,
        )
        return
    confusions = sorted(
        (-count, right, predicted)
        for right, counts in zip(labels, matrix, strict=True)
        for predicted, count in zip(labels, counts, strict=True)
        if count and right != predicted
    )
    if confusions:
        print_table(
            "Most frequent confusions",
            ("right", "predicted", "times"),
            [
                (right, predicted, f"{-count:,}")
                for count, right, predicted in confusions[:NUM_CONFUSIONS]
            ],
            right=(2,),
        )


def _print_errors(errors: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from fulltune.tracking import format_number, printable

    typer.echo()
    console = Console(highlight=False)
    console.print(Text("Worst errors: wrong, and the surest of it", style="bold"))
    for error in errors:
        line = Text.assemble(
            f"{error['label']} ", ("taken for", "dim"), f" {error['prediction']}  ",
            (f"loss {format_number(error['loss'])}  {error['where']}", "dim"),
        )  # fmt: skip
        console.print(line)
        text = printable(error["text"])
        shown = text if len(text) <= 160 else f"{text[:159]}…"
        console.print(Padding(Text(shown), (0, 0, 0, 4), expand=False))


def _print_note(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text, "dim"))
