"""`fulltune finetune FILE --seeds N`: the same run with several seeds, and how far results spread.

On little data one seed says little: the order of the examples and a new head alone move the result
(Dodge et al., 2020; Mosbach et al., 2021). Here the split moves too, where the held-out examples
are taken from the training data, so that the spread covers them as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from fulltune.errors import ConfigError, RunFolderError
from fulltune.evaluate.metrics import METRICS
from fulltune.recipes import finetune
from fulltune.report.seeds_page import SeedRun, SeedsRecord, Spread, write_seeds_page
from fulltune.train.run_folder import has_run, read_manifest, write_errors

PAGE = "seeds.html"


def run(
    config: finetune.Config,
    count: int,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[SeedsRecord, bool]:
    """Fine-tune with the seeds from ``config.seed`` on, each in a folder `seed-N` of its own.

    Args:
        config: of all runs but for their seed; its `run_dir` holds their folders.
        count: how many seeds.
        resume: pass over finished runs and go on with an unfinished one.
        say: told which run begins.

    Returns:
        The results so far, and whether a signal interrupted.

    Raises:
        FulltuneError: of the run that failed.
    """
    if count < 2:
        raise ConfigError(
            f"`--seeds {count}` has no spread to measure", hint="give at least 2, or leave it out"
        )
    if config.task.validation is None:
        raise ConfigError(
            "`--seeds` compares results, and `task.validation: null` holds nothing out",
            hint="hold something out, such as `task.validation: 5%`",
        )
    metric = finetune.check_settings(config)
    folder = Path(config.run_dir)
    configs = [
        config.model_copy(update={"seed": seed, "run_dir": str(folder / f"seed-{seed}")})
        for seed in range(config.seed, config.seed + count)
    ]
    if has_run(folder):
        raise RunFolderError(
            f"`{folder}` holds a run, and with `--seeds` it is to hold the folders of several",
            hint="give `run_dir` another name",
        )
    if not resume and (taken := [each for each in configs if has_run(Path(each.run_dir))]):
        raise RunFolderError(
            f"`{taken[0].run_dir}` holds a run",
            hint="go on with the seeds by `--resume`, or give `run_dir` another name",
        )
    for number, each in enumerate(configs, start=1):
        say(f"seed {each.seed}, {number} of {count}")
        again = resume and has_run(Path(each.run_dir))
        result = finetune.run(each, resume=again)
        record = _record(folder, configs, metric)
        if result.is_main and record.runs:
            with write_errors(folder):
                write_seeds_page(record, folder / PAGE)
        if result.ending == "interrupted" or (result.signal_name and number < count):
            return record, True
    return record, False


def _record(folder: Path, configs: list[finetune.Config], metric: str) -> SeedsRecord:
    runs = []
    for each in configs:
        path = Path(each.run_dir)
        manifest = read_manifest(path) if path.is_dir() else {}
        if manifest.get("finished"):
            runs.append(
                SeedRun(each.seed, each.run_dir, manifest["results"], manifest["duration_seconds"])
            )
    return SeedsRecord(str(folder), metric, len(configs), runs, spreads_of(runs))


def spreads_of(runs: list[SeedRun]) -> dict[str, Spread]:
    """Mean, standard deviation and range of each metric over the runs.

    A value that is not finite makes the mean and the deviation so too, and is not left out.
    """
    names = list(runs[0].metrics) if runs else []
    return {name: _spread([run.metrics[name] for run in runs], name) for name in names}


def _spread(values: list[float], name: str) -> Spread:
    mean = sum(values) / len(values)
    deviation = math.nan
    if len(values) > 1 and all(map(math.isfinite, values)):
        deviation = statistics.stdev(values)
    known: Mapping[str, object] = METRICS
    better = METRICS[name].better if name in known else None
    odd = next((value for value in values if math.isnan(value)), None)
    low, high = (odd, odd) if odd is not None else (min(values), max(values))
    return Spread(mean, deviation, low, high, better)
