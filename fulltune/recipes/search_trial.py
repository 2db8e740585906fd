"""One trial of a search: an ordinary run of `finetune` in a folder of its own."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fulltune.config import build_config, read_yaml
from fulltune.errors import ConfigError, MemoryPlanError, TrainingError, first_line
from fulltune.recipes import finetune
from fulltune.recipes.search_space import with_values
from fulltune.recipes.search_study import Trial
from fulltune.report.search_record import State
from fulltune.runtime import return_freed_memory
from fulltune.tracking import format_number, name_of, read_metrics
from fulltune.train.run_folder import CONFIG, has_run, read_manifest


def settings_of(base: Mapping[str, Any], trial: Trial) -> finetune.Config:
    """The full settings of a trial."""
    values = {**with_values(base, trial.values), "run_dir": str(trial.folder)}
    first = trial.study.folder_of(0)
    if values.get("precision", "auto") == "auto" and trial.number > 0 and has_run(first):
        # Measured once: on a busy machine `auto` could choose differently for each trial.
        values["precision"] = read_yaml(first / CONFIG)["precision"]
    return build_config(finetune.Config, values)


def take(base: Mapping[str, Any], trial: Trial, metric: str) -> tuple[str, bool]:
    """Run a trial, or go on with it, and tell the study how it ended.

    Args:
        base: the settings of all trials.
        trial: held by this process.
        metric: what is searched by.

    Returns:
        How it ended, in words, and whether a signal asked to stop. A trial that is interrupted is
        not told of: it is gone on with.

    Raises:
        FulltuneError: what no other trial could mend: data, the model or a folder is at fault.
    """
    if was_given_up(trial.folder):  # and killed before the study was told
        return _give_up(trial, metric), False
    start = time.monotonic()
    watcher = Watcher(trial, metric)
    result: finetune.Result | None = None
    fault: tuple[State, str] | None = None
    try:
        result = finetune.run(
            settings_of(base, trial), resume=has_run(trial.folder), watch=watcher.watch
        )
    except MemoryPlanError as error:
        fault = ("did not fit", str(error))
    except torch.OutOfMemoryError as error:
        fault = ("did not fit", f"the memory of the GPU ran out: {first_line(error)}")
    except (TrainingError, ConfigError) as error:
        fault = ("failed", str(error))
    finally:
        trial.add_seconds(time.monotonic() - start)
        gc.collect()
        return_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if result is None or result.ending == "interrupted":
        return ("interrupted", True) if fault is None else (_fail(trial, *fault), False)
    interrupted = result.signal_name is not None
    if watcher.fault is not None:
        return _fail(trial, "failed", watcher.fault), interrupted
    if result.ending == "given up":
        return _give_up(trial, metric), interrupted
    return _finish(trial, metric), interrupted


class Watcher:
    """Reports every evaluation of a trial to the study, which may give it up."""

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.fault: str | None = None
        self._steps: list[int] = [step for step, _ in evaluations(trial.folder, metric)]

    def watch(self, step: int, metrics: Mapping[str, float]) -> bool:
        """`Watch` of the trainer."""
        # A resumed run repeats the evaluations after its last checkpoint.
        self._steps = [*(known for known in self._steps if known < step), step]
        value = metrics[self.metric]
        if not math.isfinite(value):
            self.fault = _fault(self.metric, value, f"at step {step}")
            return True
        return self.trial.report(len(self._steps), value)


def evaluations(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Step and value of every evaluation of a run after a step; of a resumed one, each once."""
    path = folder / "metrics.jsonl"
    found: dict[int, float] = {}
    for event in read_metrics(path) if path.exists() else ():
        if event["event"] == "evaluation" and event["step"] > 0:
            found[event["step"]] = event[metric]
    return sorted(found.items())


def was_given_up(folder: Path) -> bool:
    """Whether a run ended by being given up."""
    path = folder / "metrics.jsonl"
    return path.exists() and any(event["event"] == "given_up" for event in read_metrics(path))


def _fault(metric: str, value: float, when: str) -> str:
    return f"`{metric}` is {format_number(float(value))} {when}"


def _finish(trial: Trial, metric: str) -> str:
    results = read_manifest(trial.folder)["results"]
    value = results[metric]
    if not math.isfinite(value):
        return _fail(trial, "failed", _fault(metric, value, "at the end"))
    trial.finish(value, results)
    return f"{name_of(metric)} {format_number(value)}"


def _give_up(trial: Trial, metric: str) -> str:
    number = max(trial.evaluations)
    reason = f"not in the best third at evaluation {number}"
    trial.give_up(reason)
    value = format_number(trial.evaluations[number])
    return f"given up: {name_of(metric)} {value} is {reason}"


def _fail(trial: Trial, state: State, reason: str) -> str:
    trial.fail(state, reason)
    return f"{state}: {reason}"
