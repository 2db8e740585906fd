"""Reads a run folder, whole or unfinished, into one record that the report draws from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from fulltune.data.preview_facts import Finding, PreviewFacts
from fulltune.data.tasks import TASKS
from fulltune.errors import DataError, RunFolderError
from fulltune.tracking import format_bytes, read_metrics, restore_numbers, show_answer


@dataclass(frozen=True)
class MetricCourse:
    """One metric of one split over the run."""

    split: str
    metric: str
    points: tuple[tuple[int, float], ...]

    @property
    def first(self) -> tuple[int, float]:
        """Step and value of the first evaluation."""
        return self.points[0]

    @property
    def last(self) -> tuple[int, float]:
        """Step and value of the last evaluation."""
        return self.points[-1]

    def at(self, step: int | None) -> float | None:
        """The value at a step; None where the metric was not measured then."""
        return dict(self.points).get(step) if step is not None else None


@dataclass(frozen=True)
class SamplePair:
    """The same prompt answered by the model as it was and as it became."""

    prompt: tuple[Mapping[str, str], ...]
    first_step: int
    before: str
    last_step: int | None
    after: str | None
    reference: str | None
    """The answer that the data gives."""


class DataReport(BaseModel):
    """What `data.json` holds: the preview of what was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: PreviewFacts
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; every part but the events may be empty."""

    folder: Path
    name: str
    events: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    data: DataReport | None
    samples: tuple[SamplePair, ...]
    predictions: Mapping[str, Any]
    model_card: str
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """What `fulltune evaluate` kept, the newest first."""

    @property
    def start(self) -> Mapping[str, Any]:
        """The `start` event, or nothing."""
        return next((event for event in self.events if event["event"] == "start"), {})

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((int(event.get("step", 0)) for event in self.events), default=0)

    @property
    def status(self) -> str:
        """How the run stands: `finished`, `stopped early`, `interrupted` or `unfinished`."""
        for event in reversed(self.events):
            if event["event"] == "end":
                early = any(other["event"] == "early_stop" for other in self.events)
                return "stopped early" if early else "finished"
            if event["event"] == "early_stop":
                return "stopped early"
            if event["event"] == "interrupted":
                return "interrupted"
            if event["event"] in ("step", "resume"):
                break
        return "unfinished"

    @property
    def duration_seconds(self) -> float:
        """Time of training; without a manifest, the time its logged steps took."""
        if "duration_seconds" in self.manifest:
            return float(self.manifest["duration_seconds"])
        return sum(float(event.get("seconds") or 0.0) for event in self.steps())

    @property
    def headline(self) -> str:
        """The model that was trained and the task, as far as the folder says."""
        model = self.manifest.get("base_model") or self.start.get("model")
        return " · ".join(
            str(part) for part in (model or self.config.get("model"), self.task) if part
        )

    @property
    def peak_memory_bytes(self) -> float:
        """The most memory that was measured; 0 where none was."""
        recorded = (self.manifest.get("memory") or {}).get("peak_bytes")
        values = [value for _, value in self.values("memory_bytes") if math.isfinite(value)]
        return float(recorded or max(values, default=0.0))

    @property
    def machine(self) -> tuple[str, str] | None:
        """The device, and its cores and memory where they are known."""
        machine = self.manifest.get("machine")
        if not isinstance(machine, Mapping):
            device = machine or self.start.get("device")
            return (str(device), "") if device else None
        name = str(machine.get("gpu") or machine.get("cpu") or machine.get("device") or "")
        cores = f"{machine['cores']} cores" if "cores" in machine else ""
        memory = machine.get("memory_bytes")
        size = format_bytes(memory) if isinstance(memory, (int, float)) else ""
        return (name, " · ".join(part for part in (cores, size) if part)) if name else None

    def steps(self) -> list[Mapping[str, Any]]:
        """The `step` events."""
        return [event for event in self.events if event["event"] == "step"]

    def values(self, key: str) -> list[tuple[float, float]]:
        """One value of the steps that have it, as points over the step."""
        return [
            (event["step"], float(event[key]))
            for event in self.steps()
            if isinstance(event.get(key), (int, float))
        ]

    def courses(self) -> list[MetricCourse]:
        """Every metric of every split, in the order in which they were first seen."""
        points: dict[tuple[str, str], dict[int, float]] = {}
        for event in self.events:
            if event["event"] != "evaluation":
                continue
            split = str(event.get("split", "validation"))
            for metric, value in event.items():
                if isinstance(value, float) and metric not in ("time", "seconds", "epoch"):
                    points.setdefault((split, metric), {})[int(event.get("step", 0))] = value
        return [
            MetricCourse(split, metric, tuple(sorted(course.items())))
            for (split, metric), course in points.items()
        ]

    @property
    def task(self) -> str:
        """The task's kind, or nothing where the folder does not say."""
        settings = self.config.get("task")
        kind = settings.get("kind") if isinstance(settings, Mapping) else None
        return str(self.manifest.get("task") or kind or "")

    @property
    def best_step(self) -> int | None:
        """The evaluation that was the best; 0 is the model before training."""
        best = [
            int(event["step"])
            for event in self.events
            if event["event"] == "evaluation" and event.get("best")
        ]
        return best[-1] if best else None

    @property
    def kept_step(self) -> int | None:
        """The evaluation of the weights that the run exports, or would if it ended here.

        The best; the last one where nothing was better than the model before training.
        """
        steps = [int(event["step"]) for event in self.events if event["event"] == "evaluation"]
        return self.best_step or (steps[-1] if steps else None)

    @property
    def written(self) -> Mapping[str, Any]:
        """The event that measured the model as it was written; nothing where that was no other.

        In training the weights are in its arithmetic; the model may be written more exactly.
        """
        return next((event for event in reversed(self.events) if event["event"] == "result"), {})

    def result(self, course: MetricCourse) -> float | None:
        """What `fulltune evaluate` gives: as written, else the evaluation of the kept weights."""
        if course.split == "validation" and course.metric in self.written:
            return float(self.written[course.metric])
        return course.at(self.kept_step)

    def main_course(self) -> MetricCourse | None:
        """The metric that the run is judged by: the one of its settings, else the task's first."""
        courses = self.courses()
        evaluate = self.config.get("evaluate")
        wanted = evaluate.get("metric") if isinstance(evaluate, Mapping) else None
        if wanted is None and self.task in TASKS:
            wanted = TASKS[self.task].metrics[0]
        judged = (course for course in courses if course.metric == wanted)
        return next(judged, courses[0] if courses else None)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunFolderError: there is no such folder, or no run made it.
        DataError: it has no metrics, or a file in it is not what a run writes.
    """
    if not folder.is_dir():
        raise RunFolderError(
            f"`{folder}` is not a folder",
            hint="give the folder of a run, such as `runs/NAME`",
        )
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml")):
        raise RunFolderError(
            f"`{folder}` is not a run folder: it has neither `metrics.jsonl` nor `config.yaml`",
            hint="give the folder that `run_dir` named when the run was started",
        )
    events = read_metrics(folder / "metrics.jsonl")
    if not events:
        raise DataError(
            f"`{folder / 'metrics.jsonl'}` holds no event, so there is nothing to report",
            hint="let the run make at least one step",
        )
    card = folder / "model" / "README.md"
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        events=tuple(events),
        config=_read_mapping(folder / "config.yaml"),
        manifest=_read_manifest(folder / "manifest.json"),
        data=_read_data(folder / "data.json"),
        samples=_pair_samples(_read_samples(folder, events)),
        predictions=_read_mapping(folder / "predictions" / "evaluation.json"),
        model_card=card.read_text(encoding="utf-8") if card.exists() else "",
        evaluations=_read_evaluations(folder / "evaluations"),
    )


def _read_manifest(path: Path) -> Mapping[str, Any]:
    content = _read_mapping(path)
    try:
        return restore_numbers(content)
    except ValueError as error:
        raise DataError(
            f"`{path}` is not what a run writes: {error}",
            hint="the file was changed after the run wrote it; restore or remove it",
        ) from error


def _read_data(path: Path) -> DataReport | None:
    if not path.exists():
        return None
    try:
        return DataReport.model_validate(_read_mapping(path))
    except ValueError as error:
        raise DataError(
            f"`{path}` is not what a run writes: {error}",
            hint="the file was changed after the run wrote it; restore or remove it",
        ) from error


def _read_mapping(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"`{path}` cannot be read: {error}",
            hint="the file was changed after the run wrote it; restore or remove it",
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"`{path}` holds a {type(content).__name__}, not keys and values",
            hint="the file was changed after the run wrote it; restore or remove it",
        )
    return content


def _read_evaluations(folder: Path) -> tuple[Mapping[str, Any], ...]:
    found = [restore_numbers(_read_mapping(path)) for path in sorted(folder.glob("*.json"))]
    for path, evaluation in zip(sorted(folder.glob("*.json")), found, strict=True):
        if missing := _OF_EVALUATIONS - evaluation.keys():
            raise DataError(
                f"`{path}` is not what `fulltune evaluate` keeps: it has no "
                + ", ".join(f"`{name}`" for name in sorted(missing)),
                hint="the file was changed after it was written; restore or remove it",
            )
    return tuple(sorted(found, key=_when_made, reverse=True))


_OF_EVALUATIONS = {"made", "model", "data", "num_examples", "metrics", "intervals"}


def _when_made(evaluation: Mapping[str, Any]) -> str:
    return str(evaluation["made"])


def _read_samples(folder: Path, events: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    path = folder / "samples.jsonl"
    if not path.exists():
        return [event for event in events if event["event"] == "sample"]
    samples: list[Mapping[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # torn by a killed run
                break
            raise DataError(
                f"{path}:{number}: not JSON: {error}", hint="restore or remove the file"
            ) from error
        if not isinstance(sample, dict) or not {"step", "prompt", "answer"} <= sample.keys():
            raise DataError(
                f"{path}:{number}: not a sample: `step`, `prompt` and `answer` were expected",
                hint="restore or remove the file",
            )
        samples.append(sample)
    return samples


def _pair_samples(samples: list[Mapping[str, Any]]) -> tuple[SamplePair, ...]:
    """The first and the last answer to each prompt."""
    answers: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        answers.setdefault(json.dumps(sample["prompt"]), []).append(sample)
    pairs = []
    for same_prompt in answers.values():
        ordered = sorted(same_prompt, key=lambda sample: int(sample["step"]))
        first, last = ordered[0], ordered[-1]
        several = len(ordered) > 1
        prompt = first["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        pairs.append(
            SamplePair(
                prompt=tuple(prompt),
                first_step=int(first["step"]),
                before=show_answer(first),
                last_step=int(last["step"]) if several else None,
                after=show_answer(last) if several else None,
                reference=str(last["reference"]) if last.get("reference") else None,
            )
        )
    return tuple(pairs)
