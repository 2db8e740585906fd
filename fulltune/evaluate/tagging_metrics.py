"""Entities found and missed, as `seqeval` counts them in its strict mode.

An entity is right where its first word, its last word and its label are (Tjong Kim Sang and De
Meulder, 2003); precision, recall and F1 are over all entities, whatever their label.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from fulltune.errors import DataError, MissingExtraError


def require_seqeval() -> None:
    """Refuse to begin without the package that measures.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("seqeval") is None:
        raise MissingExtraError(
            "entities are measured with the package `seqeval`, which is not installed",
            hint="pip install 'fulltune[metrics]'",
        )


def tagging_metrics(
    right: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Scores of tagged documents.

    A precision, recall or F1 without any entity to divide by counts as 0.

    Args:
        right: the right tags of each document, in IOB2.
        predicted: the predicted ones, as many.

    Returns:
        Numbers under the names of `METRICS`, and `per_label`: precision, recall, f1 and support of
        the entities of each label.

    Raises:
        DataError: there is no word.
        MissingExtraError: `seqeval` is not installed.
    """
    require_seqeval()
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    num_words = sum(len(tags) for tags in right)
    if not num_words:
        raise DataError(
            "the evaluation data holds no tagged word", hint="give a split that is not empty"
        )
    num_right = sum(
        tag == other
        for tags, others in zip(right, predicted, strict=True)
        for tag, other in zip(tags, others, strict=True)
    )
    report: dict[str, dict[str, Any]] = {}
    if any(tag != "O" for tags in (*right, *predicted) for tag in tags):
        report = classification_report(
            [list(tags) for tags in right],
            [list(tags) for tags in predicted],
            output_dict=True,
            mode="strict",
            scheme=IOB2,
            zero_division=0,
        )
    total = report.get("micro avg", {})
    return {
        "span_f1": float(total.get("f1-score", 0.0)),
        "span_precision": float(total.get("precision", 0.0)),
        "span_recall": float(total.get("recall", 0.0)),
        "tag_accuracy": num_right / num_words,
        "per_label": {
            label: {
                "precision": float(scores["precision"]),
                "recall": float(scores["recall"]),
                "f1": float(scores["f1-score"]),
                "support": int(scores["support"]),
            }
            for label, scores in report.items()
            if label not in ("micro avg", "macro avg", "weighted avg")
        },
    }
