"""Answers out of contexts: the windows of a question put together, for evaluation and `predict`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import QuestionExample
from fulltune.errors import DataError
from fulltune.inference.batches import score_examples
from fulltune.objectives.answer_spans import NUM_SPANS, Span, WindowOutput
from fulltune.objectives.question_answering import QuestionAnswering

NUM_SHOWN = 5
"""Best spans that a prediction shows."""

NO_ANSWER_ABOVE = 0.5
"""A question has no answer where that is likelier than the best span of its context."""


@dataclass(frozen=True)
class FoundAnswer:
    """What a context answers to a question."""

    spans: tuple[Span, ...]
    """The likeliest of all windows, best first."""
    no_answer_score: float
    """As `Span.score`: that the context does not answer."""
    may_be_none: bool
    """Whether the model was trained on questions without an answer."""

    @property
    def best(self) -> Span | None:
        """The likeliest span, whether or not it is the answer; None if all windows are space."""
        return self.spans[0] if self.spans else None

    @property
    def no_answer_probability(self) -> float:
        """Of no answer against the best span alone: SQuAD 2.0's threshold is one on this."""
        if self.best is None:
            return 1.0
        return _sigmoid(self.no_answer_score - self.best.score)

    @property
    def text(self) -> str:
        """The answer; empty where there is none."""
        is_none = self.may_be_none and self.no_answer_probability > NO_ANSWER_ABOVE
        return "" if self.best is None or is_none else self.best.text

    def as_json(self) -> dict[str, Any]:
        """The answer, its characters in the context and its probability, and the best others.

        The probabilities are shares among the best spans, and no answer where that may be.
        """
        entries = [_entry(span.text, span.begin, span.end, span.score) for span in self.spans]
        if self.may_be_none or not entries:
            entries.append(_entry("", None, None, self.no_answer_score))
        entries.sort(key=lambda entry: -entry["score"])  # of equals, a span is first
        highest = entries[0]["score"]
        total = sum(math.exp(entry["score"] - highest) for entry in entries)
        for entry in entries:
            entry["score"] = math.exp(entry["score"] - highest) / total
        return {**entries[0], "n_best": entries[:NUM_SHOWN]}


def _entry(text: str, start: int | None, end: int | None, score: float) -> dict[str, Any]:
    return {"answer": text, "start": start, "end": end, "score": score}


def combine_windows(outputs: Sequence[WindowOutput], *, may_be_none: bool) -> FoundAnswer:
    """The answer to one question from all its windows.

    A span that two windows share has the better of its scores. Scores are logarithms of
    probabilities within a window, so those of unlike windows can be compared: a window without
    the answer gives most of its probability to its marker. That there is no answer at all is
    scored by the window that is the least sure of it.

    Args:
        outputs: of the windows of the question.
        may_be_none: whether the model was trained on questions without an answer.
    """
    best: dict[tuple[int, int], Span] = {}
    for span in (span for output in outputs for span in output.spans):
        place = (span.begin, span.end)
        if place not in best or best[place].score < span.score:
            best[place] = span
    spans = sorted(best.values(), key=lambda span: (-span.score, span.begin, span.end))
    no_answer_score = min(output.no_answer_score for output in outputs)
    return FoundAnswer(tuple(spans[:NUM_SPANS]), no_answer_score, may_be_none)


def _sigmoid(value: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))


def windows_by_question(outputs: Iterable[WindowOutput]) -> list[list[WindowOutput]]:
    """The windows of each question, in the order in which questions first occur."""
    questions: dict[str, list[WindowOutput]] = {}
    for output in outputs:
        questions.setdefault(output.question, []).append(output)
    return list(questions.values())


def answer_questions(
    model: PreTrainedModel,
    objective: QuestionAnswering,
    examples: Sequence[QuestionExample],
    *,
    batch_tokens: int = 8192,
) -> list[FoundAnswer]:
    """Answer questions out of their contexts, in their order.

    Args:
        model: a model with a head for question answering.
        objective: how questions become windows, and windows spans.
        examples: what to answer; their own answers are not looked at.
        batch_tokens: most tokens in a batch, padding included.

    Raises:
        DataError: a question is too long.
    """
    encoded: list[EncodedExample] = []
    ends = [0]
    for example in examples:
        windows = objective.encode(example)
        if not windows:
            raise DataError(
                f"{example.where}: the question is too long for its context, and was dropped",
                hint="set `task.too_long=truncate`, or shorten the question",
            )
        encoded += windows
        ends.append(len(encoded))
    outputs = score_examples(model, objective, encoded, batch_tokens=batch_tokens)
    return [
        combine_windows(outputs[begin:end], may_be_none=objective.no_answer)
        for begin, end in pairwise(ends)
    ]
