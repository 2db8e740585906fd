"""`fulltune predict MODEL INPUT`: rows in, the same rows with a `prediction` out, as JSON Lines.

Rows stream: memory does not grow with their number, their order is kept, and every batch is on disk
before the next one begins, so that an interrupted run goes on with ``resume``: with the same model
and settings only, which a small file beside the output remembers (`origin`).
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch

from fulltune.data.formats import (
    ROWS_LOOKED_AT,
    RecordFormat,
    make_example,
    recognise_format,
)
from fulltune.data.records import STANDARD_INPUT, Record, check_source, read_records
from fulltune.data.tasks import TASKS, TaskConfig
from fulltune.errors import ConfigError, DataError, RunFolderError
from fulltune.inference import (
    PREDICTORS,
    GenerationSettings,
    Loaded,
    build_objective,
    in_chunks,
    load_for_inference,
    predict_examples,
)
from fulltune.recipes.columns import columns_as_options
from fulltune.recipes.origin import (
    describe_origin,
    origin_path,
    require_same_origin,
    write_origin,
)
from fulltune.runtime import choose_device

FIELD = "prediction"
"""The field that is added to each row."""


@dataclass(frozen=True)
class PredictResult:
    """What a call of `run` did."""

    output: Path | None
    """Where the rows are; None is stdout."""
    num_predicted: int
    num_kept: int
    """Rows of an earlier, interrupted call that were kept."""
    seconds: float


def run(
    model: str,
    source: str,
    *,
    output: Path | None = None,
    resume: bool = False,
    settings: GenerationSettings | None = None,
    columns: Mapping[str, str] | None = None,
    too_long: Literal["error", "truncate"] = "error",
    quick: bool = False,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    batch_tokens: int = 8192,
) -> PredictResult:
    """Predict every row of a source.

    Args:
        model: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        source: rows in any format that training reads. A conversation that ends with the
            assistant's turn is answered again from before that turn.
        output: a file to be made; None is stdout.
        resume: go on after the complete lines of ``output``, which must be of the same rows,
            model and settings.
        settings: how answers are generated.
        columns: our field name -> the column's name; None is what the model was trained with.
        too_long: classification, sequence to sequence: what happens to a text longer than the model
            was trained for. It cannot be dropped: the row would be missing from the output.
        quick: classification: multiply in bf16, and exactly where a label could change by it. The
            labels are the same, probabilities differ in their third digit.
        device: `auto`, `cpu` or `cuda`.
        dtype: dtype of the weights; None keeps the stored one.
        batch_tokens: most tokens of a batch.

    Raises:
        ConfigError: a setting has no effect on this kind of model.
        DataError: a row cannot be read, or does not fit the model; the rows of the chunks before
            its own are written.
        RunFolderError: ``output`` exists and ``resume`` is off, is of other rows, another model or
            other settings, or cannot be written.
    """
    started = time.monotonic()
    with columns_as_options():
        records, layout, loaded = _open(
            model, source, columns, device, dtype, output, resume, quick
        )
    _refuse_settings_without_effect(loaded, settings, too_long)
    predictor = PREDICTORS[loaded.kind]
    rows = predictor.rows
    num_kept = 0
    if output is not None:
        origin = describe_origin(
            model,
            loaded,
            settings,
            columns=_columns(columns, loaded),
            too_long=too_long,
        )
        if resume and output.exists():
            kept = _complete_lines(output, records, rows)
            num_kept, records = kept.num_rows, kept.following
            if kept.num_complete:
                require_same_origin(output, origin)
            try:
                os.truncate(output, kept.num_bytes)
            except OSError as error:
                raise _unwritable(output, error) from None
        try:
            write_origin(output, origin)
        except OSError as error:
            raise _unwritable(origin_path(output), error) from None
    objective = build_objective(loaded, too_long=too_long if predictor.truncates else "error")
    num_predicted = 0
    with _Sink(output, append=num_kept > 0 or (resume and output is not None)) as sink:
        for chunk in in_chunks(records, rows):
            with columns_as_options():
                examples = [
                    make_example(record, layout, kind=loaded.kind, needs_label=False)
                    for record in chunk
                ]
                predictions = predict_examples(
                    loaded, objective, examples, settings=settings, batch_tokens=batch_tokens
                )
            sink.write(
                [
                    {**_input_fields(record), FIELD: prediction}
                    for record, prediction in zip(chunk, predictions, strict=True)
                ]
            )
            num_predicted += len(chunk)
    return PredictResult(output, num_predicted, num_kept, time.monotonic() - started)


def _refuse_settings_without_effect(
    loaded: Loaded, settings: GenerationSettings | None, too_long: str
) -> None:
    given: dict[str, object] = {}
    predictor = PREDICTORS[loaded.kind]
    if not predictor.generates:
        defaults = GenerationSettings()
        chosen = settings or defaults
        given = {
            name: getattr(chosen, name)
            for name in GenerationSettings.model_fields
            if getattr(chosen, name) != getattr(defaults, name)
        }
    if not predictor.truncates and too_long != "error":
        given["too_long"] = too_long
    if loaded.quick is not None and loaded.kind != "classification":
        raise ConfigError(
            f"`--quick` has no effect on a model of `task.kind: {loaded.kind}`", hint="leave it out"
        )
    if loaded.quick is not None and loaded.model.dtype == torch.bfloat16:
        raise ConfigError(
            "`--quick` has no effect on a model that is stored in bf16", hint="leave it out"
        )
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(
            f"`{option} {value}` has no effect on a model of `task.kind: {loaded.kind}`",
            hint="leave it out",
        )


def _open(
    model: str,
    source: str,
    columns: Mapping[str, str] | None,
    device: str,
    dtype: torch.dtype | None,
    output: Path | None,
    resume: bool,
    quick: bool,
) -> tuple[Iterator[Record], RecordFormat, Loaded]:
    """Everything that can be refused is refused before the output is touched."""
    if resume and output is None:
        raise ConfigError("`--resume` needs an output to go on with", hint="give `--output FILE`")
    if source != STANDARD_INPUT:
        check_source(source)
    if output is not None and output.exists() and not resume:
        raise RunFolderError(
            f"`{output}` exists, and predictions never overwrite a file",
            hint="go on with it by `--resume`, or give another `--output`",
        )
    if output is not None and not output.parent.is_dir():
        raise RunFolderError(
            f"`{output}` cannot be made: there is no folder `{output.parent}`",
            hint="make the folder, or give another `--output`",
        )
    records = read_records(source)
    first = list(itertools.islice(records, ROWS_LOOKED_AT))
    loaded = load_for_inference(model, device=choose_device(device), dtype=dtype, quick=quick)
    config = TaskConfig(kind=loaded.kind, train=source, columns=_columns(columns, loaded))
    layout = recognise_format(
        first,
        config,
        needs_label=False,
        words_at_spaces=bool(loaded.info.get("words_at_spaces")),
    )
    return itertools.chain(first, records), layout, loaded


def _columns(columns: Mapping[str, str] | None, loaded: Loaded) -> dict[str, str]:
    given: Mapping[str, str] = columns or loaded.info.get("columns", {})
    answer = TASKS[loaded.kind].answer
    return {ours: theirs for ours, theirs in given.items() if ours != answer}


# -- the output ------------------------------------------------------------------------------------


class _Sink:
    """Lines to a file or stdout, on disk after each `write`."""

    def __init__(self, output: Path | None, *, append: bool) -> None:
        self.output = output
        self.stream: BinaryIO = sys.stdout.buffer
        if output is not None:
            try:
                self.stream = cast(BinaryIO, output.open("ab" if append else "xb"))
            except OSError as error:
                raise _unwritable(output, error) from None

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self.output is not None:
            self.stream.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            self.stream.write(lines.encode())
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _unwritable(self.output or Path("stdout"), error) from None


def _unwritable(output: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"`{output}` cannot be written: {error.strerror}",
        hint="free space or give another `--output`; what is written stays, `--resume` goes on",
    )


def _input_fields(record: Record) -> dict[str, Any]:
    if FIELD in record.fields:
        raise DataError(
            f"{record.where}: the row has a field `{FIELD}` already, which would be overwritten",
            hint="rename the field",
        )
    return {name: _plain(value) for name, value in record.fields.items()}


def _plain(value: Any) -> Any:
    """A value as JSON knows it: dates and bytes as text, numbers that are not finite as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return str(value)


@dataclass(frozen=True)
class _Kept:
    """What a call that resumes keeps of the lines of another one."""

    num_rows: int
    num_bytes: int
    num_complete: int
    """Lines that are whole, of which some may be made again."""
    following: Iterator[Record]
    """The rows after those that are kept."""


def _complete_lines(output: Path, records: Iterator[Record], rows: int) -> _Kept:
    """Compare the lines of ``output`` with the rows.

    Lines are kept in whole batches of ``rows``: a probability depends in its last digits on the
    rows beside it in a batch, and the file must equal that of an unbroken call.
    """
    num_kept, end, position, num_complete = 0, 0, 0, 0
    begun: list[Record] = []  # of a batch that is not complete
    with output.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break  # torn by the interruption
            record = next(records, None)
            written = _parse_line(output, number, line)
            if record is None:
                raise RunFolderError(
                    f"{output}:{number}: the input has only {number - 1} rows",
                    hint="give the input that the file was made from, or another `--output`",
                )
            if written != _input_fields(record):
                raise RunFolderError(
                    f"{output}:{number}: is not the prediction of {record.where}",
                    hint="give the input that the file was made from, or another `--output`",
                )
            begun.append(record)
            position += len(line)
            num_complete = number
            if len(begun) == rows:
                num_kept, end, begun = number, position, []
    following = next(records, None)
    if following is None:  # the last batch is as full as it will be
        return _Kept(num_complete, position, num_complete, records)
    return _Kept(num_kept, end, num_complete, itertools.chain(begun, [following], records))


def _parse_line(output: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or FIELD not in row:
        raise RunFolderError(
            f"{output}:{number}: is not a line that `fulltune predict` wrote",
            hint="give another `--output`",
        )
    del row[FIELD]
    return row
