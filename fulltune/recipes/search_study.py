"""The trials of a search in an SQLite file: what comes next, what is given up, what came out.

Optuna proposes and prunes. Several processes may share the file. A trial belongs to the process
that holds its lock, which ends with the process however that ends; a trial that is unfinished and
held by nobody is gone on with before a new one begins. What a trial tries depends on the seed, its
number and the results so far, so that a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import MissingExtraError, RunFolderError, first_line
from fulltune.recipes.search_space import Choices, Dimension, Space
from fulltune.report.search_record import FEWEST_TO_EXPLAIN, Importances, State, TrialRecord
from fulltune.tracking import read_metrics

if TYPE_CHECKING:
    import optuna

FILE, TRIALS, LOCK = "search.db", "trials", ".lock"
REDUCTION = 3
"""Of the trials that come to a rung, the best third goes on to the next one."""
SECONDS_TO_WAIT = 60
"""For another process that writes into the file."""

STATES: dict[str, Any] = {"COMPLETE": "finished", "PRUNED": "given up", "RUNNING": "running"}


def require_optuna() -> None:
    """See that the library is there before anything is read.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError(
            "a search is steered by the package `optuna`, which is not installed",
            hint="pip install 'fulltune[search]'",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search speaks for itself


@dataclass(frozen=True)
class Sampling:
    """How values are proposed and trials given up."""

    seed: int
    num_random: int
    """Trials with random values before TPE proposes some (Bergstra et al., 2011)."""
    prunes: bool
    higher_is_better: bool


class Study:
    """The trials of one search.

    Args:
        folder: of the search; the file is made where it is not there.
        space: what the trials vary.
        sampling: how.

    Raises:
        RunFolderError: the file is not one of Optuna's, or cannot be written.
    """

    def __init__(self, folder: Path, space: Space, sampling: Sampling) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        self.folder, self.space, self.sampling = folder, space, sampling
        path = folder / FILE
        try:
            with self.alone():
                storage = optuna.storages.RDBStorage(
                    f"sqlite:///{path.absolute()}",
                    engine_kwargs={"connect_args": {"timeout": SECONDS_TO_WAIT}},
                )
                self._study = optuna.create_study(
                    study_name="search",
                    storage=storage,
                    direction="maximize" if sampling.higher_is_better else "minimize",
                    pruner=optuna.pruners.SuccessiveHalvingPruner(
                        min_resource=1, reduction_factor=REDUCTION
                    ),
                    load_if_exists=True,
                )
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            raise RunFolderError(
                f"`{path}` cannot be used: {first_line(error)}",
                hint="restore the file, or give `run_dir` another name",
            ) from None
        self._close = storage.engine.dispose

    def close(self) -> None:
        """Let go of the file."""
        self._study._storage.remove_session()
        self._close()

    # -- locks -------------------------------------------------------------------------------------

    @staticmethod
    @contextmanager
    def lock(folder: Path) -> Generator[None]:
        """While no other process begins a trial of the search or writes its result."""
        with (folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def alone(self) -> AbstractContextManager[None]:
        """`lock` of this search."""
        return self.lock(self.folder)

    def folder_of(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / TRIALS / f"{number:04}"

    def _lock_of(self, number: int) -> Path:
        return self.folder / TRIALS / f".{number:04}.lock"

    # -- trials ------------------------------------------------------------------------------------

    @contextmanager
    def next_trial(self, may_begin: Callable[[list[TrialRecord]], bool]) -> Generator[Trial | None]:
        """An unfinished trial that nobody works on, else a new one; held while inside.

        Args:
            may_begin: whether the budget allows a new one, given the trials so far.

        Yields:
            None where nothing is left to begin.
        """
        with self.alone():
            found = self._held_unfinished() or self._begin(may_begin)
        if found is None:
            yield None
            return
        trial, lock = found
        with lock:
            yield trial

    def _held_unfinished(self) -> tuple[Trial, Any] | None:
        for record in self.records():
            if record.state != "running":
                continue
            lock = self._try_lock(record.number)
            if lock is not None:
                return self._propose(record.number), lock
        return None

    def _begin(self, may_begin: Callable[[list[TrialRecord]], bool]) -> tuple[Trial, Any] | None:
        records = self.records()
        if not may_begin(records):
            return None
        number = self._study.ask().number
        lock = self._try_lock(number)
        assert lock is not None, "nobody else begins a trial meanwhile"
        return self._propose(number), lock

    def _try_lock(self, number: int) -> Any | None:
        path = self._lock_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _propose(self, number: int) -> Trial:
        """The trial with its values; those that it has already stay."""
        import optuna

        sampling = self.sampling
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(sampling.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=sampling.num_random,
        )
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        trial = optuna.trial.Trial(self._study, trial_id)
        values = {
            name: dimension.setting(trial._suggest(name, _distribution(dimension)))
            for name, dimension in self.space.items()
        }
        return Trial(self, trial, values)

    # -- what there is -----------------------------------------------------------------------------

    def records(self) -> list[TrialRecord]:
        """All trials in their order."""
        return [self._record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def _record(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        known = trial.user_attrs
        state = STATES.get(trial.state.name) or known.get("state", "failed")
        evaluations = tuple(value for _, value in sorted(trial.intermediate_values.items()))
        folder = self.folder_of(trial.number)
        if state == "running":
            seconds, tokens = measured(folder)
        else:
            seconds, tokens = known.get("seconds", 0.0), known.get("tokens", 0)
        return TrialRecord(
            number=trial.number,
            state=state,
            values={
                name: dimension.setting(trial.params[name])
                for name, dimension in self.space.items()
                if name in trial.params
            },
            result=trial.value if state in ("finished", "given up") else None,
            evaluations=evaluations,
            reason=known.get("reason"),
            seconds=max(seconds, known.get("seconds", 0.0)),
            tokens=tokens,
            folder=str(folder),
            metrics=known.get("metrics", {}),
        )

    def best(self, records: list[TrialRecord]) -> TrialRecord | None:
        """The best finished trial; of equal ones the earliest."""
        sign = -1 if self.sampling.higher_is_better else 1
        finished = [each for each in records if each.state == "finished"]
        return min(
            finished, key=lambda each: (sign * (each.result or 0.0), each.number), default=None
        )

    def importances(self) -> Importances:
        """How much of the spread of the results each setting explains (fANOVA).

        Hutter, Hoos and Leyton-Brown, 2014. Where trials were given up, results at the end are
        those of the best ones alone: then it is the first evaluation that is explained, which all
        trials have. Empty where too few trials differ to say.
        """
        import optuna

        trials = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.name in ("COMPLETE", "PRUNED")
        ]
        at_first = any(trial.state.name == "PRUNED" for trial in trials)
        values = [
            trial.intermediate_values[min(trial.intermediate_values)] if at_first else trial.value
            for trial in trials
        ]
        nothing = Importances({}, at_first)
        if len(trials) < FEWEST_TO_EXPLAIN or len(set(values)) < 2:
            return nothing
        study = optuna.create_study(direction=self._study.direction)
        for trial, value in zip(trials, values, strict=True):
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=trial.distributions, value=value
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (RuntimeError, ValueError):  # settings that do not differ where the results do
            return nothing
        return Importances({name: float(share) for name, share in found.items()}, at_first)


@dataclass
class Trial:
    """A trial that this process works on."""

    study: Study
    _trial: optuna.trial.Trial
    values: Mapping[str, Any]
    """Dotted settings of `finetune`."""

    @property
    def number(self) -> int:
        """Its place among the trials, from 0."""
        return self._trial.number

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.study.folder_of(self.number)

    @property
    def evaluations(self) -> dict[int, float]:
        """The metric by the number of the evaluation, from 1."""
        return dict(self._frozen().intermediate_values)

    def _frozen(self) -> optuna.trial.FrozenTrial:
        storage = self.study._study._storage
        return storage.get_trial(self._trial._trial_id)

    def report(self, evaluation: int, value: float) -> bool:
        """Take note of an evaluation; True where the trial should be given up.

        It should, where it is not among the best third of the trials that came to the same rung.
        Rungs are the evaluations 1, 3, 9 and so on. The first trials, which the others are
        compared with, are never given up. What was decided before a kill is decided again.
        """
        known = self._frozen()
        if evaluation not in known.intermediate_values:
            self._trial.report(value, evaluation)
        elif evaluation in known.user_attrs.get("poor_at", []):
            return True
        elif evaluation < max(known.intermediate_values):
            return False
        if not self.study.sampling.prunes:
            return False
        is_poor = self._trial.should_prune()  # also keeps the value, for those that come after
        if self.number < REDUCTION or not is_poor:
            return False
        self._trial.set_user_attr("poor_at", [*known.user_attrs.get("poor_at", []), evaluation])
        return True

    def add_seconds(self, seconds: float) -> None:
        """Count time that this process spent on the trial."""
        before = self._frozen().user_attrs.get("seconds", 0.0)
        self._trial.set_user_attr("seconds", before + seconds)

    def finish(self, value: float, metrics: Mapping[str, float]) -> None:
        """The trial came to its end with a result."""
        self._count_tokens()
        self._trial.set_user_attr("metrics", dict(metrics))
        self.study._study.tell(self._trial, value)

    def give_up(self, reason: str) -> None:
        """The trial was ended for being poor."""
        import optuna

        self._count_tokens()
        self._trial.set_user_attr("reason", reason)
        self.study._study.tell(self._trial, state=optuna.trial.TrialState.PRUNED)

    def fail(self, state: State, reason: str) -> None:
        """The trial has no result: it `failed`, or `did not fit`."""
        import optuna

        self._count_tokens()
        self._trial.set_user_attr("state", state)
        self._trial.set_user_attr("reason", reason)
        self.study._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)

    def _count_tokens(self) -> None:
        self._trial.set_user_attr("tokens", measured(self.folder)[1])


def measured(folder: Path) -> tuple[float, int]:
    """Seconds and real tokens of the steps of a run so far."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0.0, 0
    steps = [event for event in read_metrics(path) if event["event"] == "step"]
    return sum(step["seconds"] for step in steps), sum(step["num_tokens"] for step in steps)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.texts)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
