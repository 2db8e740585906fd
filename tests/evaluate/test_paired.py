"""Paired tests against scipy's distributions and cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fulltune.evaluate.additive import mean_parts
from fulltune.evaluate.paired import Difference, compare, in_words, mcnemar
from fulltune.evaluate.parts import classification_parts, language_parts


def right_of(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, ...]:
    """Which examples two classifiers have right."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


def test_few_disagreements_get_the_exact_binomial_p_value() -> None:
    for only_first, only_second in ((0, 6), (9, 3), (12, 12), (0, 0)):
        test = mcnemar(*right_of(40, only_first, only_second, 5))
        assert (test.only_first, test.only_second) == (only_first, only_second)
        assert test.method == "exact"
        differing = only_first + only_second
        wanted = stats.binomtest(only_first, differing).pvalue if differing else 1.0
        assert test.p_value == pytest.approx(wanted)


def test_many_disagreements_get_what_r_gives_for_agrestis_approval_ratings() -> None:
    # Agresti (1990), page 350, the example of R's mcnemar.test: 1,600 people asked twice.
    test = mcnemar(*right_of(794, 150, 86, 570))
    assert test.p_value == pytest.approx(4.115e-05, rel=1e-3)
    assert test.p_value == pytest.approx(stats.chi2.sf((150 - 86 - 1) ** 2 / (150 + 86), 1))
    assert test.method == "chi-squared, continuity-corrected"
    assert mcnemar(*right_of(0, 30, 30, 0)).p_value == 1.0


def test_a_difference_of_means_is_that_of_scipys_paired_tests() -> None:
    generator = np.random.default_rng(0)
    first_D = generator.gamma(1.0, size=60)
    second_D = first_D + generator.normal(0.08, 0.3, size=60)
    found = compare(
        mean_parts({"loss": first_D}), mean_parts({"loss": second_D}), num_resamples=10000
    )["loss"]
    assert found.difference == pytest.approx(first_D.mean() - second_D.mean())
    change_D = first_D - second_D
    theirs = stats.bootstrap((change_D,), np.mean, rng=np.random.default_rng(1)).confidence_interval
    width = theirs.high - theirs.low
    assert found.interval.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert found.interval.high == pytest.approx(theirs.high, abs=0.05 * width)
    permuted = stats.permutation_test(
        (first_D, second_D), lambda a, b, axis: (a - b).mean(axis=axis), n_resamples=10000,
        permutation_type="samples", rng=np.random.default_rng(2),
    )  # fmt: skip
    assert found.p_value == pytest.approx(permuted.pvalue, abs=0.02)


def test_on_accuracy_randomisation_agrees_with_mcnemars_exact_test() -> None:
    labels_D = np.zeros(100, dtype=np.int64)
    right = right_of(80, 9, 2, 9)
    first, second = (
        classification_parts(labels_D, (~each).astype(np.int64), np.ones(100), "ab")
        for each in right
    )
    found = compare(first, second, num_resamples=10000)["accuracy"]
    assert found.difference == pytest.approx(0.07)
    assert found.p_value == pytest.approx(mcnemar(*right).p_value, abs=0.02)


def test_the_same_outputs_are_no_difference_and_say_so() -> None:
    labels_D = np.arange(30) % 3
    parts = classification_parts(
        labels_D, (labels_D + (np.arange(30) > 20)) % 3, np.ones(30), "abc"
    )
    found = compare(parts, parts)["macro_f1"]
    assert found.difference == 0
    assert found.p_value == 1.0
    assert found.interval is None
    words = in_words("macro F1", found, higher_is_better=True, num_examples=30)
    assert words == "the macro F1 is the same on these 30 examples"


def test_comparisons_depend_on_the_seed_alone() -> None:
    generator = np.random.default_rng(3)
    first, second = (
        language_parts(generator.gamma(2, size=40), generator.integers(1, 9, size=40))
        for _ in range(2)
    )
    assert compare(first, second) == compare(first, second)
    assert set(compare(first, second)) == {"loss", "perplexity"}


def test_more_labels_on_one_side_still_give_a_difference_but_no_exchange() -> None:
    labels_D = np.arange(40) % 2
    first = classification_parts(labels_D, labels_D, np.full(40, 0.1), "ab")
    second = classification_parts(labels_D, np.arange(40) % 3, np.full(40, 0.9), "abc")
    found = compare(first, second)["accuracy"]
    assert found.difference > 0
    assert math.isnan(found.p_value)


def test_words_claim_a_difference_only_where_interval_and_test_do() -> None:
    generator = np.random.default_rng(5)
    loss_D = generator.gamma(1.0, size=400)
    first = mean_parts({"loss": loss_D})
    clear = compare(first, mean_parts({"loss": loss_D + 0.3 + generator.normal(0, 0.1, 400)}))
    assert "the loss is better" in in_words(
        "loss", clear["loss"], higher_is_better=False, num_examples=400
    )
    assert "the loss is worse" in in_words(
        "loss", clear["loss"], higher_is_better=True, num_examples=400
    )
    unclear = compare(first, mean_parts({"loss": loss_D + generator.normal(0, 1.0, 400)}))
    assert "no clear difference" in in_words(
        "loss", unclear["loss"], higher_is_better=False, num_examples=400
    )
    unknown = Difference(1.0, math.inf, -math.inf, None, math.nan)
    assert "cannot be said" in in_words("loss", unknown, higher_is_better=False, num_examples=2)


def test_sets_of_other_sizes_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 examples cannot be paired with 3"):
        compare(mean_parts({"loss": [1, 2]}), mean_parts({"loss": [1, 2, 3]}))
