from __future__ import annotations

import math

import numpy as np
import pytest

from fulltune.data.tasks import TASKS
from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.metrics import (
    METRICS,
    check_metric,
    classification_metrics,
    language_metrics,
)


def one_hot_like(predicted: list[int], num_labels: int, share: float = 0.9) -> np.ndarray:
    rest = (1 - share) / (num_labels - 1)
    rows = np.full((len(predicted), num_labels), rest)
    rows[np.arange(len(predicted)), predicted] = share
    return rows


def test_a_hand_counted_case_gives_the_hand_counted_scores() -> None:
    labels, predicted = [0, 0, 1, 1], [0, 1, 1, 1]
    scores = classification_metrics(labels, predicted, one_hot_like(predicted, 2), ["no", "yes"])
    assert scores["accuracy"] == 0.75
    assert scores["confusion_matrix"] == [[1, 1], [0, 2]]
    assert scores["per_label"]["no"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "support": 2,
    }
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert scores["matthews"] == pytest.approx(2 / math.sqrt(1 * 3 * 2 * 2))
    assert scores["loss"] == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)


def test_a_label_that_neither_occurs_nor_is_predicted_does_not_lower_macro_f1() -> None:
    labels = predicted = [0, 1, 0, 1]
    scores = classification_metrics(labels, predicted, one_hot_like(predicted, 3), ["a", "b", "c"])
    assert scores["macro_f1"] == 1.0
    assert scores["per_label"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert len(scores["confusion_matrix"]) == 3


def test_one_class_only_gives_finite_scores_without_a_warning() -> None:
    scores = classification_metrics([1, 1], [1, 1], one_hot_like([1, 1], 2), ["a", "b"])
    assert scores["accuracy"] == 1.0
    assert scores["matthews"] == 0.0


def test_a_label_the_model_does_not_know_is_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match="1 of 2 examples have a label that the model") as caught:
        classification_metrics([0, 2], [0, 1], one_hot_like([0, 1], 2), ["ham", "spam"])
    assert "`ham`, `spam`" in str(caught.value.hint)


def test_no_example_is_an_error() -> None:
    with pytest.raises(DataError, match="no example"):
        classification_metrics([], [], np.zeros((0, 2)), ["a", "b"])


def test_a_right_label_of_probability_zero_costs_infinity() -> None:
    scores = classification_metrics([0], [1], [[0.0, 1.0]], ["a", "b"])
    assert scores["loss"] == math.inf


def test_language_metrics_of_a_uniform_model() -> None:
    scores = language_metrics(10 * math.log(256), 10, 10)
    assert scores["perplexity"] == pytest.approx(256)
    assert scores["bits_per_byte"] == pytest.approx(8)
    assert "bits_per_byte" not in language_metrics(1.0, 1)


def test_a_perplexity_beyond_floats_is_inf_and_a_broken_loss_stays_nan() -> None:
    assert language_metrics(1e6, 1)["perplexity"] == math.inf
    assert math.isnan(language_metrics(math.nan, 1)["perplexity"])
    with pytest.raises(DataError, match="no target"):
        language_metrics(0.0, 0)


def test_every_metric_of_every_task_is_known_and_can_be_chosen() -> None:
    for kind, task in TASKS.items():
        assert check_metric(None, kind) == task.metrics[0]
        for name in task.metrics:
            assert name in METRICS
            assert check_metric(name, kind, retention=True) == name


def test_an_unknown_metric_names_the_near_one_and_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match="`acuracy`, which is not a metric") as caught:
        check_metric("acuracy", "classification")
    assert "did you mean `accuracy`?" in str(caught.value.hint)
    assert "`matthews`" in str(caught.value.hint)


def test_a_metric_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="`accuracy`, which a chat run does not measure"):
        check_metric("accuracy", "chat")
    with pytest.raises(ConfigError, match="`bits_per_byte`, which a chat run does not measure"):
        check_metric("bits_per_byte", "chat")


def test_the_retention_loss_can_be_chosen_only_where_it_is_measured() -> None:
    assert check_metric("retention_loss", "chat", retention=True) == "retention_loss"
    with pytest.raises(ConfigError, match="does not measure") as caught:
        check_metric("retention_loss", "chat")
    assert "evaluate.retention=true" in str(caught.value.hint)
