"""`fulltune evaluate`: a trained model on held-out or new data, by the one inference path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.config import build_config, read_yaml
from fulltune.data.encoding import encode_dataset
from fulltune.data.joined import JoinedDataset
from fulltune.data.tasks import TaskConfig
from fulltune.errors import ConfigError
from fulltune.evaluate.evaluator import evaluate_model
from fulltune.inference import Loaded, build_objective, load_for_inference
from fulltune.objectives.base import TooLong
from fulltune.recipes.finetune import Config
from fulltune.recipes.prepare import prepare
from fulltune.runtime import cache_dir, choose_device, num_cores
from fulltune.tracking import make_display
from fulltune.train.run_folder import CONFIG, has_run


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured, on what."""

    model: str
    data: str
    num_examples: int
    num_targets: int
    metrics: dict[str, float]
    details: dict[str, Any]


def run(
    model: str,
    *,
    data: str | None = None,
    columns: dict[str, str] | None = None,
    too_long: TooLong = "error",
    device: str = "auto",
) -> EvaluationReport:
    """Evaluate a model on ``data``, or a run on its own validation split.

    Args:
        model: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        data: labelled rows in any format that training reads; None takes the validation split of
            the run that ``model`` is, or lies in.
        columns: our field name -> the column's name.
        too_long: what happens to an example longer than the model was trained for.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: there is neither data nor a run with a validation split.
    """
    with make_display(title=f"evaluate {model}") as display:
        display.stage("loading the model")
        loaded = load_for_inference(model, device=choose_device(device))
        display.stage("reading and tokenizing the data")
        if data is None:
            config = _config_of_run(Path(model))
            prepared = prepare(
                build_objective(loaded, too_long=config.task.too_long),
                config.task,
                seed=config.seed,
            )
            dataset, indices = prepared.dataset, prepared.validation
            named = f"validation split of {config.run_dir}"
        else:
            dataset = _encode(loaded, data, columns or {}, too_long)
            indices, named = np.arange(len(dataset)), data
        display.stage(f"evaluating {len(indices):,} examples")
        objective = build_objective(loaded, too_long=too_long)
        result = evaluate_model(loaded.model, objective, dataset, indices, kind=loaded.kind)
    return EvaluationReport(
        model, named, result.num_examples, result.num_targets, result.metrics, result.details
    )


def _config_of_run(path: Path) -> Config:
    for folder in (path, path.parent):
        if has_run(folder):
            config = build_config(Config, read_yaml(folder / CONFIG))
            if config.task.validation is None:
                raise ConfigError(
                    f"the run in `{folder}` held nothing out",
                    hint="name the data with `--data FILE`",
                )
            return config
    raise ConfigError(
        f"`{path}` is not a run, so there is no validation split",
        hint="name the data with `--data FILE`",
    )


def _encode(loaded: Loaded, data: str, columns: dict[str, str], too_long: TooLong) -> JoinedDataset:
    task = TaskConfig(kind=loaded.kind, train=data, validation=None, columns=columns)
    objective = build_objective(loaded, too_long=too_long)
    encoded = encode_dataset(
        [data],
        task,
        objective.encode,
        encode_fingerprint=objective.fingerprint,
        num_workers=num_cores(),
        cache_dir=cache_dir() / "encoded",
    )
    return JoinedDataset([encoded])
