"""`fulltune search`: the settings that fine-tune best, found by trials within a budget.

A trial is an ordinary run, `RUN/trials/0003`. The study of all trials is an SQLite file, so that a
search goes on after a kill with the same trial, and several processes can work on one search.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fulltune.config import (
    Budget,
    Quantity,
    Settings,
    build_config,
    differing_keys,
    dump_config,
    load_config,
    read_yaml,
)
from fulltune.errors import ConfigError, RunFolderError, TrainingError
from fulltune.evaluate.metrics import METRICS
from fulltune.recipes import finetune, range_test, settings_files
from fulltune.recipes.prepare import check_task
from fulltune.recipes.search_best import keep_best
from fulltune.recipes.search_space import (
    Choices,
    Dimension,
    Range,
    Space,
    check_space,
    parse_space,
    with_values,
)
from fulltune.recipes.search_study import Sampling, Study, require_optuna
from fulltune.recipes.search_trial import take
from fulltune.report.search_page import write_search_page
from fulltune.report.search_record import RangeTest, Scale, SearchRecord, TrialRecord
from fulltune.runtime import num_ranks
from fulltune.tracking import format_number, name_of
from fulltune.train.run_folder import (
    check_run_folder,
    remove_leftovers,
    write_atomically,
    write_errors,
)

CONFIG, PAGE = "search.yaml", "search.html"
CHANGEABLE = ("budget", "keep", "run_dir")
"""Settings that a search may change when it goes on."""
MOST_FAILURES_AT_FIRST = 5
"""Trials without a result, before any had one, after which the search ends."""


class Config(Settings):
    """Settings of `fulltune search`."""

    finetune: dict[str, Any] | str
    """What all trials share: settings of `fulltune finetune` without `run_dir`, or the path of its
    settings file, whose `run_dir` is not used. Trials are compared by its `evaluate.metric`."""
    space: dict[str, Any]
    """What trials vary: a setting of `finetune` with a range (`1e-5..1e-3 log`, `1..4 epochs`) or a
    list of choices, as `{optimizer.lr: 1e-5..1e-3 log, batch: [16 examples, 32 examples]}`."""
    budget: Budget = Quantity(20, "trials")
    """What all trials and the range test may take. A trial begins while some of it is left, and is
    finished; tokens are those trained on."""
    range_test: bool = False
    """First narrow the range of `optimizer.lr` by a run of 100 steps with a rising rate."""
    prune: Literal["halving", "none"] = "halving"
    """`halving` gives a trial up that is not in the best third of those that came as far, at its
    1st, 3rd, 9th ... evaluation (ASHA, Li et al., 2020); the first three trials are never given
    up."""
    random_trials: Annotated[int, Field(ge=1)] = 5
    """Trials with random values, after which TPE proposes values like those of the best ones."""
    keep: Literal["best", "all"] = "best"
    """Models and checkpoints that are kept: those of the best trial, or of all."""
    run_dir: str
    """Folder of the search; made new."""
    seed: Annotated[int, Field(ge=0, lt=10**9)] = 0
    """Seed of what the trials try; that of the trials themselves is `finetune.seed`."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the file of a search; settings of `finetune` in a file of their own are read too.

    Raises:
        ConfigError: a setting is unknown or not possible.
    """
    config = settings_files.load(Config, path, overrides, verb="search")
    if not isinstance(config.finetune, str):
        if "run_dir" in config.finetune:
            raise ConfigError(
                "`finetune.run_dir` has no effect: each trial has a folder of its own",
                hint="leave it out; `run_dir` is the folder of the search",
            )
        return config
    other = Path(config.finetune)
    values = read_yaml(other)
    settings_files.require(other, values, "finetune")
    values.pop("run_dir", None)
    return config.model_copy(update={"finetune": values})


def base_of(config: Config) -> dict[str, Any]:
    """The settings that all trials share, with a folder for what needs one."""
    assert isinstance(config.finetune, dict), "`load` has read the file"
    return {**config.finetune, "run_dir": str(Path(config.run_dir) / "trials")}


def check(config: Config) -> tuple[Space, str]:
    """Refuse a search in which a trial could not be run, as far as its settings show.

    Returns:
        What is searched, and the metric that it is searched by.

    Raises:
        FulltuneError: of the kind that says what is wrong.
    """
    space = parse_space(config.space)
    check_space(space, base_of(config))
    middle = {key: dimension.middle for key, dimension in space.items()}
    settings = build_config(finetune.Config, with_values(base_of(config), middle))
    if settings.task.validation is None:
        raise ConfigError(
            "`finetune.task.validation` is null, so that there is nothing to compare trials by",
            hint="hold something out, such as `validation: 5%`",
        )
    if config.range_test and not isinstance(space.get(range_test.LR), Range):
        raise ConfigError(
            f"`range_test: true` narrows a range of `{range_test.LR}`, which `space` does not have",
            hint=f"add `{range_test.LR}: 1e-6..1e-2 log` to `space`, or leave the test out",
        )
    if num_ranks() > 1:
        raise ConfigError(
            "a search does not run under `torchrun`: a trial is trained by one process",
            hint="start `fulltune search` several times, later ones with `--resume`: the processes "
            "share the trials",
        )
    check_task(settings.task)
    return space, finetune.check_settings(settings)


def run(
    config: Config, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
) -> tuple[SearchRecord, bool]:
    """Search, or go on, or join another process that searches.

    Args:
        config: from `load`.
        resume: go on with the search that the folder holds.
        say: told which trial begins and how it ended.

    Returns:
        What was found, and whether a signal interrupted it.

    Raises:
        FulltuneError: nothing can be tried, or no trial gave a result.
    """
    require_optuna()
    space, metric = check(config)
    folder = Path(config.run_dir)
    _open_folder(folder, config, resume=resume)
    test = _tested(config, space, folder, say) if config.range_test else None
    if test is not None:
        space = range_test.narrowed(space, test)
    better = METRICS[metric].better
    sampling = Sampling(
        config.seed, config.random_trials, config.prune != "none", better == "higher"
    )
    with _open_study(folder, space, sampling) as study:

        def describe(*, interrupted: bool) -> SearchRecord:
            records = study.records()
            best = study.best(records)
            over = not interrupted and not any(each.state == "running" for each in records)
            return SearchRecord(
                run_dir=config.run_dir,
                metric=metric,
                better=better,
                trials=records,
                best=best.number if best else None,
                importances=study.importances(),
                space={key: str(dimension) for key, dimension in space.items()},
                scales={key: _scale(dimension) for key, dimension in space.items()},
                budget=str(config.budget),
                spent=_spent_text(config.budget, records, test),
                is_over=over and not _is_left(config.budget, records, test),
                range_test=test,
            )

        def publish(*, interrupted: bool = False) -> SearchRecord:
            with study.alone(), write_errors(folder):
                record = describe(interrupted=interrupted)
                keep_best(record, folder, base_of(config), keep_all=config.keep == "all")
                write_search_page(record, folder / PAGE)
            return record

        _require_a_result(publish())  # a search that was killed here is put in order
        while True:
            with study.next_trial(lambda found: _is_left(config.budget, found, test)) as trial:
                if trial is None:
                    break
                values = ", ".join(f"{key} {value}" for key, value in trial.values.items())
                say(f"trial {trial.number}: {values}")
                said, interrupted = take(base_of(config), trial, metric)
                say(f"trial {trial.number}: {said}")
            record = publish(interrupted=interrupted)
            _say_best(record, say)
            if interrupted:
                return record, True
            _require_a_result(record)
        record = publish()
        _require_a_result(record, at_the_end=True)
        return record, False


@contextmanager
def _open_study(folder: Path, space: Space, sampling: Sampling) -> Generator[Study]:
    study = Study(folder, space, sampling)
    try:
        yield study
    finally:
        study.close()


# -- the folder ------------------------------------------------------------------------------------


def _open_folder(folder: Path, config: Config, *, resume: bool) -> None:
    """Make the folder of a new search, or see that it holds this one."""
    path = folder / CONFIG
    if not path.exists():
        check_run_folder(folder, config, resume=False)
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            write_atomically(path, dump_config(config))
        return
    try:
        found = load_config(Config, path)
    except ConfigError as error:
        raise RunFolderError(
            f"`{folder}` holds a search whose settings this version cannot read: {error}",
            hint="give `run_dir` another name",
        ) from None
    if not resume:
        raise RunFolderError(
            f"`{folder}` holds a search",
            hint="go on with it, or join the process that works on it, by `--resume`; or give "
            "`run_dir` another name",
        )
    differing = [key for key in differing_keys(found, config) if key not in CHANGEABLE]
    if differing:
        raise RunFolderError(
            f"`{folder}` holds a search of other settings (differs in "
            f"{', '.join(f'`{key}`' for key in differing)})",
            hint="give `run_dir` another name, or go on with the settings of the search; its "
            "`budget` may be raised",
        )
    with write_errors(folder):
        write_atomically(path, dump_config(config))


def _tested(config: Config, space: Space, folder: Path, say: Callable[[str], None]) -> RangeTest:
    """The range test of the search, made by the first process that comes to it."""
    with Study.lock(folder):
        test = range_test.load(folder)
        if test is None:
            say(f"range test: {range_test.LR} from {space[range_test.LR]}")
            test = range_test.run(base_of(config), space)
            range_test.save(test, folder)
            say(f"range test: {test.verdict}")
    say(f"range test: {range_test.LR} is searched from {test.low:g} to {test.high:g}")
    return test


# -- the budget ------------------------------------------------------------------------------------


def _spent(budget: Quantity, trials: Sequence[TrialRecord], test: RangeTest | None) -> float:
    if budget.unit == "trials":
        return len(trials)
    if budget.unit == "tokens":
        return sum(trial.tokens for trial in trials) + (test.tokens if test else 0)
    return (sum(trial.seconds for trial in trials) + (test.seconds if test else 0)) / 60


def _is_left(budget: Quantity, trials: Sequence[TrialRecord], test: RangeTest | None) -> bool:
    return _spent(budget, trials, test) < budget.value


def _spent_text(budget: Quantity, trials: Sequence[TrialRecord], test: RangeTest | None) -> str:
    spent = _spent(budget, trials, test)
    return f"{spent:.1f} minutes" if budget.unit == "minutes" else f"{spent:,.0f} {budget.unit}"


def _require_a_result(record: SearchRecord, *, at_the_end: bool = False) -> None:
    """End a search in which nothing works, and say why.

    Raises:
        TrainingError: no trial gave a result.
    """
    failed = [trial for trial in record.trials if trial.state in ("failed", "did not fit")]
    others = [trial for trial in record.trials if trial not in failed]
    if others or not failed or (len(failed) < MOST_FAILURES_AT_FIRST and not at_the_end):
        return
    reasons = dict.fromkeys(f"{trial.state}: {trial.reason}" for trial in failed)
    raise TrainingError(
        f"none of {len(failed)} trials gave a result: {'; '.join(list(reasons)[:3])}",
        hint=f"`{record.run_dir}/{PAGE}` shows them; change `space` or the settings of "
        "`finetune`, and begin another search",
    )


def _say_best(record: SearchRecord, say: Callable[[str], None]) -> None:
    best = record.best_trial
    if best is not None and best.result is not None:
        say(
            f"best so far: trial {best.number}, {name_of(record.metric)} "
            f"{format_number(best.result)}; {record.spent} of {record.budget}"
        )


def _scale(dimension: Dimension) -> Scale:
    if isinstance(dimension, Choices):
        return Scale(choices=dimension.texts)
    return Scale(dimension.low, dimension.high, dimension.log)
