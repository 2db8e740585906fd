"""What is trained on: counted over all examples before the first step, and judged.

`examine` counts, `check` judges, `require_sound` stops a run whose supervision is empty or
contradicts itself. `preview` and training call the same three; `preview_view` and
`preview_page` show the result.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fulltune.data.encoding import EncodedExample
from fulltune.data.padding import PaddingFacts
from fulltune.data.tasks import TaskKind
from fulltune.data.unknown_tokens import MAX_SHARE, UnknownFacts, count_unknown
from fulltune.errors import DataError

IntArray = npt.NDArray[np.int64]

TRAIN = "train"
"""The name of the split that is trained on; all others are held out."""

NUM_SHOWN = 5
"""Rows named as examples of a finding."""

NUM_END_SAMPLES = 1000
"""Rows read to see whether the end of a turn is trained."""

NUM_BARS = 24
"""Most bars of a histogram of lengths."""

CONTRADICTION_LIMIT = 0.1
"""Share of training examples under contradicting labels from which a run does not start. People who
annotate disagree on a few per cent; more is a wrong column, or several votes for each text."""


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
    def labels(self) -> npt.NDArray[np.integer]:
        """Places in `label_names`; -1 without a label."""
        ...

    @property
    def label_names(self) -> Sequence[str]: ...  # noqa: D102

    def where(self, index: int) -> str:
        """File and line."""
        ...

    def __getitem__(self, index: int, /) -> EncodedExample: ...


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Bar(_Facts):
    """One bar of a histogram: how many examples have ``low <= length < high`` tokens."""

    low: int
    high: int
    count: int


class LengthFacts(_Facts):
    """Lengths of a split's examples in tokens, after truncation."""

    shortest: int
    mean: float
    median: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[Bar, ...]


class LongRow(_Facts):
    """One of the longest examples."""

    where: str
    length: int
    """In tokens, before truncation."""


class EndFacts(_Facts):
    """Whether the model learns to stop, seen on a sample of the rows."""

    num_sampled: int
    """Rows read that have a target."""
    num_ending: int
    """Those whose last target ends a turn."""


class LabelFacts(_Facts):
    """The labels of a split, and whether they contradict each other."""

    counts: dict[str, int]
    """By label; labels that the split lacks are not in it."""
    num_contradicting: int
    """Examples whose input stands in the split under another label too."""
    contradicting: tuple[str, ...]
    highest_accuracy: float
    """What a model can reach at most that gives every input one answer."""


class SplitFacts(_Facts):
    """What one split holds."""

    name: str
    num_examples: int
    num_tokens: int
    num_targets: int
    """Trained tokens; for a task with labels, the examples that have one."""
    target_share: float
    """Share of the tokens that is trained; for a task with labels, of the examples."""
    num_without_target: int
    without_target: tuple[str, ...]
    num_emptied: int
    """Examples that have no target because truncation removed them all."""
    num_truncated: int
    num_removed_tokens: int
    num_removed_targets: int
    truncated: tuple[str, ...]
    num_duplicates: int
    """Examples that repeat an earlier one exactly."""
    duplicates: tuple[str, ...]
    lengths: LengthFacts | None
    """None where the split is empty."""
    longest: tuple[LongRow, ...]
    labels: LabelFacts | None
    end_of_turn: EndFacts | None
    unknown: UnknownFacts | None = None
    """None where the tokenizer has no unknown token."""


class OverlapFacts(_Facts):
    """Examples of one split that stand in another one."""

    split: str
    """The split whose examples are counted."""
    other: str
    """Where they stand as well."""
    num_examples: int
    """Exact repetitions."""
    num_inputs: int
    """Repetitions of the input alone, with another target."""
    rows: tuple[str, ...]


class ArrangedFacts(_Facts):
    """The examples that pre-training made of a split's documents."""

    name: str
    num_examples: int
    num_tokens: int
    """Before noise, special tokens included."""
    longest: int
    num_counted: int
    """Examples whose noise was drawn to count what is predicted."""
    num_predicted: int
    """Predicted tokens of these."""
    predicted_share: float
    """In all tokens of these."""


class PreviewFacts(_Facts):
    """What is trained on, as counted."""

    supervision: Literal["tokens", "labels"]
    splits: tuple[SplitFacts, ...]
    overlaps: tuple[OverlapFacts, ...]
    padding: PaddingFacts | None = None
    """None for a model that packs its examples, which needs none."""
    arranged: tuple[ArrangedFacts, ...] = ()
    """Pre-training: what the documents, which `splits` counts, became."""


class Finding(_Facts):
    """Something to know about the data before training on it."""

    level: Literal["error", "warning", "note"]
    message: str
    hint: str
    where: tuple[str, ...] = ()


# -- counting --------------------------------------------------------------------------------------


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
    by_label = dataset.kind == "classification"
    indices_by_split = {
        name: np.sort(np.asarray(rows, dtype=np.int64)) for name, rows in splits.items()
    }
    return PreviewFacts(
        supervision="labels" if by_label else "tokens",
        splits=tuple(
            _examine_split(
                dataset, name, indices, by_label, frozenset(end_token_ids), unknown_token_id
            )
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
    by_label: bool,
    end_token_ids: frozenset[int],
    unknown_token_id: int | None,
) -> SplitFacts:
    def some(mask: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(dataset.where(int(index)) for index in indices[mask][:NUM_SHOWN])

    lengths = dataset.lengths[indices].astype(np.int64)
    whole_lengths = lengths + dataset.num_removed[indices]
    removed_targets = dataset.num_removed_targets[indices]
    truncated = dataset.num_removed[indices] > 0
    if by_label:
        num_targets = (dataset.labels[indices] >= 0).astype(np.int64)
    else:
        num_targets = dataset.num_targets[indices].astype(np.int64)
    without = num_targets == 0
    hashes = dataset.example_hashes[indices]
    unique, first = np.unique(hashes, return_index=True)
    repeats = np.ones(len(indices), dtype=bool)
    repeats[first] = False
    originals = first[np.searchsorted(unique, hashes[repeats][:NUM_SHOWN])]
    trainable = len(indices) if by_label else int(lengths.sum())
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
        labels=_examine_labels(dataset, indices[~without]) if by_label else None,
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
    counts = np.bincount(dataset.labels[indices], minlength=len(names))
    # Sorted by input and then by label, equal ones lie in runs, with the earliest row first.
    order = np.lexsort((dataset.labels[indices], dataset.input_hashes[indices]))
    inputs = dataset.input_hashes[indices][order]
    codes = dataset.labels[indices][order]
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
        num_contradicting=int(input_sizes[contradicting].sum()),
        contradicting=tuple(
            " but ".join(f"{dataset.where(row)} `{names[dataset.labels[row]]}`" for row in pair)
            for pair in pairs[:NUM_SHOWN]
        ),
        highest_accuracy=most_common / len(indices) if len(indices) else 1.0,
    )


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


# -- judging ---------------------------------------------------------------------------------------


def check(facts: PreviewFacts, *, may_truncate: bool = True) -> list[Finding]:
    """Judge what was counted: errors, then warnings, then notes.

    Args:
        facts: from `examine`.
        may_truncate: whether cutting off examples was asked for; an error otherwise.
    """
    findings = [finding for split in facts.splits for finding in _check_split(split, may_truncate)]
    train = next((split for split in facts.splits if split.name == TRAIN), None)
    if train is not None:
        findings += _check_labels_of_others(train, facts.splits)
    findings += [_leak(overlap) for overlap in facts.overlaps if _size(overlap)]
    levels = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: levels.index(finding.level))


def require_sound(facts: PreviewFacts, *, may_truncate: bool = True) -> list[Finding]:
    """Stop before the first step where the data cannot be trained on.

    Returns:
        The warnings and notes.

    Raises:
        DataError: names every error, not only the first.
    """
    findings = check(facts, may_truncate=may_truncate)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        lines = [
            error.message + (f" ({'; '.join(error.where)})" if error.where else "")
            for error in errors
        ]
        raise DataError(
            "the data cannot be trained on: " + "\n".join(lines),
            hint="; ".join(dict.fromkeys(error.hint for error in errors)),
        )
    return findings


def to_json(facts: PreviewFacts, findings: Sequence[Finding]) -> str:
    """Facts and findings as indented JSON; `PreviewFacts.model_validate` reads ``facts`` back."""
    document: dict[str, Any] = {
        "facts": facts.model_dump(mode="json"),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }
    return json.dumps(document, ensure_ascii=False, indent=2)


def _check_split(split: SplitFacts, may_truncate: bool) -> list[Finding]:
    if split.num_examples == 0:
        return [
            Finding(
                level="error",
                message=f"`{split.name}` has no example",
                hint="check the files, and what the settings of the task leave out",
            )
        ]
    return [
        *_check_targets(split),
        *_check_truncation(split, may_truncate),
        *_check_unknown(split),
        *_check_duplicates(split),
        *_check_contradictions(split),
        *_check_ends(split),
    ]


def _check_targets(split: SplitFacts) -> list[Finding]:
    if split.num_without_target == 0:
        return []
    what = "token" if split.labels is None else "label"
    if split.num_emptied:
        hint = f"truncation removed every trained {what} of {_examples(split.num_emptied)}: "
        hint += "raise `task.max_length`, or write `task.too_long: drop`"
    elif split.labels is not None:
        hint = "check the column of the labels, `task.columns`"
    else:
        hint = (
            "check that these rows have an answer: a last turn of the assistant that is not empty"
        )
    if split.num_targets == 0:
        message = f"`{split.name}` trains nothing: none of its {_examples(split.num_examples)}"
        return [
            Finding(
                level="error",
                message=f"{message} has a {what} to learn",
                hint=hint,
                where=split.without_target,
            )
        ]
    part = _part(split.num_without_target, split.num_examples)
    return [
        Finding(
            level="warning",
            message=f"`{split.name}`: {part} have no {what} to learn, and teach nothing",
            hint=hint,
            where=split.without_target,
        )
    ]


def _check_truncation(split: SplitFacts, may_truncate: bool) -> list[Finding]:
    if split.num_truncated == 0:
        return []
    part = _part(split.num_truncated, split.num_examples)
    removed = f"{split.num_removed_tokens:,} tokens"
    learned = ""
    if split.labels is None:
        learned = f", {split.num_removed_targets:,} of them to be learned"
    if not may_truncate:
        return [
            Finding(
                level="error",
                message=f"`{split.name}`: {part} do not fit; "
                f"cutting them off would remove {removed}{learned}",
                hint="set `task.too_long` to `truncate` or `drop`, or raise `task.max_length` up "
                "to the model's context",
                where=split.truncated,
            )
        ]
    return [
        Finding(
            level="warning",
            message=f"`{split.name}`: {part} are cut off; {removed} were removed{learned}",
            hint="raise `task.max_length`, or write `task.too_long: drop`",
            where=split.truncated,
        )
    ]


def _check_unknown(split: SplitFacts) -> list[Finding]:
    unknown = split.unknown
    if unknown is None or unknown.share <= MAX_SHARE:
        return []
    return [
        Finding(
            level="warning",
            message=f"`{split.name}`: {_percent(unknown.share)} of the tokens are the unknown "
            "token: text that the model's tokenizer cannot write, which the model does not see",
            hint="use a model whose tokenizer has the script of the data, and check that the text "
            "is not garbled",
            where=unknown.where,
        )
    ]


def _check_duplicates(split: SplitFacts) -> list[Finding]:
    if split.num_duplicates == 0:
        return []
    return [
        Finding(
            level="warning" if split.num_duplicates > 0.05 * split.num_examples else "note",
            message=f"`{split.name}`: {_part(split.num_duplicates, split.num_examples)} "
            "repeat an earlier one exactly",
            hint="write `task.deduplicate: true` to train on each once",
            where=split.duplicates,
        )
    ]


def _check_contradictions(split: SplitFacts) -> list[Finding]:
    labels = split.labels
    if labels is None or labels.num_contradicting == 0:
        return []
    part = _part(labels.num_contradicting, split.num_examples)
    too_many = labels.num_contradicting >= CONTRADICTION_LIMIT * split.num_examples
    return [
        Finding(
            level="error" if too_many and split.name == TRAIN else "warning",
            message=f"`{split.name}`: {part} have the input of another one but not its label; "
            f"no model can be right on more than {_percent(labels.highest_accuracy, down=True)}",
            hint="keep one label for each input, and check that the text's column is the right one",
            where=labels.contradicting,
        )
    ]


def _check_ends(split: SplitFacts) -> list[Finding]:
    ends = split.end_of_turn
    if ends is None or split.name != TRAIN or ends.num_ending >= 0.5 * ends.num_sampled:
        return []
    never = ends.num_ending == 0
    part = "no example" if never else f"only {_part(ends.num_ending, ends.num_sampled)} looked at"
    return [
        Finding(
            level="warning",
            message=f"`{split.name}`: the end of the turn is trained in {part}; "
            f"the model will not learn to stop{'' if never else ' reliably'}",
            hint="use a chat template that ends each answer with the model's end token, and check "
            "that truncation does not remove it",
        )
    ]


def _check_labels_of_others(train: SplitFacts, splits: Sequence[SplitFacts]) -> list[Finding]:
    if train.labels is None or not train.labels.counts:
        return []
    findings = []
    known = train.labels.counts
    if len(known) == 1:
        findings.append(
            Finding(
                level="error",
                message=f"`{train.name}` has one label only, {_quoted(known)}",
                hint="give examples of at least two labels, and check the column, `task.columns`",
            )
        )
    for split in splits:
        counts = {} if split.labels is None else split.labels.counts
        unknown = [label for label in counts if label not in known]
        missing = [label for label in known if label not in counts]
        if unknown:
            findings.append(
                Finding(
                    level="error",
                    message=f"`{split.name}` has labels that `{train.name}` does not: "
                    + _quoted(unknown),
                    hint="correct their spelling, or give training examples of them",
                )
            )
        if missing and counts:
            findings.append(
                Finding(
                    level="note",
                    message=f"`{split.name}` has no example of {_quoted(missing)}",
                    hint="its metrics say nothing about these labels",
                )
            )
    return findings


def _size(overlap: OverlapFacts) -> int:
    return overlap.num_examples + overlap.num_inputs


def _leak(overlap: OverlapFacts) -> Finding:
    kinds = []
    if overlap.num_examples:
        kinds.append(f"{overlap.num_examples:,} whole")
    if overlap.num_inputs:
        kinds.append(f"{overlap.num_inputs:,} with the same input but another target")
    return Finding(
        level="warning",
        message=f"`{overlap.split}` shares {_examples(_size(overlap))} with `{overlap.other}`: "
        + ", ".join(kinds),
        hint=f"results on `{overlap.split}` will look better than they are; remove these rows "
        "from one of the two",
        where=overlap.rows,
    )


def _examples(count: int) -> str:
    return f"{count:,} example{'' if count == 1 else 's'}"


def _part(count: int, total: int) -> str:
    return f"{count:,} of {_examples(total)} ({_percent(count / total)})"


def _percent(share: float, *, down: bool = False) -> str:
    percent = 100 * share
    if 0 < percent < 0.1:
        return "less than 0.1%"
    if down:
        percent = int(percent * 10) / 10
    return f"{percent:.1f}%"


def _quoted(labels: Collection[str]) -> str:
    shown = ", ".join(f"`{label}`" for label in list(labels)[:NUM_SHOWN])
    more = len(labels) - NUM_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
