"""What a search leaves: the best trial's model and settings; of the others, what they measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulltune.config import build_config, dump_config
from fulltune.models.loading import read_info
from fulltune.recipes import finetune
from fulltune.recipes.search_space import with_values
from fulltune.report.search_record import SearchRecord, TrialRecord
from fulltune.train.run_folder import (
    CHECKPOINTS,
    MODEL,
    MODEL_LAST,
    replace_folder,
    write_atomically,
)

BEST = "best.yaml"


def keep_best(
    record: SearchRecord, folder: Path, base: Mapping[str, Any], *, keep_all: bool
) -> None:
    """Put the best trial's model and settings into the folder of the search.

    Args:
        record: the search so far.
        folder: of the search; whoever calls holds its lock.
        base: the settings of all trials.
        keep_all: leave the models and checkpoints of the other trials.
    """
    best = record.best_trial
    if best is not None:
        if read_info(folder / MODEL).get("run") != best.folder:
            _link(Path(best.folder) / MODEL, folder / MODEL)
        again = {**with_values(base, best.values), "run_dir": str(Path(record.run_dir) / "best")}
        text = dump_config(build_config(finetune.Config, again))
        head = f"# Trial {best.number} of `{record.run_dir}`, the best by `{record.metric}`.\n"
        write_atomically(folder / BEST, head + text)
    for trial in record.trials:
        if trial is not best and trial.state != "running" and not keep_all:
            _remove_weights(trial)


def _remove_weights(trial: TrialRecord) -> None:
    for name in (MODEL, MODEL_LAST, CHECKPOINTS):
        shutil.rmtree(Path(trial.folder) / name, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """A second name for the files of a model, which takes no room, or a copy where it cannot be."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(source, temporary, copy_function=os.link)
    except OSError:  # another file system, or one without links
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
    replace_folder(temporary, target)
