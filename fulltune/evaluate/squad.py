"""Exact match and F1 of extracted answers, by the rules of SQuAD's official script, or of CMRC's.

The rules of `evaluate-v2.0.py` (Rajpurkar et al., 2018), which on answerable questions are those of
version 1.1: lower case, without ASCII punctuation, without the articles a, an and the, white space
joined; an answer scores the best of its references; a question without a reference is right where
the answer is empty. Chinese has no spaces between words: the rules of CMRC 2018 (Cui et al., 2019)
take its characters as units.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fulltune.data.tasks import AnswerUnits

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# CMRC's own list: of ASCII it has only these.
_CMRC_PUNCTUATION = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
_NO_CMRC_PUNCTUATION = str.maketrans("", "", _CMRC_PUNCTUATION)
_CMRC_UNITS = re.compile(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How good one answer is, each number from 0 to 1."""

    exact_match: float
    f1: float


@dataclass(frozen=True, slots=True)
class Threshold:
    """The probability of no answer above which giving none scores best."""

    score: float
    """The mean score with it, from 0 to 1."""
    threshold: float


def normalize_answer(text: str) -> str:
    """An answer without what SQuAD's script does not count."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score_answer(
    answer: str, references: Sequence[str], *, units: AnswerUnits = "words"
) -> AnswerScore:
    """Exact match and F1 of an answer, each the best over the references.

    Args:
        answer: what was answered; empty where none was given.
        references: the right answers; none where the question has no answer.
        units: `words`, or `characters` for Chinese. Then exact match leaves CMRC's punctuation
            out, and F1 is that of the longest common run of units; other scripts than Chinese are
            cut into words and signs (CMRC's script asks NLTK, which differs in contractions).
    """
    normalize = normalize_answer if units == "words" else _normalize_characters
    golds = [reference for reference in references if normalize(reference)] or [""]
    overlap = _word_f1 if units == "words" else _character_f1
    return AnswerScore(
        exact_match=float(any(normalize(gold) == normalize(answer) for gold in golds)),
        f1=max(overlap(gold, answer) for gold in golds),
    )


def best_threshold(
    scores: Sequence[float],
    no_answer_probabilities: Sequence[float],
    answers: Sequence[str],
    has_answer: Sequence[bool],
) -> Threshold:
    """The threshold of SQuAD's script: above it, the answer is none.

    Args:
        scores: exact match or F1 of each answer, before any threshold.
        no_answer_probabilities: that each question has no answer.
        answers: what would be answered below the threshold.
        has_answer: whether each question has one.
    """
    current = float(sum(not each for each in has_answer))  # with no answer to any question
    best, threshold = current, 0.0
    order = sorted(range(len(scores)), key=lambda place: no_answer_probabilities[place])
    for place in order:
        if has_answer[place]:
            current += scores[place]
        elif answers[place]:
            current -= 1
        if current > best:
            best, threshold = current, no_answer_probabilities[place]
    return Threshold(best / len(scores), threshold)


def _word_f1(reference: str, answer: str) -> float:
    """F1 of the bags of words, the harmonic mean of their precision and recall."""
    expected, given = normalize_answer(reference).split(), normalize_answer(answer).split()
    if not expected or not given:
        return float(expected == given)
    return _f1((Counter(expected) & Counter(given)).total(), len(given), len(expected))


def _normalize_characters(text: str) -> str:
    return text.lower().strip().translate(_NO_CMRC_PUNCTUATION)


def _character_f1(reference: str, answer: str) -> float:
    expected = _CMRC_UNITS.findall(_normalize_characters(reference))
    given = _CMRC_UNITS.findall(_normalize_characters(answer))
    if not expected or not given:
        return float(expected == given)
    return _f1(_longest_common_run(expected, given), len(given), len(expected))


def _f1(num_common: int, num_given: int, num_expected: int) -> float:
    if not num_common:
        return 0.0
    precision, recall = num_common / num_given, num_common / num_expected
    return 2 * precision * recall / (precision + recall)


def _longest_common_run(first: Sequence[str], second: Sequence[str]) -> int:
    """Units of the longest run that both hold."""
    longest = 0
    ending_here = [0] * (len(second) + 1)
    for unit in first:
        before = ending_here
        ending_here = [0] * (len(second) + 1)
        for place, other in enumerate(second):
            if unit == other:
                ending_here[place + 1] = before[place] + 1
                longest = max(longest, ending_here[place + 1])
    return longest
