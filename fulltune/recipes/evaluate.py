"""`fulltune evaluate`: a trained model on held-out or new data, by the one inference path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fulltune.config import build_config, read_yaml
from fulltune.data.joined import JoinedDataset
from fulltune.data.records import source_fingerprint
from fulltune.data.tasks import TASKS, TaskConfig
from fulltune.errors import ConfigError
from fulltune.evaluate.analysis import Analysis, Outputs, analyse
from fulltune.evaluate.evaluator import EvaluateConfig, Sample, evaluate_model
from fulltune.evaluate.generated import (
    TextToText,
    default_settings,
    sample_examples,
    score_generated,
)
from fulltune.evaluate.intervals import Interval
from fulltune.evaluate.slices import WorstError
from fulltune.evaluate.text_metrics import Tokenization, require_text_metrics
from fulltune.inference import GenerationSettings, build_objective, load_for_inference
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.loading import load_model
from fulltune.models.sources import resolve_model
from fulltune.objectives.base import TooLong
from fulltune.recipes import pretrain
from fulltune.recipes.against import Comparison, compare_with
from fulltune.recipes.held_out import (
    nothing_held_out,
    read_own_data,
    require_unchanged,
    run_folder,
    run_with_validation,
)
from fulltune.recipes.measured import (
    Measured,
    encode_rows,
    measure,
    own_data_of,
    trained_on_note,
    worst_errors,
)
from fulltune.recipes.prepare import first_examples, task_sources
from fulltune.runtime import choose_device
from fulltune.tracking import make_display
from fulltune.train.run_folder import CONFIG


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured, on what."""

    model: str
    data: str
    num_examples: int
    num_targets: int
    metrics: dict[str, float]
    details: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    """Of a model that answers: the first prompts of the data, what it answers, and what the data
    answers."""
    analysis: Analysis = field(default_factory=Analysis)
    """How sure the metrics are, and where the model is right and wrong."""
    worst_errors: list[WorstError] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """What a reader of the metrics must know."""
    comparison: Comparison | None = None
    """With the model of `--against`."""
    measured_on: dict[str, Any] = field(default_factory=dict)
    """What tells this measurement from another one of the same model."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        analysis = self.analysis
        document: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "num_examples": self.num_examples,
            "num_targets": self.num_targets,
            "metrics": self.metrics,
            "intervals": {name: interval.as_json() for name, interval in self._intervals().items()},
            "resampled": analysis.resampled,
            "details": self.details,
            "label_intervals": {
                name: interval.as_json() for name, interval in analysis.label_intervals.items()
            },
            "calibration": analysis.calibration.as_json() if analysis.calibration else None,
            "by_length": [part.as_json() for part in analysis.length_slices],
            "worst_errors": [error.as_json() for error in self.worst_errors],
            "samples": [sample.as_json() for sample in self.samples],
            "against": self.comparison.as_json() if self.comparison else None,
            "notes": list(self.notes),
        }
        return document

    def _intervals(self) -> dict[str, Interval]:
        """Those of the metrics that are shown."""
        return {
            name: interval
            for name, interval in self.analysis.intervals.items()
            if name in self.metrics
        }


def run(
    model: str,
    *,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    too_long: TooLong | None = None,
    num_samples: int | None = None,
    generate: int | None = None,
    search: Mapping[str, Any] | None = None,
    tokenize: Tokenization = "auto",
    against: str | None = None,
    device: str = "auto",
) -> EvaluationReport:
    """Evaluate a model on ``data``, or a run on its own validation split.

    Args:
        model: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        data: labelled rows in any format that training reads; None takes the validation split of
            the run that ``model`` is, or lies in.
        columns: our field name -> the column's name; None is what the model was trained with.
        too_long: what happens to an example of ``data`` that is longer than the model was trained
            for; None is an error.
        num_samples: chat, sequence to sequence: prompts of the data that are answered; None is
            what the run did, and of ``data`` the default of training.
        generate: sequence to sequence: most sources that are answered to score the answers; None
            is all of them, and 0 scores none.
        search: values of `GenerationSettings` for these answers; without `max_new_tokens` it is
            twice the longest target.
        tokenize: of BLEU; see `text_scores`.
        against: another model of the same task, measured on the same examples and compared.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: there is neither data nor a run with a validation split, what has an effect
            on ``data`` alone is given without it, answers are asked of a model that gives none, or
            the other model cannot be compared.
        DataError: the data of the run has changed, so that its split would be another one.
        MissingExtraError: the packages that score answers are not installed.
    """
    if data is None and (columns or too_long is not None):
        raise ConfigError(
            "`--column` and `--too-long` have no effect on the validation split of a run, which is "
            "read as the run read it",
            hint="leave them out, or name other data with `--data FILE`",
        )
    pretrained = _pretraining_run(Path(model))
    if pretrained is not None:
        if num_samples or too_long is not None:
            raise ConfigError(
                "`--samples` and `--too-long` have no effect on a pre-trained model, which is "
                "measured on documents",
                hint="leave them out",
            )
        _refuse_generation("a pre-trained model", generate, search, tokenize)
        if against is not None:
            raise ConfigError(
                "`--against` compares fine-tuned models, and this one is pre-trained",
                hint="leave it out; `fulltune report RUN RUN` shows two runs side by side",
            )
        return _evaluate_pretrained(model, *pretrained, data, columns, device)
    if against is not None:
        resolve_model(against)  # what is not there is said before anything slow
    chosen = choose_device(device)
    with make_display(title=f"evaluate {model}") as display:
        display.stage("loading the model")
        loaded = load_for_inference(model, device=chosen)
        if num_samples and not TASKS[loaded.kind].answers:
            raise ConfigError(
                f"`--samples` has no effect on a model of `task.kind: {loaded.kind}`, which does "
                "not answer prompts",
                hint="leave it out",
            )
        scores_answers = generate != 0 and bool(TASKS[loaded.kind].generated_metrics)
        if scores_answers:
            require_text_metrics()
        else:
            named = f"a model of `task.kind: {loaded.kind}`" if generate != 0 else "`--generate 0`"
            _refuse_generation(named, generate, search, tokenize)
        display.stage("reading and tokenizing the data")
        notes: list[str] = []
        if data is None:
            folder, config = run_with_validation(Path(model))
            if config.task.kind != loaded.kind:
                raise ConfigError(
                    f"the validation split of a run of `task.kind: {config.task.kind}` is measured "
                    "against the model it began with, in training only",
                    hint=f"see `fulltune report {folder}`, or name rows of `task.kind: "
                    f"{loaded.kind}` with `--data FILE`",
                )
            own = read_own_data(loaded, folder, config)
            objective, task, dataset = own.objective, config.task, cast(JoinedDataset, own.dataset)
            indices, named = own.validation, f"validation split of {config.run_dir}"
            asked = config.evaluate.num_samples
            cut = config.task.too_long
        else:
            cut = too_long or "error"
            objective = build_objective(loaded, too_long=cut)
            task = TaskConfig(
                kind=loaded.kind,
                train=data,
                validation=None,
                columns=columns or loaded.info.get("columns", {}),
                special_tokens="text",
            )
            dataset = encode_rows(objective, task, data)
            indices, named = np.arange(len(dataset)), data
            asked = EvaluateConfig().num_samples
        display.stage(f"evaluating {len(indices):,} examples")
        measured = measure(loaded, objective, task, dataset, indices)
        metrics, details = dict(measured.result.metrics), dict(measured.result.details)
        if scores_answers:
            answered = indices[:generate]
            display.stage(f"answering {len(answered):,} sources")
            writer = cast(TextToText, objective)
            settings = build_config(
                GenerationSettings,
                {
                    "max_new_tokens": default_settings(writer, dataset, answered).max_new_tokens,
                    **(search or {}),
                },
            )
            generated = score_generated(
                loaded.model, writer, dataset, answered, settings=settings, tokenize=tokenize
            )
            metrics |= generated.metrics
            details |= generated.details
        fitting = None
        if data is not None:
            display.stage("looking for the examples in what the model was trained on")
            fitting, notes = _against_own_data(model, measured)
        display.stage("drawing examples again for the intervals")
        analysis = analyse(measured.outputs, list(measured.result.metrics), fitting=fitting)
        examined = measured.outputs.examined()
        worst = []
        if examined is not None and examined.answers is not None:
            worst = worst_errors(measured, examined.answers, analysis.worst)
        comparison = None
        if against is not None:
            comparison = compare_with(
                measured, against, data=data, too_long=cut, device=chosen, display=display
            )
        samples: list[Sample] = []
        count = asked if num_samples is None else num_samples
        if TASKS[loaded.kind].answers and count:
            display.stage("answering prompts")
            examples = first_examples(task, dataset, indices, num_samples=count)
            samples = sample_examples(loaded.model, objective, examples, num_samples=count)
    result = measured.result
    return EvaluationReport(
        model, named, result.num_examples, result.num_targets, metrics, details,
        samples, analysis, worst, tuple(notes), comparison,
        _measured_on(data, [data] if data else [source for _, source in task_sources(task)],
                     columns=columns, too_long=too_long, against=against,
                     generate=generate, search=dict(search or {}), tokenize=tokenize),
    )  # fmt: skip


def _measured_on(data: str | None, sources: Sequence[str], **options: object) -> dict[str, Any]:
    """The data by name and content, and how it was read."""
    fingerprints = [source_fingerprint(source) for source in dict.fromkeys(sources)]
    return {"data": data, "fingerprints": fingerprints, **options}


def _against_own_data(
    model: str, measured: Measured
) -> tuple[tuple[Outputs, str] | None, list[str]]:
    """What the run of a model held out, to fit a temperature on, and what is to be known of both.

    A model that is no run's has neither.
    """
    own, unreadable = own_data_of(model, measured.loaded)
    if own is None:
        return None, [unreadable] if unreadable else []
    note = trained_on_note(model, own, measured.dataset, measured.indices)
    notes = [note] if note else []
    examined = measured.outputs.examined()
    if examined is None or examined.labelled is None or not len(own.validation):
        return None, notes  # there are no probabilities of labels that a temperature could mend
    held_out = measure(
        measured.loaded,
        own.objective,
        measured.task,
        cast(JoinedDataset, own.dataset),
        own.validation,
    )
    return (held_out.outputs, f"validation split of {model}"), notes


def _refuse_generation(
    named: str, generate: int | None, search: Mapping[str, Any] | None, tokenize: Tokenization
) -> None:
    """Refuse settings of answers where none are scored."""
    given = dict(search or {})
    if tokenize != "auto":
        given["tokenize"] = tokenize
    if generate:
        given["generate"] = generate
    for name, value in given.items():
        raise ConfigError(
            f"`--{name.replace('_', '-')} {value}` has no effect on {named}, whose answers are not "
            "scored",
            hint="leave it out",
        )


def _pretraining_run(path: Path) -> tuple[Path, pretrain.Config] | None:
    """The run a model lies in, where it was pre-trained."""
    folder = run_folder(path)
    if folder is not None and "objective" in (values := read_yaml(folder / CONFIG)):
        return folder, build_config(pretrain.Config, values)
    return None


def _evaluate_pretrained(
    model: str,
    folder: Path,
    config: pretrain.Config,
    data: str | None,
    columns: dict[str, str] | None,
    device: str,
) -> EvaluationReport:
    """The objective of a pre-training run on its own validation split, or on other documents."""
    if data is None and config.task.validation is None:
        raise nothing_held_out(folder)
    # The whole of other data is measured: it takes the place of the validation split.
    task = config.task
    if data is not None:
        update = {"train": data, "validation": data, "columns": columns or task.columns}
        task = task.model_copy(update=update)
    # Of the trained model, not of what it once started from.
    start: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": None,
        "architecture": {},
        "convert_to": None,
    }
    trained = config.model_copy(update={**start, "task": task})
    with make_display(title=f"evaluate {model}") as display:
        base, objective = pretrain.open_start(trained)
        display.stage("reading and tokenizing the data")
        prepared = pretrain.prepare(trained, objective, lambda _: None)
        if data is None:
            require_unchanged(folder, prepared.sources)
        for note in prepared.notes:
            display.stage(note)
        display.stage(f"evaluating {len(prepared.validation):,} examples")
        loaded = load_model(
            base.path, head=objective.head, dtype=torch.float32, attention=IMPLEMENTATION
        )
        torch.nn.Module.to(loaded, choose_device(device))
        result = evaluate_model(
            loaded, objective, prepared.dataset, prepared.validation, kind="text"
        )
    named = data or f"validation split of {config.run_dir}"
    # Windows of a stream hold parts of several documents, and are drawn again themselves.
    none = np.zeros(len(result.outputs), dtype=np.int64)
    outputs = Outputs(
        "text",
        objective,
        result.outputs,
        lengths_D=prepared.dataset.lengths[prepared.validation].astype(np.int64),
        num_bytes_D=none,
        documents_D=none,
    )
    analysis = analyse(outputs, list(result.metrics)) if result.outputs else Analysis()
    return EvaluationReport(
        model, named, result.num_examples, result.num_targets, result.metrics, result.details,
        analysis=analysis,
        measured_on=_measured_on(data, [source for _, source in task_sources(task)],
                                 columns=columns),
    )  # fmt: skip
