"""The preview for people: facts as rows, examples by token, and all of it in the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fulltune.data.preview_facts import TRAIN, Finding, PreviewFacts, SplitFacts
from fulltune.data.tasks import Supervision

TokenState: TypeAlias = Literal[
    "trained", "replaced", "outside", "entity", "label", "context", "truncated", "padding"
]

MEANINGS: dict[TokenState, str] = {
    "trained": "trained",
    "replaced": "read in place of what follows it",
    "outside": "in no entity",
    "entity": "entity: a tag is trained at the first token of each word",
    "label": "its label",
    "context": "read, not trained",
    "truncated": "removed by truncation",
    "padding": "padding",
}

NUM_LABELS = 20
"""Labels shown with their counts."""

MAX_CHARACTER_TOKENS = 8
"""Most tokens that one readable piece is made of. A character has four bytes at most, but a token
may end one character and begin the next."""


@dataclass(frozen=True, slots=True)
class TokenView:
    """A token, or the few tokens that make one character, as readable text."""

    text: str
    state: TokenState


@dataclass(frozen=True, slots=True)
class SampleView:
    """An example to be shown by token."""

    where: str
    label: str | None
    tokens: list[TokenView]


def view_tokens(
    decode: Callable[[list[int]], str],
    input_ids: Sequence[int],
    targets: Sequence[int],
    num_kept: int,
) -> list[TokenView]:
    """Tokens as text, those that are parts of one UTF-8 character joined.

    Args:
        decode: the tokenizer's, keeping special tokens and not cleaning up spaces.
        input_ids: tokens of the example, before truncation.
        targets: 1 where the token is trained, as long as `input_ids`.
        num_kept: how many tokens truncation keeps; the rest is shown as removed.
    """
    states: list[TokenState] = [
        "truncated" if place >= num_kept else "trained" if target else "context"
        for place, target in enumerate(targets)
    ]
    return view_states(decode, input_ids, states)


def view_states(
    decode: Callable[[list[int]], str],
    input_ids: Sequence[int],
    states: Sequence[TokenState],
    *,
    before: Sequence[int] = (),
) -> list[TokenView]:
    """Tokens of given states as text, those that are parts of one UTF-8 character joined.

    Args:
        decode: as in `view_tokens`.
        input_ids: tokens in the order in which they are shown.
        states: one for each. Of the parts of a character, one that is trained decides, else the
            first.
        before: the tokens in front of them, which are not shown.
    """
    ids = [int(token) for token in input_ids]
    views: list[TokenView] = []
    before = list(before)
    start = 0
    while start < len(ids):
        stop = _end_of_character(decode, ids, before, start)
        piece = ids[start:stop]
        state = states[start]
        if state == "context" and "trained" in states[start:stop]:
            state = "trained"
        views.append(TokenView(_text_after(decode, before, piece), state))
        before, start = piece, stop
    return views


def _end_of_character(
    decode: Callable[[list[int]], str], ids: list[int], before: list[int], start: int
) -> int:
    """Where the text from `start` first ends with a whole character."""
    for stop in range(start + 1, min(start + MAX_CHARACTER_TOKENS, len(ids)) + 1):
        if not _text_after(decode, before, ids[start:stop]).endswith("\ufffd"):
            return stop
    return start + 1  # bytes that are no UTF-8, or that truncation has cut


def _text_after(decode: Callable[[list[int]], str], before: list[int], piece: list[int]) -> str:
    """The text of a piece where it stands: some tokenizers decode a leading space only then."""
    context, text = decode(before), decode(before + piece)
    return text[len(context) :] if text.startswith(context) else decode(piece)


def visible(text: str) -> str:
    """Text with nothing hidden in it: line ends, control and invisible characters are shown."""
    return "".join(_VISIBLE.get(character) or _escape(character) for character in text)


_VISIBLE = {
    "\n": "⏎\n",
    "\t": "⇥\t",
    "\u200c": "\u200c",
    "\u200d": "\u200d",
}  # joiners shape letters


def _escape(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one state; what is left out in their middle is said."""

    state: TokenState
    pieces: list[str]
    num_omitted: int
    tail: list[str]


def runs_of(tokens: Sequence[TokenView], *, limit: int) -> list[Run]:
    """Runs of tokens, long ones shortened in the middle so that every boundary is seen."""
    runs = []
    for state, members in groupby(tokens, key=lambda token: token.state):
        pieces = [visible(token.text) for token in members]
        shown = 1 if state == "padding" else limit
        if len(pieces) <= shown:
            runs.append(Run(state, pieces, 0, []))
        else:
            head, tail = (shown + 1) // 2, shown // 2
            omitted = len(pieces) - head - tail
            runs.append(Run(state, pieces[:head], omitted, pieces[len(pieces) - tail :]))
    return runs


# -- facts as rows ---------------------------------------------------------------------------------


WITH_TARGET: dict[Supervision, str] = {
    "tokens": "trained tokens",
    "labels": "with a label",
    "numbers": "with a score",
}


def rows_of(facts: PreviewFacts) -> list[tuple[str, list[str]]]:
    """Name and one value for each split, in the order of reading."""
    splits = facts.splits
    by_label = facts.supervision == "labels"
    rows = [
        (
            "documents" if facts.arranged else "examples",
            [f"{split.num_examples:,}" for split in splits],
        ),
        ("tokens", [f"{split.num_tokens:,}" for split in splits]),
    ]
    if not facts.arranged:
        rows += [
            (
                WITH_TARGET[facts.supervision],
                [f"{split.num_targets:,} ({split.target_share:.1%})" for split in splits],
            ),
            ("nothing to learn", [_count(split.num_without_target) for split in splits]),
            ("truncated", [_count(split.num_truncated) for split in splits]),
        ]
    if any(split.num_truncated for split in splits):
        rows.append(("  tokens removed", [_count(split.num_removed_tokens) for split in splits]))
    if any(split.num_removed_targets for split in splits):
        rows.append(("  targets removed", [_count(split.num_removed_targets) for split in splits]))
    if any(split.unknown for split in splits):
        rows.append(("unknown tokens", [_unknown(split) for split in splits]))
    rows += [
        ("length: median", [_length(split, "median") for split in splits]),
        ("  90 of 100 within", [_length(split, "p90") for split in splits]),
        ("  99 of 100 within", [_length(split, "p99") for split in splits]),
        ("  longest", [_length(split, "longest") for split in splits]),
        ("duplicates", [_count(split.num_duplicates) for split in splits]),
    ]
    if by_label:
        rows.append(
            (
                "contradicting labels",
                [_count(split.labels.num_contradicting if split.labels else 0) for split in splits],
            )
        )
    if any(split.numbers for split in splits):
        rows.append(("scores", [_numbers(split) for split in splits]))
    if facts.padding is not None:
        share = f"{facts.padding.share:.1%} of a forward pass"
        rows.append(("padding", [share if split.name == TRAIN else "" for split in splits]))
    if any(split.end_of_turn for split in splits):
        rows.append(("end of turn trained", [_ends(split) for split in splits]))
    for other in dict.fromkeys(overlap.other for overlap in facts.overlaps):
        shared = {
            overlap.split: overlap.num_examples + overlap.num_inputs
            for overlap in facts.overlaps
            if overlap.other == other
        }
        cells = [_count(shared[split.name]) if split.name in shared else "" for split in splits]
        rows.append((f"also in {other}", cells))
    return rows


def arranged_rows_of(facts: PreviewFacts) -> list[tuple[str, list[str]]]:
    """What pre-training makes of the documents, one value for each split."""
    splits = facts.arranged
    return [
        ("examples", [f"{split.num_examples:,}" for split in splits]),
        ("tokens", [f"{split.num_tokens:,}" for split in splits]),
        ("longest", [f"{split.longest:,}" for split in splits]),
        (
            "predicted tokens",
            [
                f"{split.predicted_share:.1%} (of {split.num_counted:,} examples)"
                for split in splits
            ],
        ),
    ]


def label_rows_of(facts: PreviewFacts) -> tuple[list[tuple[str, list[str]]], int]:
    """Labels with their counts, the most frequent first, and how many are not shown."""
    counts = [split.labels.counts if split.labels else {} for split in facts.splits]
    totals: dict[str, int] = {}
    for count in counts:
        for label, number in count.items():
            totals[label] = totals.get(label, 0) + number
    labels = sorted(totals, key=lambda label: -totals[label])
    rows = [
        (visible(label), [_share_of(count.get(label, 0), sum(count.values())) for count in counts])
        for label in labels[:NUM_LABELS]
    ]
    return rows, len(labels) - len(rows)


def _numbers(split: SplitFacts) -> str:
    numbers = split.numbers
    if numbers is None:
        return "none"
    shown = f"{numbers.lowest:.4g} to {numbers.highest:.4g}, mean {numbers.mean:.4g}"
    return f"{shown} ± {numbers.deviation:.4g}"


def _count(number: int) -> str:
    return f"{number:,}" if number else "none"


def _length(split: SplitFacts, name: str) -> str:
    return f"{getattr(split.lengths, name):,}" if split.lengths else "none"


def _ends(split: SplitFacts) -> str:
    ends = split.end_of_turn
    return f"{ends.num_ending / ends.num_sampled:.1%}" if ends else "none"


def _unknown(split: SplitFacts) -> str:
    unknown = split.unknown
    if unknown is None or not unknown.num_unknown:
        return "none"
    rows = unknown.num_sampled
    read = f" in {rows:,} examples read" if rows < split.num_examples else ""
    return f"{unknown.num_unknown:,} ({unknown.share:.1%}){read}"


def _share_of(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})" if number else "none"


# -- terminal --------------------------------------------------------------------------------------

_STYLES: dict[TokenState, str] = {
    "trained": "green underline",
    "replaced": "magenta",
    "outside": "green",
    "entity": "bold cyan underline",
    "label": "magenta",
    "context": "dim",
    "truncated": "red strike",
    "padding": "dim italic",
}
_MARKS: dict[TokenState, tuple[str, str]] = {
    "trained": ("⟦", "⟧"),
    "replaced": ("⟨", "⟩"),
    "outside": ("", ""),
    "entity": ("⟦", ""),
    "label": ("", "⟧"),
    "context": ("", ""),
    "truncated": ("~~", "~~"),
    "padding": ("", ""),
}
_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_TERMINAL_RUN = 160


def render_terminal(
    facts: PreviewFacts,
    findings: Sequence[Finding],
    samples: Sequence[SampleView],
    console: Console,
) -> None:
    """Print the preview. Without colours, brackets stand for them."""
    marked = console.no_color or not console.is_terminal
    names = [split.name for split in facts.splits]
    console.print(_table("", names, rows_of(facts)))
    if facts.arranged:
        arranged = [split.name for split in facts.arranged]
        console.print(_table("for the model", arranged, arranged_rows_of(facts)))
    label_rows, num_more = label_rows_of(facts)
    if label_rows:
        console.print(_table("label", names, label_rows))
    if num_more:
        console.print(Text(f"and {num_more:,} more labels", style="dim"))
    for finding in findings:
        _print_finding(finding, console)
    if not findings:
        console.print("nothing to object to\n")
    if samples:
        console.print(_legend(samples, marked))
    for sample in samples:
        title = Text(visible(sample.where))
        if sample.label is not None:
            title.append(" → ").append(visible(sample.label), style="green underline")
        body = Text(overflow="fold")
        for run in runs_of(sample.tokens, limit=_TERMINAL_RUN):
            _append_run(body, run, marked)
        body.rstrip()  # a last line end is shown by its sign already
        console.print(Panel(body, title=title, title_align="left", border_style="dim"))


def _table(first: str, names: Sequence[str], rows: list[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(first, style="bold")
    for name in names:
        table.add_column(Text(visible(name)), justify="right")
    for name, values in rows:
        table.add_row(
            Text(name), *(Text(value, style="dim" if value == "none" else "") for value in values)
        )
    table.add_row()
    return table


def _print_finding(finding: Finding, console: Console) -> None:
    message = Text().append(f"{finding.level}: ", style=_LEVEL_STYLES[finding.level])
    console.print(message.append(visible(finding.message)))
    details = Text()
    if finding.where:
        details.append(f"rows: {visible('; '.join(finding.where))}\n", style="dim")
    details.append(f"hint: {visible(finding.hint)}")
    console.print(Padding(details, (0, 0, 1, 2), expand=False))


def _legend(samples: Sequence[SampleView], marked: bool) -> Text:
    text = Text()
    for state in states_of(samples):
        opening, closing = _MARKS[state] if marked else ("", "")
        text.append(f"{opening}{MEANINGS[state]}{closing}", style=_STYLES[state]).append("   ")
    return text


def states_of(samples: Sequence[SampleView]) -> list[TokenState]:
    """The states that occur, in the order in which they are explained."""
    used = {token.state for sample in samples for token in sample.tokens}
    return [state for state in MEANINGS if state in used]


def _append_run(text: Text, run: Run, marked: bool) -> None:
    opening, closing = _MARKS[run.state] if marked else ("", "")
    text.append(opening)
    text.append("".join(run.pieces), style=_STYLES[run.state])
    if run.num_omitted:
        text.append(f" [… {run.num_omitted:,} more tokens …] ", style="bold")
    text.append("".join(run.tail), style=_STYLES[run.state])
    text.append(closing)
