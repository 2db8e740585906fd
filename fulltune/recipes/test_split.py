"""A test split that is set aside before anything else, as files of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulltune.data.encoding import content_hash
from fulltune.data.records import Record, check_source, read_records
from fulltune.data.splits import Source, parse_validation, split_dataset
from fulltune.data.tasks import TASKS, TaskConfig, TaskKind
from fulltune.errors import ConfigError

TRAIN_FILE = "train.jsonl"
TEST_FILE = "test.jsonl"
SEED = 0
"""Of the choice; all runs of a comparison share one test split."""


@dataclass
class _Rows:
    """The rows as `split_dataset` takes them."""

    kind: TaskKind
    input_hashes: npt.NDArray[np.int64]
    example_hashes: npt.NDArray[np.int64]


def hold_out(task: TaskConfig, test: str, folder: Path) -> tuple[str, str]:
    """The sources of training and of the test, no input in both.

    Args:
        task: its training data is what a share or a number is taken of.
        test: `500 examples`, `10%`, or a source of its own.
        folder: where the rows of both sides are written, unless the test has its own source.

    Returns:
        What `task.train` is to be, and the test data. With ``deduplicate`` a row stands in the test
        split once.

    Raises:
        ConfigError: one side would be empty, or there are several sources to take a share of.
        DataError: the test's own source is not there.
    """
    wanted = parse_validation(test, setting="test")
    if not isinstance(task.train, str):
        raise ConfigError(
            "`finetune.task.train` names several sources, and a comparison takes one",
            hint="join them, or give one",
        )
    if isinstance(wanted, Source):
        check_source(wanted.source)
        return task.train, wanted.source
    hashes = [_hashes(record, task) for record in read_records(task.train)]
    inputs, wholes = (np.array(column, dtype=np.int64) for column in zip(*hashes, strict=True))
    try:
        split = split_dataset(_Rows(task.kind, inputs, wholes), test, seed=SEED)
    except ConfigError as error:
        raise ConfigError(str(error).replace("task.validation", "test"), hint=error.hint) from None
    in_test = np.zeros(len(inputs), dtype=bool)
    in_test[split.validation] = True
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    with (
        (folder / TRAIN_FILE).open("w", encoding="utf-8") as train_file,
        (folder / TEST_FILE).open("w", encoding="utf-8") as test_file,
    ):
        for record, is_test, whole in zip(read_records(task.train), in_test, wholes, strict=True):
            if is_test and task.deduplicate and int(whole) in seen:
                continue
            if is_test:
                seen.add(int(whole))
            (test_file if is_test else train_file).write(_line(record.fields))
    return str(folder / TRAIN_FILE), str(folder / TEST_FILE)


def _hashes(record: Record, task: TaskConfig) -> tuple[int, int]:
    """Of what the model is given, and of the whole row."""
    answer = TASKS[task.kind].answer
    column = task.columns.get(answer, answer) if answer else None
    given = {name: value for name, value in record.fields.items() if name != column}
    return content_hash(_line(given)), content_hash(_line(record.fields))


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, default=str) + "\n"
