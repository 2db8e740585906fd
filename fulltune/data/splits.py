"""Training and validation from one source, so that no input is on both sides.

A split depends on the content of the examples and the seed alone: not on the order of the rows, and
it changes little when rows are added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fulltune.config import has_wrong_comma
from fulltune.data.tasks import TaskKind
from fulltune.errors import ConfigError

Int64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShareOfTrain:
    """A share of the training data, between 0 and 1."""

    share: float


@dataclass(frozen=True, slots=True)
class CountOfTrain:
    """So many examples of the training data."""

    num_examples: int


@dataclass(frozen=True, slots=True)
class Source:
    """Data of its own, as for `read_records`."""

    source: str


class Split(NamedTuple):
    """Indices of one data set, each side in ascending order."""

    train: Int64Array
    validation: Int64Array
    note: str | None
    """What the user must know about how it was split."""


class Splittable(Protocol):
    """What is needed of an `EncodedDataset`."""

    kind: TaskKind
    input_hashes: Int64Array
    example_hashes: Int64Array


def parse_validation(
    text: str, *, setting: str = "task.validation"
) -> ShareOfTrain | CountOfTrain | Source:
    """Read the setting of this name: `5%`, `500 examples`, or a source."""
    text = text.strip()
    match = re.fullmatch(r"([\d_.]*,[\d_.,]*)\s*(%|examples?)", text)
    if match and (match[2] == "%" or has_wrong_comma(match[1])):
        raise ConfigError(
            f"`{setting}` is `{text}`, and a comma only parts thousands",
            hint="write `0.5%`, `500 examples`, or a file",
        )
    if match := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", text):
        share = float(match[1]) / 100
        if not 0 < share < 1:
            raise ConfigError(
                f"`{setting}` is `{text}`, and both sides need examples",
                hint="give a share between 0% and 100%, or null for no validation",
            )
        return ShareOfTrain(share)
    if match := re.fullmatch(r"(\d[\d_,]*)\s*examples?", text):
        count = int(re.sub("[_,]", "", match[1]))
        if count == 0:
            raise ConfigError(f"`{setting}` is `0 examples`", hint="give null for no validation")
        return CountOfTrain(count)
    if not text or re.fullmatch(r"[-+.,_\d\s]*", text):
        raise ConfigError(
            f"`{setting}` is `{text}`, which says neither a share nor a number nor a source",
            hint="write `5%`, `500 examples`, or a file",
        )
    return Source(text)


def split_dataset(dataset: Splittable, validation: str | None, *, seed: int) -> Split:
    """Set aside validation examples; equal inputs stay on one side.

    Args:
        dataset: an `EncodedDataset`.
        validation: the setting; with null or a source of its own everything is for training.
        seed: another seed gives another split.

    Raises:
        ConfigError: one side would be empty.
    """
    num_examples = len(dataset.input_hashes)
    everything = np.arange(num_examples, dtype=np.int64)
    wanted = parse_validation(validation) if validation is not None else None
    if wanted is None or isinstance(wanted, Source):
        return Split(everything, everything[:0], None)
    if isinstance(wanted, ShareOfTrain):
        count = max(1, round(wanted.share * num_examples))
    else:
        count = wanted.num_examples
    if count >= num_examples:
        raise ConfigError(
            f"`task.validation` is `{validation}`, which leaves none of the {num_examples} "
            f"example{'s' if num_examples > 1 else ''} for training",
            hint="give less, more data, or null for no validation",
        )
    chosen = _choose(dataset.input_hashes, count, seed)
    note = None
    if dataset.kind == "text" and not count / 2 <= chosen.sum() <= count * 2:
        # A corpus of one or a few long documents: what matters is that windows do not repeat.
        chosen = _choose(dataset.example_hashes, count, seed)
        note = (
            "the documents are too few or too long to set some aside whole, so that windows of the "
            "same document are in training and in validation; name a file for `task.validation` to "
            "measure on unseen documents"
        )
    if not chosen.any() or chosen.all():
        raise ConfigError(
            f"`task.validation` is `{validation}`, but all {num_examples} examples have the same "
            "input, which cannot be on both sides",
            hint="name a file of its own for validation, or null for none",
        )
    return Split(everything[~chosen], everything[chosen], note)


def _choose(hashes: Int64Array, count: int, seed: int) -> npt.NDArray[Any]:
    """Whole groups of equal hashes in pseudo-random order until `count` examples are reached."""
    groups, group_of_example, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.argsort(_mix(groups.view(np.uint64), seed), kind="stable")
    chosen = np.zeros(len(groups), dtype=bool)
    if sizes.max() == 1:
        chosen[order[:count]] = True
        return chosen[group_of_example]
    num_left = count
    for group in order:
        if sizes[group] <= num_left:
            chosen[group] = True
            num_left -= int(sizes[group])
            if num_left == 0:
                break
    if not chosen.any() and len(groups) > 1:
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen[group_of_example]


def _mix(values: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele et al., 2014): every bit in moves every bit out."""
    mixed = values ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
