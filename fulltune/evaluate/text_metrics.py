"""Generated texts against references: BLEU, chrF, ROUGE and exact match, with their signatures.

A BLEU says nothing without its tokenization, so each score comes with the signature that makes it
comparable: sacreBLEU's own (Post, A Call for Clarity in Reporting BLEU Scores, 2018), and for ROUGE
what was counted as a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

from fulltune.errors import ConfigError, DataError, MissingExtraError

Tokenization: TypeAlias = Literal["auto", "13a", "intl", "zh", "char", "none"]

# A writing system that holds more than this share of the letters decides how they are cut: names in
# another one do not.
_SHARE = 0.2

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_KANA = "\u3040-\u30ff\uff66-\uff9d"
# Written without spaces between words: a character counts as one.
_UNSPACED = f"{_HAN}{_KANA}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass(frozen=True)
class TextScores:
    """Scores of all texts together, and how they were computed."""

    metrics: dict[str, float]
    """Numbers under the names of `METRICS`; BLEU and chrF from 0 to 100, the others from 0 to 1."""
    signatures: dict[str, str]
    """`bleu`, `chrf` and `rouge`: what makes the score comparable with another."""


def require_text_metrics() -> None:
    """See that the packages that compute the scores are there.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"BLEU, chrF and ROUGE need the package `{error.name}`",
            hint="install it with `pip install 'fulltune[metrics]'`, or generate nothing to be "
            "measured: `evaluate.generate: 0`, or `fulltune evaluate --generate 0`",
        ) from error


def text_scores(
    answers: Sequence[str], references: Sequence[str], *, tokenize: Tokenization = "auto"
) -> TextScores:
    """Score each answer against its reference, and BLEU and chrF of all of them as one corpus.

    White space around answers and references does not count.

    Args:
        answers: what a model wrote.
        references: what it should have written, one for each answer.
        tokenize: of BLEU: a tokenizer of sacreBLEU; `auto` is `char` where the references are
            Japanese, Thai, Lao, Burmese or Khmer, `zh` where they are Chinese, else `13a`.

    Raises:
        DataError: there is nothing to score.
        MissingExtraError: sacreBLEU or rouge-score is not installed.
    """
    if not answers or len(answers) != len(references):
        raise DataError(
            f"{len(answers)} answers cannot be scored against {len(references)} references",
            hint="give a validation split that is not empty",
        )
    require_text_metrics()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    answers = [answer.strip() for answer in answers]
    references = [reference.strip() for reference in references]
    chosen = choose_tokenization(references) if tokenize == "auto" else tokenize
    bleu, chrf = BLEU(tokenize=chosen), CHRF()
    metrics = {
        "bleu": float(bleu.corpus_score(answers, [references]).score),
        "chrf": float(chrf.corpus_score(answers, [references]).score),
    }
    rouge, rouge_signature = _rouge(answers, references)
    metrics |= rouge
    equal = [answer == reference for answer, reference in zip(answers, references, strict=True)]
    metrics["exact_match"] = sum(equal) / len(equal)
    signatures = {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge": rouge_signature,
    }
    return TextScores(metrics, signatures)


def choose_tokenization(references: Sequence[str]) -> Tokenization:
    """The tokenizer of sacreBLEU that fits the writing system of the references."""
    text = "".join(references)
    num_letters = max(1, sum(map(str.isalnum, text)))
    unspaced = len(re.findall(f"[{_UNSPACED}]", text))
    han = len(re.findall(f"[{_HAN}]", text))
    if unspaced <= _SHARE * num_letters:
        return "13a"
    # sacreBLEU's `zh` parts Chinese characters only; kana would stay whole sentences.
    return "zh" if han > 0.9 * unspaced else "char"


def check_tokenization(name: Tokenization, *, generates: bool) -> None:
    """Refuse a tokenization that nothing is cut by.

    Raises:
        ConfigError: nothing is generated.
    """
    if name != "auto" and not generates:
        raise ConfigError(
            f"`evaluate.tokenize: {name}` has no effect while `evaluate.generate` is 0",
            hint="leave it out, or set `evaluate.generate` to a number of examples",
        )


class _Words:
    """Words of any writing system in lower case, and single characters of those without spaces."""

    def tokenize(self, text: str) -> list[str]:
        """The words, in the interface of rouge-score."""
        return _WORDS.findall(text.lower())


def _rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], str]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum (Lin, 2004), and their signature."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    text = "".join(references)
    num_letters = max(1, sum(map(str.isalpha, text)))
    latin = sum(character.isascii() and character.isalpha() for character in text)
    # rouge-score's own words are made of a-z and 0-9 alone: of Chinese or Russian nothing is left.
    own = latin >= (1 - _SHARE) * num_letters
    names = ["rouge1", "rouge2", "rougeLsum"]
    # Left to itself, the scorer takes the same tokenizer and logs that it does.
    words_of = DefaultTokenizer(use_stemmer=True) if own else _Words()
    scorer: Any = RougeScorer(names, tokenizer=words_of)
    scores = [
        scorer.score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    means = {
        ours: sum(float(score[theirs].fmeasure) for score in scores) / len(scores)
        for ours, theirs in zip(("rouge1", "rouge2", "rouge_lsum"), names, strict=True)
    }
    words = "stem:porter|words:a-z0-9" if own else "stem:no|words:unicode, Han and kana singly"
    return means, f"F1|mean|lsum:lines|{words}|rouge-score:{version('rouge-score')}"
