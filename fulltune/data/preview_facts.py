"""What is counted of the data before training, and what is found in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fulltune.data.padding import PaddingFacts
from fulltune.data.tasks import Supervision
from fulltune.data.unknown_tokens import UnknownFacts

TRAIN = "train"
"""The name of the split that is trained on; all others are held out."""

NUM_SHOWN = 5
"""Rows named as examples of a finding."""


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
    first_rows: dict[str, str] = Field(default_factory=dict)
    """Where each of them stands first."""
    num_contradicting: int
    """Examples whose input stands in the split under another label too."""
    contradicting: tuple[str, ...]
    highest_accuracy: float
    """What a model can reach at most that gives every input one answer."""


class NumberFacts(_Facts):
    """The numbers that a split's examples are to give."""

    lowest: float
    mean: float
    deviation: float
    highest: float


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
    numbers: NumberFacts | None = None
    """Regression; None where the split is empty."""
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
    """In all tokens of these; with fill-in-the-middle, those that it adds are among them."""


class PreviewFacts(_Facts):
    """What is trained on, as counted."""

    supervision: Supervision
    splits: tuple[SplitFacts, ...]
    overlaps: tuple[OverlapFacts, ...]
    padding: PaddingFacts | None = None
    """None for a model that packs its examples, which needs none."""
    arranged: tuple[ArrangedFacts, ...] = ()
    """Pre-training: what the documents, which `splits` counts, became."""
    documents_end: bool = True
    """Whether each is followed by an end token, by which the model learns where a text ends."""
    tags: bool = False
    """Whether the labels are tags of words, in IOB2, and not of whole examples."""


class Finding(_Facts):
    """Something to know about the data before training on it."""

    level: Literal["error", "warning", "note"]
    message: str
    hint: str
    where: tuple[str, ...] = ()


def to_json(facts: PreviewFacts, findings: Sequence[Finding]) -> str:
    """Facts and findings as indented JSON; `PreviewFacts.model_validate` reads ``facts`` back."""
    document: dict[str, Any] = {
        "facts": facts.model_dump(mode="json"),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }
    return json.dumps(document, ensure_ascii=False, indent=2)
