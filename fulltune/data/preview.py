"""What is trained on, counted over all examples before the first step.

`examine` counts, `preview_checks` judges, `preview_view` and `preview_page` show the result, to the
verb `preview` and in training alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fulltune.data.encoding import EncodedExample
from fulltune.data.preview_facts import (
    NUM_SHOWN,
    Bar,
    EndFacts,
    LabelFacts,
    LengthFacts,
    LongRow,
    NumberFacts,
    OverlapFacts,
    PreviewFacts,
    SplitFacts,
)
from fulltune.data.tasks import TASKS, Task, TaskKind
from fulltune.data.unknown_tokens import count_unknown

IntArray = npt.NDArray[np.int64]

NUM_END_SAMPLES = 1000
"""Rows read to see whether the end of a turn is trained."""

NUM_BARS = 24
"""Most bars of a histogram of lengths."""


class EncodedColumns(Protocol):
    """What is counted; `EncodedDataset` has it. The arrays have one entry for each example."""

    @property
    def kind(self) -> TaskKind: ...  # noqa: D102
    @property
    def lengths(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def num_targets(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def num_removed(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def num_removed_targets(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def input_hashes(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def example_hashes(self) -> npt.NDArray[np.integer]: ...  # noqa: D102
    @property
    def label_codes(self) -> npt.NDArray[np.integer]:
        """Places in `label_names` of all labels of all examples, end to end."""
        ...

    @property
    def label_offsets(self) -> npt.NDArray[np.integer]:
        """Where the labels of each example begin, and at last where they end."""
        ...

    @property
    def label_names(self) -> Sequence[str]: ...  # noqa: D102

    def where(self, index: int) -> str:
        """File and line."""
        ...

    def __getitem__(self, index: int, /) -> EncodedExample: ...


def examine(
    dataset: EncodedColumns,
    splits: Mapping[str, npt.NDArray[np.integer]],
    *,
    end_token_ids: Collection[int] = (),
    unknown_token_id: int | None = None,
) -> PreviewFacts:
    """Count what is trained on. A million examples take seconds.

    Args:
        dataset: the encoded examples of all splits.
        splits: the examples of each split, by its name; that which is trained on is `TRAIN`.
        end_token_ids: tokens that end a turn, for chat; without any, ends are not looked at.
        unknown_token_id: what the tokenizer makes of text it cannot write; None is not counted.
    """
    task = TASKS[dataset.kind]
    indices_by_split = {
        name: np.sort(np.asarray(rows, dtype=np.int64)) for name, rows in splits.items()
    }
    return PreviewFacts(
        supervision=task.supervision,
        tags=dataset.kind == "token_classification",
        splits=tuple(
            _examine_split(dataset, name, indices, task, frozenset(end_token_ids), unknown_token_id)
            for name, indices in indices_by_split.items()
        ),
        overlaps=tuple(
            _overlap(dataset, later, earlier, indices_by_split)
            for earlier, later in combinations(indices_by_split, 2)
        ),
    )


def _examine_split(
    dataset: EncodedColumns,
    name: str,
    indices: IntArray,
    task: Task,
    end_token_ids: frozenset[int],
    unknown_token_id: int | None,
) -> SplitFacts:
    def some(mask: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(dataset.where(int(index)) for index in indices[mask][:NUM_SHOWN])

    lengths = dataset.lengths[indices].astype(np.int64)
    whole_lengths = lengths + dataset.num_removed[indices]
    removed_targets = dataset.num_removed_targets[indices]
    truncated = dataset.num_removed[indices] > 0
    by_example = task.supervision != "tokens"
    if task.may_lack_labels:
        num_targets = np.ones(len(indices), dtype=np.int64)
    elif by_example:
        num_targets = (np.diff(dataset.label_offsets)[indices] > 0).astype(np.int64)
    else:
        num_targets = dataset.num_targets[indices].astype(np.int64)
    without = num_targets == 0
    hashes = dataset.example_hashes[indices]
    unique, first = np.unique(hashes, return_index=True)
    repeats = np.ones(len(indices), dtype=bool)
    repeats[first] = False
    originals = first[np.searchsorted(unique, hashes[repeats][:NUM_SHOWN])]
    trainable = len(indices) if by_example else int(lengths.sum())
    return SplitFacts(
        name=name,
        num_examples=len(indices),
        num_tokens=int(lengths.sum()),
        num_targets=int(num_targets.sum()),
        target_share=int(num_targets.sum()) / trainable if trainable else 0.0,
        num_without_target=int(without.sum()),
        without_target=some(without),
        num_emptied=int((without & (removed_targets > 0)).sum()),
        num_truncated=int(truncated.sum()),
        num_removed_tokens=int(dataset.num_removed[indices].sum()),
        num_removed_targets=int(removed_targets.sum()),
        truncated=some(truncated),
        num_duplicates=int(repeats.sum()),
        duplicates=tuple(
            f"{row} repeats {dataset.where(int(indices[original]))}"
            for row, original in zip(some(repeats), originals, strict=True)
        ),
        lengths=_measure(lengths) if len(lengths) else None,
        longest=tuple(
            LongRow(
                where=dataset.where(int(indices[position])), length=int(whole_lengths[position])
            )
            for position in np.argsort(-whole_lengths, kind="stable")[:NUM_SHOWN]
        ),
        labels=_examine_labels(dataset, indices[~without])
        if task.supervision == "labels"
        else None,
        numbers=_examine_numbers(dataset, indices[~without])
        if task.supervision == "numbers"
        else None,
        end_of_turn=_look_at_ends(dataset, indices[~without], end_token_ids),
        unknown=None
        if unknown_token_id is None
        else count_unknown(dataset, indices, unknown_token_id, num_shown=NUM_SHOWN),
    )


def _measure(lengths: IntArray) -> LengthFacts:
    # Nearest ranks: lengths that some example has, not means of two.
    median, p90, p99 = np.percentile(lengths, [50, 90, 99], method="inverted_cdf").astype(int)
    longest = int(lengths.max())
    width = _round_up(longest / NUM_BARS)
    counts = np.bincount(lengths // width)
    return LengthFacts(
        shortest=int(lengths.min()),
        mean=float(lengths.mean()),
        median=int(median),
        p90=int(p90),
        p99=int(p99),
        longest=longest,
        histogram=tuple(
            Bar(low=number * width, high=(number + 1) * width, count=int(count))
            for number, count in enumerate(counts)
        ),
    )


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= width:
                return digit * power
        power *= 10


def _examine_labels(dataset: EncodedColumns, indices: IntArray) -> LabelFacts:
    names = dataset.label_names
    num_labels = np.diff(dataset.label_offsets)
    chosen = np.zeros(len(num_labels), dtype=bool)
    chosen[indices] = True
    labels = dataset.label_codes[np.repeat(chosen, num_labels)]
    owners = np.repeat(indices, num_labels[indices])  # the example that each of them is of
    counts = np.bincount(labels, minlength=len(names))
    # Sorted by input and then by label, equal ones lie in runs, with the earliest row first.
    order = np.lexsort((dataset.example_hashes[indices], dataset.input_hashes[indices]))
    inputs = dataset.input_hashes[indices][order]
    codes = dataset.example_hashes[indices][order]
    new_input = np.append(True, inputs[1:] != inputs[:-1])[: len(inputs)]
    new_pair = new_input | np.append(True, codes[1:] != codes[:-1])[: len(codes)]
    pair_starts = np.flatnonzero(new_pair)
    pair_sizes = np.diff(np.append(pair_starts, len(inputs)))
    first_pairs = np.flatnonzero(new_input[pair_starts])
    num_pairs = np.diff(np.append(first_pairs, len(pair_starts)))
    if len(indices):
        input_sizes = np.add.reduceat(pair_sizes, first_pairs)
        most_common = int(np.maximum.reduceat(pair_sizes, first_pairs).sum())
    else:
        input_sizes, most_common = np.array([], dtype=np.int64), 0
    contradicting = np.flatnonzero(num_pairs > 1)
    pairs = sorted(
        sorted(indices[order[pair_starts[first_pairs[group] : first_pairs[group] + 2]]].tolist())
        for group in contradicting
    )
    return LabelFacts(
        counts={name: int(count) for name, count in zip(names, counts, strict=True) if count},
        first_rows={
            names[code]: dataset.where(int(owners[first]))
            for code, first in zip(*np.unique(labels, return_index=True), strict=True)
        },
        num_contradicting=int(input_sizes[contradicting].sum()),
        contradicting=tuple(
            " but ".join(f"{dataset.where(row)} {_labels_of(dataset, row)}" for row in pair)
            for pair in pairs[:NUM_SHOWN]
        ),
        highest_accuracy=most_common / len(indices) if len(indices) else 1.0,
    )


def _examine_numbers(dataset: EncodedColumns, indices: IntArray) -> NumberFacts | None:
    values = np.array([float(name) for name in dataset.label_names])
    numbers = values[dataset.label_codes[dataset.label_offsets[indices]]]
    if not len(numbers):
        return None
    return NumberFacts(
        lowest=float(numbers.min()),
        mean=float(numbers.mean()),
        deviation=float(numbers.std()),
        highest=float(numbers.max()),
    )


def _labels_of(dataset: EncodedColumns, row: int) -> str:
    codes = dataset.label_codes[dataset.label_offsets[row] : dataset.label_offsets[row + 1]]
    shown = [dataset.label_names[code] for code in codes[:NUM_SHOWN]]
    return f"`{', '.join(shown)}{', ...' if len(codes) > NUM_SHOWN else ''}`"


def _look_at_ends(
    dataset: EncodedColumns, indices: IntArray, end_token_ids: frozenset[int]
) -> EndFacts | None:
    if not end_token_ids or len(indices) == 0:
        return None
    positions = np.linspace(0, len(indices) - 1, min(len(indices), NUM_END_SAMPLES)).astype(int)
    num_ending = 0
    for index in indices[positions].tolist():
        example = dataset[index]
        last = int(np.flatnonzero(np.asarray(example["targets"]))[-1])
        num_ending += int(example["input_ids"][last]) in end_token_ids
    return EndFacts(num_sampled=len(positions), num_ending=num_ending)


def _overlap(
    dataset: EncodedColumns, split: str, other: str, indices_by_split: Mapping[str, IntArray]
) -> OverlapFacts:
    rows, others = indices_by_split[split], indices_by_split[other]
    same = np.isin(dataset.example_hashes[rows], dataset.example_hashes[others])
    same_input = np.isin(dataset.input_hashes[rows], dataset.input_hashes[others]) & ~same
    shown = [*np.flatnonzero(same), *np.flatnonzero(same_input)][:NUM_SHOWN]
    return OverlapFacts(
        split=split,
        other=other,
        num_examples=int(same.sum()),
        num_inputs=int(same_input.sum()),
        rows=tuple(dataset.where(int(rows[position])) for position in shown),
    )
