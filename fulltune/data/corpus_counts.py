"""What is counted while a corpus is prepared: how much was read, changed and removed, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from fulltune.data.binary import FileCount

NUM_EXAMPLES = 2
"""Removed documents of a stage that are named."""


@dataclass
class Amount:
    """How much text."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0

    def add(self, documents: int, characters: int, num_bytes: int) -> None:
        """Count more."""
        self.documents += documents
        self.characters += characters
        self.bytes += num_bytes

    def merge(self, other: Amount) -> None:
        """Count what another counted."""
        self.add(other.documents, other.characters, other.bytes)


def _count(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


@dataclass
class Removed:
    """What one stage removed, why, and an example or two."""

    amount: Amount = field(default_factory=Amount)
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, characters: int, num_bytes: int, where: str) -> None:
        """Count one document."""
        self.amount.add(1, characters, num_bytes)
        _count(self.reasons, {reason: 1})
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(where)

    def merge(self, other: Removed) -> None:
        """Count what was removed from a later chunk."""
        self.amount.merge(other.amount)
        _count(self.reasons, other.reasons)
        self.examples = (self.examples + other.examples)[:NUM_EXAMPLES]


@dataclass
class Tally:
    """What was read, changed and removed before documents are compared with each other."""

    read: dict[str, Amount] = field(default_factory=dict)
    changed: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    cleaned_away: Amount = field(default_factory=Amount)
    """Characters and bytes that cleaning took from documents."""
    changed_examples: list[str] = field(default_factory=list)
    binary: Removed = field(default_factory=Removed)
    length: Removed = field(default_factory=Removed)
    language: Removed = field(default_factory=Removed)
    files: dict[str, FileCount] = field(default_factory=dict)
    """Those that documents were read from, in order."""

    def add_change(
        self, changes: Sequence[str], characters: int, num_bytes: int, where: str
    ) -> None:
        """Count one document that cleaning changed, and what it took from it."""
        self.changed += 1
        _count(self.changes, dict.fromkeys(changes, 1))
        self.cleaned_away.add(0, characters, num_bytes)
        if len(self.changed_examples) < NUM_EXAMPLES:
            self.changed_examples.append(where)

    def merge(self, other: Tally) -> None:
        """Add the tally of a later chunk."""
        for source, amount in other.read.items():
            self.read.setdefault(source, Amount()).merge(amount)
        self.changed += other.changed
        _count(self.changes, other.changes)
        self.cleaned_away.merge(other.cleaned_away)
        self.changed_examples = (self.changed_examples + other.changed_examples)[:NUM_EXAMPLES]
        self.binary.merge(other.binary)
        self.length.merge(other.length)
        self.language.merge(other.language)
        for name, count in other.files.items():
            self.files.setdefault(name, FileCount()).merge(count)

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """What `to_json` wrote."""
        values = json.loads(text)

        def removed(name: str) -> Removed:
            part = values[name]
            return Removed(Amount(**part["amount"]), part["reasons"], part["examples"])

        return cls(
            {source: Amount(**amount) for source, amount in values["read"].items()},
            values["changed"],
            values["changes"],
            Amount(**values["cleaned_away"]),
            values["changed_examples"],
            removed("binary"),
            removed("length"),
            removed("language"),
            {
                name: FileCount(count["documents"], count["binary"], tuple(count["first"]))
                for name, count in values["files"].items()
            },
        )
