"""Scores of generated texts are those of sacreBLEU and rouge-score, and say how they came to be."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.text_metrics import (
    check_tokenization,
    choose_tokenization,
    text_scores,
)

ANSWERS = ["The cat sat on a mat.", "It rains today", "Seven apples"]
REFERENCES = ["The cat sat on the mat.", "It is raining today.", "Seven apples"]


def test_english_scores_are_those_of_the_packages_themselves() -> None:
    scores = text_scores(ANSWERS, REFERENCES)
    assert scores.metrics["bleu"] == BLEU().corpus_score(ANSWERS, [REFERENCES]).score
    assert scores.metrics["chrf"] == CHRF().corpus_score(ANSWERS, [REFERENCES]).score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    scored = [scorer.score(*pair) for pair in zip(REFERENCES, ANSWERS, strict=True)]
    for ours, theirs in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_lsum", "rougeLsum")):
        mean = sum(each[theirs].fmeasure for each in scored) / 3
        assert scores.metrics[ours] == pytest.approx(mean)
    assert scores.metrics["exact_match"] == pytest.approx(1 / 3)
    assert "tok:13a" in scores.signatures["bleu"]
    assert "stem:porter" in scores.signatures["rouge"]


def test_equal_texts_score_the_most_in_every_writing() -> None:
    for text in (
        "The cat sat on the mat.",
        "我很喜欢这只小猫。",
        "ねこがとてもすきです。",
        "Кот спит дома.",
    ):
        scores = text_scores([text, text], [text, f" {text}\n"])
        assert scores.metrics["bleu"] == pytest.approx(100)
        assert scores.metrics["chrf"] == pytest.approx(100)
        assert all(
            scores.metrics[name] == pytest.approx(1)
            for name in ("rouge1", "rouge2", "rouge_lsum", "exact_match")
        )


def test_chinese_and_japanese_are_cut_into_characters_and_the_signature_says_so() -> None:
    assert choose_tokenization(["我喜欢 Python 和猫。"]) == "zh"
    assert choose_tokenization(["ねこが好きです"]) == "char"
    assert choose_tokenization(["ฉันชอบแมว"]) == "char"
    assert choose_tokenization(["The city of 北京 is large, and so is 上海 I think."]) == "13a"
    scores = text_scores(["我喜欢狗"], ["我喜欢猫"])
    assert "tok:zh" in scores.signatures["bleu"]
    assert scores.metrics["rouge1"] == pytest.approx(3 / 4)
    assert "Han" in scores.signatures["rouge"]
    given = text_scores(["我喜欢狗"], ["我喜欢猫"], tokenize="char")
    assert "tok:char" in given.signatures["bleu"]


def test_nothing_to_score_is_an_error_and_an_empty_answer_is_none() -> None:
    with pytest.raises(DataError, match="0 answers"):
        text_scores([], [])
    scores = text_scores(["", "two words"], ["one word", "two words"])
    assert scores.metrics["exact_match"] == 0.5
    with pytest.raises(ConfigError, match=r"`evaluate\.tokenize: zh` has no effect"):
        check_tokenization("zh", generates=False)
