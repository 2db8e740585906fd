"""How well questions are answered: their windows put together, then SQuAD's rules."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fulltune.errors import DataError
from fulltune.evaluate.squad import AnswerScore, best_threshold, score_answer
from fulltune.inference import combine_windows, windows_by_question
from fulltune.objectives.answer_spans import WindowOutput
from fulltune.objectives.question_answering import QuestionAnswering


def answer_metrics(objective: QuestionAnswering, outputs: Sequence[WindowOutput]) -> dict[str, Any]:
    """Exact match, F1 and loss of answers that are known to be right or wrong.

    Args:
        objective: says whether a question may have no answer, and what F1 counts.
        outputs: of all windows of the questions, in any order.

    Returns:
        Numbers under the names of `METRICS`, and `num_questions`. Where a question may have no
        answer, also `has_answer` and `no_answer`, the same metrics of either kind of question, and
        `best_f1` and `best_exact_match` with the thresholds on the probability of no answer that
        give them, as SQuAD 2.0's script looks for them.

    Raises:
        DataError: a question's right answer is not known.
    """
    questions = windows_by_question(outputs)
    found = [combine_windows(windows, may_be_none=objective.no_answer) for windows in questions]
    references: list[list[str]] = []
    for windows in questions:
        if windows[0].answers is None:
            raise DataError("the right answers are not known", hint="give rows with answers")
        references.append(windows[0].answers)

    def scored(texts: Sequence[str]) -> list[AnswerScore]:
        return [
            score_answer(text, right, units=objective.answer_units)
            for text, right in zip(texts, references, strict=True)
        ]

    scores = scored([answer.text for answer in found])
    measured: dict[str, Any] = {
        **_means(scores),
        "loss": statistics.fmean(output.loss for output in outputs),
        "num_questions": len(questions),
    }
    if not objective.no_answer:
        return measured
    has_answer = [bool(right) for right in references]
    for name, kind in (("has_answer", True), ("no_answer", False)):
        chosen = [score for score, has in zip(scores, has_answer, strict=True) if has == kind]
        if chosen:
            measured[name] = {**_means(chosen), "num_questions": len(chosen)}
    texts = [answer.best.text if answer.best else "" for answer in found]
    answered = scored(texts)
    probabilities = [answer.no_answer_probability for answer in found]
    for name in ("f1", "exact_match"):
        best = best_threshold(
            [getattr(score, name) for score in answered], probabilities, texts, has_answer
        )
        measured[f"best_{name}"] = best.score
        measured[f"best_{name}_threshold"] = best.threshold
    return measured


def _means(scores: Sequence[AnswerScore]) -> dict[str, float]:
    return {
        "f1": statistics.fmean(score.f1 for score in scores),
        "exact_match": statistics.fmean(score.exact_match for score in scores),
    }
