"""Answers score as SQuAD's script scores them, and Chinese ones as CMRC's does."""

from __future__ import annotations

import pytest

from fulltune.evaluate.squad import best_threshold, normalize_answer, score_answer


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("The Denver  Broncos!", "denver broncos"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("the-dog", "thedog"),  # punctuation goes before articles do
        ("dog—the cat", "dog— cat"),  # a dash is no ASCII punctuation, but it ends a word
        ("1,000", "1000"),
        ("'The' \t\n", ""),
        ("Café", "café"),
        ("北京。", "北京。"),
    ],
)
def test_case_punctuation_articles_and_space_do_not_count(text: str, counted: str) -> None:
    assert normalize_answer(text) == counted


@pytest.mark.parametrize(
    ("answer", "references", "exact_match", "f1"),
    [
        ("Denver Broncos", ["The Denver Broncos."], 1, 1),
        ("the Denver Broncos team", ["Denver Broncos"], 0, 0.8),  # 2 of 3 and 2 of 2
        ("in Paris", ["Rome", "Paris", "Paris, France"], 0, 2 / 3),  # the best of the references
        ("Paris Paris", ["Paris"], 0, 2 / 3),  # a word counts as often as it occurs in both
        ("Lyon", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("the", [], 1, 1),  # of which nothing counts
        ("", ["the"], 1, 1),  # a reference of which nothing counts is none
        ("Paris", ["the", "Paris"], 1, 1),
    ],
)
def test_an_answer_scores_by_the_rules_of_squad(
    answer: str, references: list[str], exact_match: float, f1: float
) -> None:
    score = score_answer(answer, references)
    assert score.exact_match == exact_match
    assert score.f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "references", "exact_match", "f1"),
    [
        ("《北京大学》", ["北京大学。"], 1, 1),
        ("北京大学", ["北京"], 0, 2 / 3),
        ("京北", ["北京"], 0, 0.5),  # the longest common run, not the common characters
        ("在1998年", ["1998年"], 0, 0.8),  # a number is one unit
        ("GPT 模型", ["gpt模型"], 0, 1),  # only F1 looks past the space, as CMRC's script does
        ("上海", ["北京"], 0, 0),
        ("", [], 1, 1),
    ],
)
def test_chinese_scores_by_the_rules_of_cmrc_when_characters_are_asked_for(
    answer: str, references: list[str], exact_match: float, f1: float
) -> None:
    score = score_answer(answer, references, units="characters")
    assert score.exact_match == exact_match
    assert score.f1 == pytest.approx(f1)


def test_the_best_threshold_keeps_the_answers_that_gain_more_than_they_cost() -> None:
    # In the order of the probabilities: right, wrong where there is none, half right, wrong.
    best = best_threshold(
        scores=[1.0, 0.0, 0.5, 0.0, 0.0],
        no_answer_probabilities=[0.1, 0.2, 0.9, 0.95, 0.05],
        answers=["a", "b", "c", "d", ""],
        has_answer=[True, False, True, False, False],
    )
    # Three have none: 3 for no answer at all; 4 up to 0.1; then 3, 3.5 and 2.5.
    assert best.score == pytest.approx(4 / 5)
    assert best.threshold == 0.1


def test_no_answer_to_anything_may_be_best() -> None:
    best = best_threshold([0.0, 0.0], [0.3, 0.6], ["a", "b"], [False, False])
    assert (best.score, best.threshold) == (1.0, 0.0)
