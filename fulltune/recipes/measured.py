"""A model and what came out of it for each example: what intervals and comparisons start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from fulltune.data.encoded_dataset import encode_dataset
from fulltune.data.joined import JoinedDataset
from fulltune.data.tasks import ChatExample, Example, TaskConfig, TaskKind
from fulltune.errors import FulltuneError
from fulltune.evaluate.analysis import Outputs
from fulltune.evaluate.evaluator import EvaluationResult, evaluate_model
from fulltune.evaluate.examined import Answers
from fulltune.evaluate.slices import WorstError
from fulltune.inference import Loaded
from fulltune.objectives.base import Objective
from fulltune.recipes.columns import columns_as_options
from fulltune.recipes.held_out import fine_tuning_run, read_own_data
from fulltune.recipes.prepare import IntArray, Prepared, find_examples
from fulltune.runtime import cache_dir, num_cores


@dataclass(frozen=True)
class Measured:
    """A model, what it was measured on, and what came out."""

    loaded: Loaded
    objective: Objective
    task: TaskConfig
    """Where the examples come from, and how they are read."""
    dataset: JoinedDataset
    indices: IntArray
    result: EvaluationResult
    outputs: Outputs


def measure(
    loaded: Loaded,
    objective: Objective,
    task: TaskConfig,
    dataset: JoinedDataset,
    indices: IntArray,
) -> Measured:
    """Evaluate a model on some examples."""
    result = evaluate_model(loaded.model, objective, dataset, indices, kind=loaded.kind)
    outputs = outputs_of(loaded.kind, objective, dataset, indices, result)
    return Measured(loaded, objective, task, dataset, indices, result, outputs)


def outputs_of(
    kind: TaskKind,
    objective: Objective,
    dataset: JoinedDataset,
    indices: IntArray,
    result: EvaluationResult,
) -> Outputs:
    """What came out for each example, with its length and the document it belongs to."""
    places = np.asarray(indices, dtype=np.int64)
    # Conversations and labelled texts stand each for themselves, repeats too.
    documents = dataset.input_hashes[places].tolist() if kind == "text" else range(len(places))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    num_bytes = dataset.num_bytes[places].astype(np.int64)
    if "bits_per_byte" not in result.metrics:
        num_bytes = np.zeros_like(num_bytes)
    return Outputs(
        kind,
        objective,
        result.outputs,
        lengths_D=dataset.lengths[places].astype(np.int64),
        num_bytes_D=num_bytes,
        documents_D=np.array([numbers[name] for name in documents], dtype=np.int64),
    )


def encode_rows(objective: Objective, task: TaskConfig, data: str) -> JoinedDataset:
    """Rows beside those of a run, encoded for a model."""
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


def own_data_of(model: str, loaded: Loaded) -> tuple[Prepared | None, str]:
    """The data that a model was fine-tuned on, or why it cannot be read; neither for no run."""
    run = fine_tuning_run(Path(model))
    if run is None:
        return None, ""
    kind = run[1].task.kind
    if kind != loaded.kind:
        return None, (
            f"whether some of the examples are in the training data of the run in `{run[0]}`, of "
            f"`task.kind: {kind}`, was not looked up"
        )
    try:
        return read_own_data(loaded, *run), ""
    except FulltuneError as error:
        return None, f"the data of the run in `{run[0]}` cannot be read again: {error}"


def trained_on_note(model: str, own: Prepared, dataset: JoinedDataset, indices: IntArray) -> str:
    """A warning where a model was trained on what it is measured on; else nothing."""
    trained = cast(JoinedDataset, own.dataset).input_hashes[own.train]
    seen = int(np.isin(dataset.input_hashes[indices], trained).sum())
    if not seen:
        return ""
    return (
        f"{seen:,} of these {len(indices):,} examples are in the training data of `{model}`: on "
        "them it shows what it remembers, not what it can"
    )


def worst_errors(measured: Measured, answers: Answers, places: Sequence[int]) -> list[WorstError]:
    """The texts of wrong examples, read again from where they lie."""
    wheres = [measured.dataset.where(int(measured.indices[place])) for place in places]
    examples = find_examples(measured.task, wheres)
    return [
        WorstError(
            where=where,
            text=text_of(examples[where]) if where in examples else "",
            label=answers.right[place],
            prediction=answers.predicted[place],
            loss=float(answers.losses_D[place]),
        )
        for where, place in zip(wheres, places, strict=True)
    ]


def text_of(example: Example) -> str:
    """What an example gives the model to read; a pair on two lines."""
    if isinstance(example, ChatExample):
        return "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages)
    parts = (getattr(example, name, None) for name in ("text", "text_pair"))
    return "\n".join(part for part in parts if part)
