"""Entities count as right only whole and with their label; the numbers are checked by hand."""

from __future__ import annotations

import importlib.util

import pytest

from fulltune.errors import DataError, MissingExtraError
from fulltune.evaluate.tagging_metrics import tagging_metrics


def test_precision_recall_and_f1_are_those_of_whole_entities() -> None:
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC", "O"]]
    # The person is cut short, both places of the second sentence are one; one place is right.
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "I-LOC", "B-ORG"]]
    found = tagging_metrics(right, predicted)
    assert found["span_precision"] == pytest.approx(1 / 4)
    assert found["span_recall"] == pytest.approx(1 / 4)
    assert found["span_f1"] == pytest.approx(1 / 4)
    assert found["tag_accuracy"] == pytest.approx(4 / 7)
    assert found["per_label"] == {
        "LOC": {
            "precision": 0.5, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.4),
            "support": 3,
        },
        "ORG": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
        "PER": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
    }  # fmt: skip


def test_perfect_tags_score_one_and_words_without_entities_zero() -> None:
    tags = [["B-PER", "I-PER", "B-PER"]]
    assert tagging_metrics(tags, tags)["span_f1"] == 1.0
    nothing = tagging_metrics([["O", "O"]], [["O", "O"]])
    assert (nothing["span_f1"], nothing["tag_accuracy"], nothing["per_label"]) == (0.0, 1.0, {})
    missed = tagging_metrics([["B-PER", "O"]], [["O", "O"]])
    assert (missed["span_f1"], missed["span_recall"], missed["tag_accuracy"]) == (0.0, 0.0, 0.5)


def test_no_word_is_an_error() -> None:
    with pytest.raises(DataError, match="no tagged word"):
        tagging_metrics([], [])


def test_without_seqeval_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        tagging_metrics([["O"]], [["O"]])
    assert caught.value.hint == "pip install 'fulltune[metrics]'"
