"""`fulltune compare FILE`: what training all weights gives, against less, on the same data.

Each method gets the same steps, the same rates to choose from, and the same seeds. Its rate is the
one whose run was the best on the validation split; what is reported is measured on a test split
that no choice looks at. Every run is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fulltune.config import Settings, build_config, dump_config, read_yaml
from fulltune.data.tasks import TASKS
from fulltune.errors import ConfigError, RunFolderError, TrainingError
from fulltune.evaluate.metrics import METRICS, check_metric
from fulltune.models.scope import Scope
from fulltune.recipes import evaluate, finetune, settings_files
from fulltune.recipes.test_split import hold_out
from fulltune.train.run_folder import (
    CHECKPOINTS,
    MODEL,
    MODEL_LAST,
    is_finished,
    read_manifest,
    write_atomically,
)

RESULTS = "results.json"
CONFIG = "compare.yaml"
INTERRUPTED = 130


class Config(Settings):
    """Settings of `fulltune compare`."""

    finetune: dict[str, Any]
    """The settings of `fulltune finetune`, without `run_dir`, `scope`, `seed`, `optimizer.lr`."""
    methods: Annotated[tuple[Scope, ...], Field(min_length=1)] = (
        "all",
        "last 2 layers",
        "lora 16",
        "head",
    )
    """What is trained: `all`, `last N layers`, `head`, and `lora RANK` (needs peft)."""
    rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        3e-5,
        1e-4,
        3e-4,
        1e-3,
        3e-3,
    )
    """Learning rates that each method may choose from, by the validation split."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Runs of each method with its rate; the first is that of the choice."""
    test: str = "500 examples"
    """What is measured on: a number or a share of the training data that is set aside before
    anything else, or a source of its own."""
    metric: str | None = None
    """What the rate is chosen by and the table shows; null is the task's first metric that is not
    its loss."""
    keep_models: bool = False
    """Keep the weights of every run, and not only its settings and measurements."""
    run_dir: str
    """Folder of the comparison; made new."""


@dataclass(frozen=True)
class RunResult:
    """What one run measured."""

    method: str
    rate: float
    seed: int
    validation: float
    """The metric on the validation split, of the kept weights; NaN where training failed."""
    test: dict[str, float]
    """All metrics of the test split; empty where training failed."""
    seconds: float
    peak_bytes: int
    num_trained: int
    num_parameters: int


@dataclass(frozen=True)
class MethodResult:
    """What a method reached."""

    method: str
    rate: float
    values: list[float]
    """The metric on the test split, for each seed."""
    mean: float
    half_width: float
    """Of the 95 % interval of the mean over seeds, by Student's t; NaN with one seed."""
    num_trained: int
    num_parameters: int
    peak_bytes: int
    """Mean over the seeds."""
    seconds: float
    """Mean over the seeds, of training and evaluation."""


@dataclass(frozen=True)
class Comparison:
    """A whole comparison."""

    metric: str
    test: str
    methods: list[MethodResult]
    runs: list[RunResult]
    finished: bool = True


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the file of a comparison.

    Raises:
        ConfigError: a setting, also of a run, is unknown or not possible.
    """
    config = settings_files.load(Config, path, overrides, verb="compare")
    for name, where in (("run_dir", ""), ("scope", ""), ("seed", ""), ("lr", "optimizer")):
        place = config.finetune.get(where, {}) if where else config.finetune
        if isinstance(place, dict) and name in place:
            key = f"finetune.{where}.{name}" if where else f"finetune.{name}"
            raise ConfigError(f"`{key}` is what the comparison itself sets", hint="leave it out")
    run = _config_of(config, config.methods[0], config.rates[0], 0, Path("run"), None)
    if run.task.validation is None:
        raise ConfigError(
            "`finetune.task.validation` is null, and the rates are chosen by it",
            hint="hold something out, such as `validation: 500 examples`",
        )
    finetune.check_settings(run)
    _metric(config, run)
    return config


def run(config: Config, *, resume: bool = False, say: Callable[[str], None]) -> Comparison:
    """Take all runs of a comparison, and write its table as JSON and as a page.

    Args:
        config: of `load`.
        resume: go on with a comparison that was interrupted.
        say: told which run begins.

    Raises:
        RunFolderError: the folder holds another comparison, or exists and ``resume`` is off.
        TrainingError: a run failed in another way than by diverging.
    """
    folder = Path(config.run_dir)
    _open(folder, config, resume=resume)
    first = _config_of(config, config.methods[0], config.rates[0], 0, folder, None)
    metric = _metric(config, first)
    train, test = hold_out(first.task, config.test, folder / "data")
    done = _read(folder)
    chosen: list[MethodResult] = []
    for method in config.methods:
        tried = []
        for rate in config.rates:
            result = _take(config, method, rate, 0, train, test, metric, folder, done, say)
            if result is None:
                return Comparison(metric, test, chosen, list(done.values()), finished=False)
            tried.append(result)
        best = _best(tried, metric)
        say(f"{method}: rate {best.rate:g} is the best on the validation split")
        seeds = [best]
        for seed in range(1, config.seeds):
            result = _take(config, method, best.rate, seed, train, test, metric, folder, done, say)
            if result is None:
                return Comparison(metric, test, chosen, list(done.values()), finished=False)
            seeds.append(result)
        chosen.append(_summarize(seeds, metric))
    return Comparison(metric, test, chosen, list(done.values()))


def _open(folder: Path, config: Config, *, resume: bool) -> None:
    path = folder / CONFIG
    if not resume and folder.exists() and any(folder.iterdir()):
        raise RunFolderError(
            f"`{folder}` exists and is not empty",
            hint="go on with it by `--resume`, or give another `run_dir`",
        )
    if resume and path.is_file() and build_config(Config, read_yaml(path)) != config:
        raise RunFolderError(
            f"`{folder}` holds a comparison with other settings",
            hint=f"put them back as in `{path}`, or give another `run_dir`",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config))


def _metric(config: Config, run: finetune.Config) -> str:
    possible = TASKS[run.task.kind].metrics
    name = config.metric or next((name for name in possible if name != "loss"), "loss")
    return check_metric(name, run.task.kind)


def _config_of(
    config: Config, method: str, rate: float, seed: int, folder: Path, train: str | None
) -> finetune.Config:
    values = dict(config.finetune)
    values["optimizer"] = {**values.get("optimizer", {}), "lr": rate}
    if train is not None:
        values["task"] = {**values["task"], "train": train}
    return build_config(
        finetune.Config,
        {**values, "scope": method, "seed": seed, "run_dir": str(folder)},
    )


def _take(
    config: Config,
    method: str,
    rate: float,
    seed: int,
    train: str,
    test: str,
    metric: str,
    folder: Path,
    done: dict[str, RunResult],
    say: Callable[[str], None],
) -> RunResult | None:
    """One run, or what it was measured before; None where it was interrupted."""
    name = f"{method.replace(' ', '-')}-{rate:g}-seed-{seed}"
    if name in done:
        return done[name]
    say(f"{method}, rate {rate:g}, seed {seed}")
    run_dir = folder / "runs" / name
    settings = _config_of(config, method, rate, seed, run_dir, train)
    file = folder / "runs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump_config(settings))
    code = subprocess.run(
        [sys.executable, "-m", "fulltune", "finetune", str(file), "--resume", "--json"],
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode
    if code == INTERRUPTED:
        return None
    if code == TrainingError.exit_code and not is_finished(run_dir):
        result = RunResult(method, rate, seed, math.nan, {}, math.nan, 0, 0, 0)  # it diverged
    elif code:
        raise TrainingError(f"the run in `{run_dir}` failed", hint="see what it said above")
    else:
        manifest = read_manifest(run_dir)
        report = evaluate.run(str(run_dir / MODEL), data=test, too_long=settings.task.too_long)
        result = RunResult(
            method,
            rate,
            seed,
            manifest["results"][metric],
            report.metrics,
            manifest["duration_seconds"],
            manifest["memory"]["peak_bytes"],
            manifest["num_trained_parameters"],
            manifest["num_parameters"],
        )
    done[name] = result
    rows = {key: asdict(value) for key, value in done.items()}
    write_atomically(folder / RESULTS, json.dumps(rows, indent=1))
    if not config.keep_models:
        for part in (CHECKPOINTS, MODEL, MODEL_LAST):
            shutil.rmtree(run_dir / part, ignore_errors=True)
    return result


def _read(folder: Path) -> dict[str, RunResult]:
    path = folder / RESULTS
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: RunResult(**row) for name, row in rows.items()}


def _best(results: Sequence[RunResult], metric: str) -> RunResult:
    """The best on the validation split; of equal ones the smaller rate.

    Raises:
        TrainingError: training failed with every rate.
    """
    finite = [result for result in results if math.isfinite(result.validation)]
    if not finite:
        raise TrainingError(
            f"training of `{results[0].method}` failed with every rate", hint="give smaller `rates`"
        )
    sign = -1 if METRICS[metric].better == "higher" else 1
    return min(finite, key=lambda result: (sign * result.validation, result.rate))


def _summarize(results: Sequence[RunResult], metric: str) -> MethodResult:
    from scipy import stats

    values = [result.test.get(metric, math.nan) for result in results]
    count = len(values)
    half_width = math.nan
    if count > 1:
        error = statistics.stdev(values) / math.sqrt(count)
        half_width = float(stats.t.ppf(0.975, count - 1)) * error
    return MethodResult(
        results[0].method,
        results[0].rate,
        values,
        statistics.fmean(values),
        half_width,
        results[0].num_trained,
        results[0].num_parameters,
        int(statistics.fmean(result.peak_bytes for result in results)),
        statistics.fmean(result.seconds for result in results),
    )
