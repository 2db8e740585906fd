"""Whether data can be trained on: `check` judges what was counted, `require_sound` stops a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fulltune.data.preview_facts import (
    NUM_SHOWN,
    TRAIN,
    Finding,
    OverlapFacts,
    PreviewFacts,
    SplitFacts,
)
from fulltune.data.tags import complete_tags
from fulltune.data.unknown_tokens import MAX_SHARE
from fulltune.errors import DataError

CONTRADICTION_LIMIT = 0.1
"""Share of training examples under contradicting labels from which a run does not start. People who
annotate disagree on a few per cent; more is a wrong column, or several votes for each text."""


def check(facts: PreviewFacts, *, may_truncate: bool = True) -> list[Finding]:
    """Judge what was counted: errors, then warnings, then notes.

    Args:
        facts: from `examine`.
        may_truncate: whether cutting off examples was asked for; an error otherwise.
    """
    findings = [finding for split in facts.splits for finding in _check_split(split, may_truncate)]
    train = next((split for split in facts.splits if split.name == TRAIN), None)
    if train is not None:
        findings += _check_labels_of_others(train, facts.splits, tags=facts.tags)
    if not facts.documents_end:
        findings.append(_NO_END_TOKEN)
    findings += [_leak(overlap) for overlap in facts.overlaps if _size(overlap)]
    levels = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: levels.index(finding.level))


_NO_END_TOKEN = Finding(
    level="warning",
    message="the tokenizer has no `eos_token`, so that the model does not learn where a text ends",
    hint="name the token in tokenizer_config.json",
)


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


def _check_labels_of_others(
    train: SplitFacts, splits: Sequence[SplitFacts], *, tags: bool
) -> list[Finding]:
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
        if tags:  # a model has `O`, and both tags of each label
            of_model = complete_tags(known)
            unknown = [label for label in unknown if label not in of_model]
        missing = [label for label in known if label not in counts]
        if unknown:
            findings.append(
                Finding(
                    level="error",
                    message=f"`{split.name}` has labels that `{train.name}` does not: "
                    + _quoted(unknown),
                    hint="correct their spelling, or give training examples of them",
                    where=tuple(
                        split.labels.first_rows[label]
                        for label in unknown[:NUM_SHOWN]
                        if split.labels is not None and label in split.labels.first_rows
                    ),
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
