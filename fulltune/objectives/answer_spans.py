"""Spans of a context: what maps a window's tokens back to characters, and the likeliest spans.

Shape suffixes: D windows, L longest window, N lengths of a span.
"""

from __future__ import annotations

import json
from typing import NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.tasks import QuestionExample
from fulltune.objectives.question_windows import Window

NUM_SPANS = 20
"""Best spans kept of a window, BERT's `n_best_size`."""


class Reference(TypedDict):
    """What maps a window's tokens back to its context, and what is right; kept as JSON.

    question: the same for all windows of a question, and for no other question.
    id:       the data's own name of the question.
    answers:  the right answers, none where there is none; null when only predicting.
    text:     the part of the context that the window holds.
    begin:    the character of the context where ``text`` begins.
    first:    the place of the context's first token in the window.
    begins, ends: of each context token, counted in ``text``.
    """

    question: str
    id: str | None
    answers: list[str] | None
    text: str
    begin: int
    first: int
    begins: list[int]
    ends: list[int]


class Span(NamedTuple):
    """A piece of a context."""

    begin: int
    """Its first character in the whole context."""
    end: int
    text: str
    score: float
    """Logarithm of the window's probability of its first token times that of its last."""


class WindowOutput(NamedTuple):
    """What came out for one window."""

    question: str
    """See `Reference`."""
    answers: list[str] | None
    """The right ones; None when only predicting."""
    spans: list[Span]
    """The likeliest, best first."""
    no_answer_score: float
    """As `Span.score`, of the marker: that the answer is not in this window."""
    loss: float
    """In nats; not a number when only predicting."""


def make_reference(
    example: QuestionExample, window: Window, question: str, answers: list[str] | None
) -> str:
    """The `Reference` of a window as JSON.

    Args:
        example: the question.
        window: a part of its context.
        question: see `Reference`.
        answers: likewise.
    """
    begin, end = min(window.begins), max(window.ends)
    reference = Reference(
        question=question,
        id=example.id,
        answers=answers,
        text=example.context[begin:end],
        begin=begin,
        first=window.first,
        begins=[place - begin for place in window.begins],
        ends=[place - begin for place in window.ends],
    )
    return json.dumps(reference, ensure_ascii=False, separators=(",", ":"))


def read_reference(text: str) -> Reference:
    """What `EncodedExample.reference` says of a window."""
    return cast(Reference, json.loads(text))


def best_spans(
    scores_DL2: Tensor, *, longest: int, count: int = NUM_SPANS
) -> list[list[tuple[int, int, float]]]:
    """The spans of the highest scores of each window: first token, last token, score.

    All spans are compared, not only those of the best first and last tokens.

    Args:
        scores_DL2: float32 [D, L, 2], minus infinity where no span may begin or end.
        longest: tokens of the longest span.
        count: spans of a window.
    """
    starts_DL, ends_DL = scores_DL2.unbind(-1)
    longest = min(longest, scores_DL2.shape[1])
    # Of each first token, the last tokens that it may have.
    ends_DLN = F.pad(ends_DL, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    sums_DN = (starts_DL[:, :, None] + ends_DLN).flatten(1)
    best = sums_DN.topk(min(count, sums_DN.shape[1]), dim=1)
    return [
        [
            (place // longest, place // longest + place % longest, score)
            for place, score in zip(places, scores, strict=True)
            if score > -torch.inf
        ]
        for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def window_output(
    reference: Reference,
    found: list[tuple[int, int, float]],
    no_answer_score: float,
    loss: float,
) -> WindowOutput:
    """What came out for one window, in characters.

    Args:
        reference: of the window.
        found: what `best_spans` found, in its tokens.
        no_answer_score: see `WindowOutput`.
        loss: likewise.
    """
    spans = []
    for first, last, score in found:
        begin = reference["begins"][first - reference["first"]]
        end = reference["ends"][last - reference["first"]]
        if end <= begin:
            continue  # nothing but space
        shift = reference["begin"]
        spans.append(Span(shift + begin, shift + end, reference["text"][begin:end], score))
    return WindowOutput(reference["question"], reference["answers"], spans, no_answer_score, loss)
