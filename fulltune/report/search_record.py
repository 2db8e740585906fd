"""What a search found, as its page, its table and its JSON show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["finished", "given up", "failed", "did not fit", "running"]
"""Only a finished trial can be the best."""

FEWEST_TO_EXPLAIN = 4
"""Trials without which nothing is said of what explains their results."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search."""

    number: int
    state: State
    values: dict[str, Any]
    """Dotted setting -> what the trial had of it."""
    result: float | None
    """Of the metric that is searched by; of a trial given up, its last evaluation."""
    evaluations: tuple[float, ...]
    """The metric at each evaluation after a step."""
    reason: str | None
    """Why there is no result, or why the trial was given up."""
    seconds: float
    tokens: int
    """Real tokens that were trained on."""
    folder: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RangeTest:
    """A short run whose learning rate rises by the same ratio at every step (Smith, 2017)."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Of each step, in nats per target; the last may be the one at which the run broke off."""
    smoothed: tuple[float, ...]
    low: float
    high: float
    """The range that the search takes from it."""
    given: str
    """The range in the settings."""
    verdict: str
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Importances:
    """What explains the results."""

    shares: Mapping[str, float]
    """Setting -> its share of what the settings explain; empty for few trials."""
    at_first_evaluation: bool
    """Whether the results are those of the first evaluation, and not those at the end."""

    @property
    def title(self) -> str:
        """What is explained, in words."""
        if self.at_first_evaluation:
            return "What explains the results at the first evaluation"
        return "What explains the results"


@dataclass(frozen=True)
class SearchRecord:
    """A search so far."""

    run_dir: str
    metric: str
    better: Literal["lower", "higher"]
    trials: Sequence[TrialRecord]
    best: int | None
    """Number of the best finished trial; of equal ones the earliest."""
    importances: Importances
    space: Mapping[str, str]
    """Dotted setting -> what it may be."""
    scales: Mapping[str, Scale]
    budget: str
    spent: str
    """Of the budget, in its unit."""
    is_over: bool
    """Whether no further trial begins and none is running."""
    range_test: RangeTest | None = None

    @property
    def best_trial(self) -> TrialRecord | None:
        """The best finished trial."""
        return next((trial for trial in self.trials if trial.number == self.best), None)


@dataclass(frozen=True)
class Scale:
    """Where the values of a setting stand on an axis."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()
    """Of a list, its texts, at equal distances; the ends are then of no meaning."""
