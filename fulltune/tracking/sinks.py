"""The tracker: `metrics.jsonl` always, and TensorBoard, W&B or trackio where asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict

from fulltune.errors import MissingExtraError
from fulltune.tracking.log import MetricsLog

SinkName: TypeAlias = Literal["tensorboard", "wandb", "trackio"]


class TrackingConfig(BaseModel):
    """Where the numbers of a run go besides `metrics.jsonl`, which is always written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sinks: tuple[SinkName, ...] = ()
    """Also send metrics to `tensorboard`, `wandb` or `trackio`; an extra each."""
    project: str = "fulltune"
    """Project under which W&B and trackio list the run."""
    offline: bool = False
    """W&B: keep the run on this machine, to be sent later with `wandb sync`."""


class Sink(Protocol):
    """A place outside the run folder's log that receives numbers."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Receive the numbers of one step, named `train/loss`, `validation/accuracy`, ..."""

    def close(self) -> None:
        """Send what is left."""


class Tracker:
    """Writes events to `metrics.jsonl` and their numbers to the sinks of the settings."""

    def __init__(
        self,
        run_folder: Path,
        config: TrackingConfig,
        *,
        settings: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        # The sinks first: a missing extra should be said before anything is written.
        self._sinks = [
            _open_sink(name, run_folder, config, dict(settings or {}), resume_step)
            for name in config.sinks
        ]
        self.log = MetricsLog(run_folder / "metrics.jsonl")
        if resume_step is not None:
            self.log.truncate_after(resume_step)

    def write(self, event: str, **values: Any) -> None:
        """Log one event; `step` and `evaluation` events also go to the sinks."""
        self.log.write(event, **values)
        if event == "checkpoint":
            self.log.sync()
        if not self._sinks or event not in ("step", "evaluation"):
            return
        group = "train" if event == "step" else str(values.get("split", "validation"))
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for sink in self._sinks:
            sink.write(numbers, int(values["step"]))

    def close(self) -> None:
        """Close the log and every sink."""
        self.log.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_sinks(config: TrackingConfig) -> None:
    """Refuse a sink whose package is not installed, without importing it.

    Raises:
        MissingExtraError: naming the extra to install.
    """
    for name in config.sinks:
        if importlib.util.find_spec(name) is None:
            raise _missing_extra(name)


def _open_sink(
    name: SinkName,
    run_folder: Path,
    config: TrackingConfig,
    settings: dict[str, Any],
    resume_step: int | None,
) -> Sink:
    if name == "tensorboard":
        return _TensorBoardSink(run_folder / "tensorboard", resume_step)
    if name == "wandb":
        return _WandbSink(run_folder, config, settings)
    return _TrackioSink(run_folder, config, settings)


def _import_extra(module: str, sink: SinkName) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing_extra(sink) from error


def _missing_extra(sink: SinkName) -> MissingExtraError:
    extra = "track" if sink == "tensorboard" else sink
    return MissingExtraError(
        f"the settings send metrics to `{sink}`, whose package is not installed",
        hint=f"`pip install 'fulltune[{extra}]'`, or leave it out of `tracking.sinks`",
    )


class _TensorBoardSink:
    """Writes with TensorBoard's own writer, which needs neither torch nor TensorFlow."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        writer = _import_extra("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._event_pb2 = _import_extra("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summary_pb2 = _import_extra("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._writer = writer.EventFileWriter(str(folder))
        if resume_step is not None:
            # A session start tells TensorBoard to drop what an earlier file says of later steps.
            session = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
            self._add(session_log=session, step=resume_step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        value_type = self._summary_pb2.Summary.Value
        points = [value_type(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(summary=self._summary_pb2.Summary(value=points), step=step)

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._event_pb2.Event(wall_time=time.time(), **fields))

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(self, run_folder: Path, config: TrackingConfig, settings: dict[str, Any]) -> None:
        self._run = _import_extra("wandb", "wandb").init(
            project=config.project,
            name=run_folder.name,
            group=run_folder.name,  # The parts of a resumed run stand together.
            dir=str(run_folder),
            config=settings,
            mode="offline" if config.offline else None,
        )
        # W&B's own step may never go back; a field of ours may, as it does after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _TrackioSink:
    def __init__(self, run_folder: Path, config: TrackingConfig, settings: dict[str, Any]) -> None:
        self._trackio = _import_extra("trackio", "trackio")
        with redirect_stdout(sys.stderr):  # It greets on stdout, which is for results.
            self._trackio.init(
                project=config.project, name=run_folder.name, config=settings, resume="allow"
            )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()
