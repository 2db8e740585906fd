"""The manifest of a prepared corpus: what it was made of, what stages removed, what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fulltune.data.corpus import CorpusConfig
from fulltune.data.corpus_counts import Amount, Removed, Tally
from fulltune.data.corpus_shards import EVALUATION, EXACT, NEAR, Written

KIND = "fulltune corpus"


@dataclass(frozen=True)
class Stage:
    """One line of the table at the end."""

    name: str
    documents_in: int
    removed: Amount
    reasons: dict[str, int]
    examples: list[str]
    changed: int = 0
    """Documents that were changed and kept."""


def make_manifest(
    config: CorpusConfig,
    plan: dict[str, Any],
    tally: Tally,
    written: Written,
    evaluation: list[dict[str, Any]],
) -> dict[str, Any]:
    """All that is known of a corpus: sources, settings, what each stage removed, and its files."""
    stages = _list_stages(config, tally, written)
    holding = written.removed[EVALUATION].reasons
    return {
        "kind": KIND,
        "version": plan["version"],
        "sources": [
            {"source": source, "fingerprint": fingerprint, **asdict(tally.read[source])}
            for source, fingerprint in plan["sources"].items()
        ],
        "evaluation": [
            {
                **part,
                "fingerprint": plan["evaluation"][part["source"]],
                "documents_removed": holding.get(part["source"], 0),
            }
            for part in evaluation
        ],
        "settings": plan["settings"],
        "read": asdict(sum_of(tally.read.values())),
        "stages": [asdict(stage) for stage in stages],
        "splits": {
            split: {
                **asdict(written.amount(split)),
                "shards": [
                    {"file": shard.file, **asdict(shard.amount), "sha256": shard.sha256}
                    for shard in shards
                ],
            }
            for split, shards in written.shards.items()
        },
    }


def _list_stages(config: CorpusConfig, tally: Tally, written: Written) -> list[Stage]:
    left = sum_of(tally.read.values()).documents
    stages = []
    steps: Sequence[tuple[str, bool, Removed]] = (
        ("binary", config.binary == "drop", tally.binary),
        ("length", True, tally.length),
        ("language", config.languages is not None, tally.language),
        (EXACT, config.exact_duplicates, written.removed[EXACT]),
        (NEAR, config.near_duplicates.threshold is not None, written.removed[NEAR]),
        (EVALUATION, bool(config.decontaminate.against), written.removed[EVALUATION]),
    )
    for name, wanted, removed in steps:
        if wanted:
            reasons = dict(sorted(removed.reasons.items()))
            stages.append(Stage(name, left, removed.amount, reasons, removed.examples))
            left -= removed.amount.documents
        if name == "binary":  # what it leaves is cleaned, and then filtered
            changes = dict(sorted(tally.changes.items()))
            stages.append(
                Stage(
                    "cleaning", left, tally.cleaned_away, changes, tally.changed_examples,
                    tally.changed,
                )
            )  # fmt: skip
    return stages


def sum_of(amounts: Iterable[Amount]) -> Amount:
    """All amounts as one."""
    total = Amount()
    for amount in amounts:
        total.merge(amount)
    return total
