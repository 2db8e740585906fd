"""`fulltune evaluate`: a trained model on held-out or new data, by the one inference path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fulltune.config import build_config, read_yaml
from fulltune.data.encoded_dataset import encode_dataset
from fulltune.data.joined import JoinedDataset
from fulltune.data.tasks import TASKS, TaskConfig
from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.evaluator import EvaluateConfig, Sample, evaluate_model
from fulltune.evaluate.generated import (
    TextToText,
    default_settings,
    sample_examples,
    score_generated,
)
from fulltune.evaluate.text_metrics import Tokenization, require_text_metrics
from fulltune.inference import GenerationSettings, build_objective, load_for_inference
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.loading import load_model
from fulltune.objectives.base import Objective, TooLong
from fulltune.recipes import pretrain
from fulltune.recipes.columns import columns_as_options
from fulltune.recipes.finetune import Config
from fulltune.recipes.prepare import first_examples, prepare
from fulltune.runtime import cache_dir, choose_device, num_cores
from fulltune.tracking import make_display
from fulltune.train.run_folder import (
    CONFIG,
    MANIFEST,
    MODEL,
    MODEL_LAST,
    has_run,
    read_manifest,
)


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
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: there is neither data nor a run with a validation split, what has an effect
            on ``data`` alone is given without it, or answers are asked of a model that gives none.
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
        return _evaluate_pretrained(model, *pretrained, data, columns, device)
    with make_display(title=f"evaluate {model}") as display:
        display.stage("loading the model")
        loaded = load_for_inference(model, device=choose_device(device))
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
        if data is None:
            folder, config = _run_of(Path(model))
            if config.task.kind != loaded.kind:
                raise ConfigError(
                    f"the validation split of a run of `task.kind: {config.task.kind}` is measured "
                    "against the model it began with, in training only",
                    hint=f"see `fulltune report {folder}`, or name rows of `task.kind: "
                    f"{loaded.kind}` with `--data FILE`",
                )
            objective = build_objective(
                loaded,
                too_long=config.task.too_long,
                special_tokens=config.task.special_tokens,
            )
            prepared = prepare(objective, config.task, seed=config.seed)
            _require_unchanged(folder, prepared.sources)
            dataset, indices = prepared.dataset, prepared.validation
            task, asked = config.task, config.evaluate.num_samples
            named = f"validation split of {config.run_dir}"
        else:
            objective = build_objective(loaded, too_long=too_long or "error")
            task = TaskConfig(
                kind=loaded.kind,
                train=data,
                validation=None,
                columns=columns or loaded.info.get("columns", {}),
                special_tokens="text",
            )
            dataset, asked = _encode(objective, task, data), EvaluateConfig().num_samples
            indices, named = np.arange(len(dataset)), data
        display.stage(f"evaluating {len(indices):,} examples")
        result = evaluate_model(loaded.model, objective, dataset, indices, kind=loaded.kind)
        metrics, details = dict(result.metrics), dict(result.details)
        if scores_answers:
            chosen = indices[:generate]
            display.stage(f"answering {len(chosen):,} sources")
            writer = cast(TextToText, objective)
            settings = build_config(
                GenerationSettings,
                {
                    "max_new_tokens": default_settings(writer, dataset, chosen).max_new_tokens,
                    **(search or {}),
                },
            )
            generated = score_generated(
                loaded.model, writer, dataset, chosen, settings=settings, tokenize=tokenize
            )
            metrics |= generated.metrics
            details |= generated.details
        samples: list[Sample] = []
        count = asked if num_samples is None else num_samples
        if TASKS[loaded.kind].answers and count:
            display.stage("answering prompts")
            examples = first_examples(task, dataset, indices, num_samples=count)
            samples = sample_examples(loaded.model, objective, examples, num_samples=count)
    return EvaluationReport(
        model,
        named,
        result.num_examples,
        result.num_targets,
        metrics,
        details,
        samples,
    )


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
    folder = _run_folder(path)
    if folder is not None and "objective" in (values := read_yaml(folder / CONFIG)):
        return folder, build_config(pretrain.Config, values)
    return None


def _run_folder(path: Path) -> Path | None:
    """The run that a model is, or lies in. A `config.yaml` alone is settings, not a run."""
    folders = (path, path.parent) if path.name in (MODEL, MODEL_LAST) else (path,)
    runs = (folder for folder in folders if has_run(folder) and (folder / MANIFEST).is_file())
    return next(runs, None)


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
        raise ConfigError(
            f"the run in `{folder}` held nothing out", hint="name the data with `--data FILE`"
        )
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
            _require_unchanged(folder, prepared.sources)
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
    return EvaluationReport(
        model, named, result.num_examples, result.num_targets, result.metrics, result.details
    )


def _run_of(path: Path) -> tuple[Path, Config]:
    folder = _run_folder(path)
    if folder is None:
        raise ConfigError(
            f"`{path}` is not a run, so there is no validation split",
            hint="name the data with `--data FILE`",
        )
    config = build_config(Config, read_yaml(folder / CONFIG))
    if config.task.validation is None:
        raise ConfigError(
            f"the run in `{folder}` held nothing out", hint="name the data with `--data FILE`"
        )
    return folder, config


def _require_unchanged(folder: Path, sources: Sequence[Mapping[str, Any]]) -> None:
    """Of other rows another share would be held out, and the model may have been trained on it."""
    recorded = {
        entry["source"]: entry["fingerprint"] for entry in read_manifest(folder).get("data", ())
    }
    changed = [
        source["source"]
        for source in sources
        if recorded.get(source["source"], source["fingerprint"]) != source["fingerprint"]
    ]
    if changed:
        raise DataError(
            f"{', '.join(f'`{name}`' for name in changed)} changed since the run in `{folder}`, so "
            "its validation split is not the one that was held out",
            hint="restore the data, or name other data with `--data FILE`",
        )


def _encode(objective: Objective, task: TaskConfig, data: str) -> JoinedDataset:
    with columns_as_options():
        encoded = encode_dataset(
            [data],
            task,
            objective.encode,
            encode_fingerprint=objective.fingerprint,
            num_workers=num_cores(),
            cache_dir=cache_dir() / "encoded",
        )
    return JoinedDataset([encoded])
