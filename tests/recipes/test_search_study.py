"""The trials of a search without training: whose they are, which go on, and which are given up."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import pytest

from fulltune.errors import RunFolderError
from fulltune.recipes.search_space import parse_space
from fulltune.recipes.search_study import FILE, Sampling, Study, Trial, require_optuna
from fulltune.recipes.search_trial import Watcher

SPACE = parse_space({"optimizer.lr": "1e-5..1e-3 log", "batch": ["8 examples", "16 examples"]})
SAMPLING = Sampling(seed=0, num_random=5, prunes=True, higher_is_better=True)


@pytest.fixture
def study(tmp_path: Path) -> Generator[Study]:
    require_optuna()
    opened = Study(tmp_path, SPACE, SAMPLING)
    yield opened
    opened.close()


def take(study: Study, accuracies: list[float]) -> tuple[int, bool]:
    """A trial with these evaluations: its number, and whether it was given up."""
    with study.next_trial(lambda found: True) as trial:
        assert isinstance(trial, Trial)
        for number, accuracy in enumerate(accuracies, start=1):
            if trial.report(number, accuracy):
                trial.give_up("poor")
                return trial.number, True
        trial.finish(accuracies[-1], {"accuracy": accuracies[-1]})
        return trial.number, False


def test_the_first_trials_are_never_given_up_and_poor_ones_after_them_are(study: Study) -> None:
    assert [take(study, [0.5, 0.6, 0.7])[1] for _ in range(2)] == [False, False]
    assert take(study, [0.1, 0.1, 0.1]) == (2, False)
    assert take(study, [0.2, 0.9, 0.9]) == (3, True)
    assert take(study, [0.8, 0.1, 0.9]) == (4, False), "evaluation 2 is no rung"
    assert take(study, [0.9, 0.9, 0.3]) == (5, True)
    records = study.records()
    assert [len(record.evaluations) for record in records] == [3, 3, 3, 1, 3, 3]
    best = study.best(records)
    assert best is not None
    assert best.number == 4


def test_of_equal_trials_the_earliest_is_the_best(study: Study) -> None:
    for _ in range(3):
        take(study, [0.5])
    best = study.best(study.records())
    assert best is not None
    assert best.number == 0


def test_an_unfinished_trial_that_nobody_holds_is_gone_on_with_and_a_held_one_is_not(
    tmp_path: Path, study: Study
) -> None:
    other = Study(tmp_path, SPACE, SAMPLING)  # as another process has it
    with study.next_trial(lambda found: True) as first:
        assert first is not None
        with other.next_trial(lambda found: len(found) < 2) as second:
            assert second is not None
            assert (first.number, second.number) == (0, 1)
            assert first.values != second.values
            with study.next_trial(lambda found: len(found) < 2) as third:
                assert third is None, "the budget is spent, and both are held"
        first.report(1, 0.5)
    with other.next_trial(lambda found: False) as again:
        assert again is not None
        assert again.number == 0
        assert again.values == first.values
        assert not again.report(1, 0.5), "an evaluation that is repeated changes nothing"
        assert again.evaluations == {1: 0.5}
    other.close()


def test_what_was_decided_before_a_kill_is_decided_again(study: Study) -> None:
    for _ in range(3):
        take(study, [0.5])
    for _ in range(2):  # the second time as after a kill
        with study.next_trial(lambda found: True) as trial:
            assert trial is not None
            assert trial.number == 3
            assert trial.report(1, 0.1)


def test_a_metric_that_is_not_a_number_ends_a_trial_by_name(study: Study) -> None:
    with study.next_trial(lambda found: True) as trial:
        assert trial is not None
        watcher = Watcher(trial, "accuracy")
        assert not watcher.watch(2, {"accuracy": 0.5})
        assert watcher.watch(4, {"accuracy": math.nan})
        assert watcher.fault == "`accuracy` is NaN at step 4"
        trial.fail("failed", watcher.fault)
    (record,) = study.records()
    assert (record.state, record.result) == ("failed", None)
    assert record.reason == "`accuracy` is NaN at step 4"
    assert study.best(study.records()) is None


def test_what_explains_the_results_is_said_from_four_trials_on(study: Study) -> None:
    for number in range(6):
        assert bool(study.importances().shares) == (number >= 4)
        with study.next_trial(lambda found: True) as trial:
            assert trial is not None
            value = math.log10(trial.values["optimizer.lr"])
            trial.report(1, -value)
            trial.finish(value, {"accuracy": value})
    found = study.importances()
    assert not found.at_first_evaluation
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["optimizer.lr"] > found.shares["batch"]
    with study.next_trial(lambda found: True) as trial:
        assert trial is not None
        trial.report(1, 0.0)
        trial.give_up("poor")
    assert study.importances().at_first_evaluation, "some have no result at the end"


def test_a_file_that_is_not_a_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not a database\n" * 100, encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot be used"):
        Study(tmp_path, SPACE, SAMPLING)
