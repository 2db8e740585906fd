"""Two models on the same examples: a run against another run, or against the model it began with.

Examples are paired by the place of their row, so that models may cut texts into tokens differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fulltune.data.joined import JoinedDataset
from fulltune.data.tasks import TaskKind
from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.additive import Additive
from fulltune.evaluate.analysis import Outputs
from fulltune.evaluate.examined import Examined, joined_in_groups
from fulltune.evaluate.metrics import METRICS
from fulltune.evaluate.paired import Difference, McNemar, compare, in_words, mcnemar
from fulltune.inference import Loaded, build_objective, load_for_inference
from fulltune.objectives.base import TooLong
from fulltune.objectives.of_task import OF_TASK
from fulltune.recipes.measured import (
    Measured,
    encode_rows,
    measure,
    own_data_of,
    trained_on_note,
)
from fulltune.recipes.prepare import encode_task
from fulltune.tracking import Display, name_of


@dataclass(frozen=True)
class Comparison:
    """How a model differs from another one."""

    model: str
    """The other one."""
    num_examples: int
    """Examples that both were measured on."""
    unit: str
    """What was drawn again: `examples` or `documents`."""
    differences: dict[str, Difference]
    words: dict[str, str]
    """What each difference says."""
    mcnemar: McNemar | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "model": self.model,
            "num_examples": self.num_examples,
            "unit": self.unit,
            "metrics": {
                name: {**difference.as_json(), "words": self.words[name]}
                for name, difference in self.differences.items()
            },
            "mcnemar": self.mcnemar.as_json() if self.mcnemar else None,
            "notes": list(self.notes),
        }


def compare_with(
    first: Measured,
    other: str,
    *,
    data: str | None,
    too_long: TooLong,
    device: torch.device,
    display: Display,
) -> Comparison:
    """Measure another model on the examples of the first, and compare them one by one.

    Args:
        first: the model that was measured.
        other: the other one: a run folder, a model folder, a Hub name or `asset:NAME`.
        data: what the first was measured on; None is the validation split of its run.
        too_long: what happens to an example that is longer than the other model reads.
        device: where the other model runs.
        display: told what is done.

    Raises:
        ConfigError: the other model does another task, or counts other tokens.
        DataError: it does not know a label.
    """
    display.stage(f"loading {other}")
    loaded = _load_for(first, other, device)
    objective = build_objective(loaded, too_long=too_long, special_tokens=first.task.special_tokens)
    display.stage(f"reading and tokenizing the data for {other}")
    if data is None:
        dataset = encode_task(first.task, objective).joined
    else:
        dataset = encode_rows(objective, first.task, data)
    pairs = _pair(first, dataset)
    display.stage(f"evaluating {other} on {len(pairs.second):,} examples")
    second = measure(loaded, objective, first.task, dataset, pairs.second)
    own, unreadable = own_data_of(other, loaded)
    notes = [unreadable and f"whether `{other}` was trained on them is not known: {unreadable}"]
    if own is not None:
        notes.append(trained_on_note(other, own, dataset, pairs.second))
    if pairs.num_left_out:
        notes.append(f"{pairs.num_left_out:,} examples that only one of them can read are left out")

    ours = _only(first.outputs, pairs.kept).examined()
    theirs = second.outputs.examined()
    if ours is None or theirs is None:
        raise ConfigError(
            f"a model of `task.kind: {first.loaded.kind}` cannot be compared example by example",
            hint="leave `--against` out, and compare the intervals of two evaluations",
        )
    tested = None
    if ours.labelled is not None and theirs.labelled is not None:
        tested = mcnemar(ours.labelled.right_D, theirs.labelled.right_D)
    aligned = _aligned(ours, theirs, pairs)
    differences = compare(*aligned)
    if not _same_tokens(first.loaded.kind, *aligned):
        differences = _in_bytes(differences, other)
        notes.append("the two cut texts into other tokens, so only bits per byte compare")
    count, unit = pairs.num_units, "examples" if len(pairs.kept) == pairs.num_units else "documents"
    words = {
        name: in_words(
            name_of(name),
            difference,
            higher_is_better=METRICS[name].better == "higher",
            num_examples=count,
        )
        for name, difference in differences.items()
    }
    return Comparison(
        other, count, unit, differences, words, tested, tuple(note for note in notes if note)
    )


def _load_for(first: Measured, other: str, device: torch.device) -> Loaded:
    """The other model, to do the first one's task."""
    loaded = load_for_inference(other, device=device)
    kind = first.loaded.kind
    if loaded.kind == kind:
        return loaded
    if OF_TASK[loaded.kind].head == OF_TASK[kind].head == "causal_lm":
        return replace(loaded, kind=kind)  # a base model says nothing of its task
    raise ConfigError(
        f"`--against {other}` is a model of `task.kind: {loaded.kind}`, and the one that is "
        f"evaluated is of `task.kind: {kind}`",
        hint="compare models of the same task",
    )


@dataclass(frozen=True)
class _Pairs:
    """Examples of two data sets that are of the same rows, in one order."""

    kept: list[int]
    """Places among the first model's examples."""
    first_units: list[int]
    """The row of each of them, numbered from 0 on."""
    second: np.ndarray[Any, np.dtype[np.int64]]
    """Examples of the second data set."""
    second_units: list[int]
    num_units: int
    num_left_out: int


def _pair(first: Measured, dataset: JoinedDataset) -> _Pairs:
    wheres = [first.dataset.where(int(index)) for index in first.indices]
    wanted = set(wheres)
    examples: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        if (where := dataset.where(index)) in wanted:
            examples.setdefault(where, []).append(index)
    units = {
        where: number
        for number, where in enumerate(
            where for where in dict.fromkeys(wheres) if where in examples
        )
    }
    if not units:
        raise DataError(
            "the other model can read none of the examples",
            hint="give `--too-long truncate` with `--data`, or a model of a longer context",
        )
    kept = [place for place, where in enumerate(wheres) if where in units]
    second = [(index, number) for where, number in units.items() for index in examples[where]]
    return _Pairs(
        kept,
        [units[wheres[place]] for place in kept],
        np.array([index for index, _ in second], dtype=np.int64),
        [number for _, number in second],
        len(units),
        len(set(wheres)) - len(units),
    )


def _only(outputs: Outputs, places: Sequence[int]) -> Outputs:
    chosen = np.array(places, dtype=np.int64)
    return replace(
        outputs,
        outputs=[outputs.outputs[place] for place in places],
        lengths_D=outputs.lengths_D[chosen],
        num_bytes_D=outputs.num_bytes_D[chosen],
        documents_D=outputs.documents_D[chosen],
    )


def _aligned(ours: Examined, theirs: Examined, pairs: _Pairs) -> tuple[Additive, Additive]:
    """What both add up, row by row, with the labels of both in one order."""
    first, second = ours.additive, theirs.additive
    if ours.labelled is not None and theirs.labelled is not None:
        names = list(dict.fromkeys([*ours.labelled.names, *theirs.labelled.names]))
        first, second = ours.labelled.parts(names), theirs.labelled.parts(names)
    return (
        joined_in_groups(first, np.array(pairs.first_units)),
        joined_in_groups(second, np.array(pairs.second_units)),
    )


def _same_tokens(kind: TaskKind, ours: Additive, theirs: Additive) -> bool:
    """Whether both count the same targets in every row, where metrics are counted in tokens."""
    if kind not in ("chat", "text", "sequence_to_sequence"):
        return True
    num_targets = 1  # the place in `language_parts`
    return np.array_equal(ours.parts_DS[:, num_targets], theirs.parts_DS[:, num_targets])


def _in_bytes(differences: dict[str, Difference], other: str) -> dict[str, Difference]:
    """What does not depend on how a text is cut into tokens.

    Raises:
        ConfigError: that is nothing.
    """
    kept = {name: value for name, value in differences.items() if name == "bits_per_byte"}
    if not kept:
        raise ConfigError(
            f"`--against {other}` cuts texts into other tokens, so that its loss for a token "
            "cannot be compared",
            hint="compare models with the same tokenizer and template",
        )
    return kept
