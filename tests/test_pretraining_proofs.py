"""The tables that say whether pre-training learned more than counts, and whether it helps later."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fulltune.config import build_config, read_yaml
from fulltune.data.tokenizers import TokenizerConfig, TokenizerFamily, train_tokenizer
from fulltune.recipes import evaluate, pretrain

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
ngrams = importlib.import_module("ngram_baselines")
helps = importlib.import_module("pretraining_helps")
question_text = importlib.import_module("question_text")

LINES = (
    "The river runs past the old mill.", "Nobody has seen the miller since spring.",
    "Two boats lie at the pier.", "A boy counts the ducks on the water.", "她在河边看书。",
)  # fmt: skip
SMALL: dict[TokenizerFamily, tuple[str, dict[str, int]]] = {
    "gpt": ("gpt2-tiny", {"n_embd": 32, "n_positions": 64}),
    "bert": ("bert-tiny", {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}),
    "xlnet": ("xlnet-tiny", {"d_model": 32, "n_head": 4, "d_inner": 48}),
    "t5": ("t5-tiny", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}),
}
CASES: list[tuple[TokenizerFamily, dict[str, Any]]] = [
    ("gpt", {}),
    ("gpt", {"stream": True}),
    ("bert", {}),
    ("bert", {"masking": {"rate": 0.3, "whole_words": True}}),
    ("bert", {"name": "sentence_pairs"}),
    ("xlnet", {}),
    ("xlnet", {"permutation": {"memory_length": 16}}),
    ("t5", {}),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pretrain_a_little(folder: Path, family: TokenizerFamily, objective: dict[str, Any]) -> Path:
    texts = [f"Day {day}. " + " ".join(LINES[day * step % 5] for step in (1, 2, 3)) for day in range(60)]  # fmt: skip # noqa: E501
    corpus = folder / "corpus.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    corpus.write_text("".join(rows), encoding="utf-8")
    train_tokenizer(texts, TokenizerConfig(family=family, algorithm="characters")).save_pretrained(
        folder / "tokenizer"
    )
    model, architecture = SMALL[family]
    values = {
        "model": model,
        "architecture": architecture,
        "tokenizer": str(folder / "tokenizer"),
        "task": {"kind": "text", "train": str(corpus), "validation": "10 examples"},
        "objective": {"length": 48, **objective},
        "duration": "2 steps",
        "batch": "4 examples",
        "precision": "fp32",
        "num_workers": 0,
        "run_dir": str(folder / "run"),
    }
    pretrain.run(build_config(pretrain.Config, values))
    return folder / "run"


@pytest.mark.parametrize(("family", "objective"), [case for case in CASES if "name" not in case[1]])
def test_counts_and_model_are_asked_for_the_same_targets(
    tmp_path: Path, family: TokenizerFamily, objective: dict[str, Any]
) -> None:
    run = pretrain_a_little(tmp_path, family, objective)
    found = ngrams.compare(str(run))
    measured = evaluate.run(str(run))
    assert found.num_targets == measured.num_targets
    assert found.model == pytest.approx(measured.metrics["loss"], abs=1e-6)
    # The text is five sentences: a model of two steps knows nothing of them yet, counts much.
    assert found.bigram < 0.7 * found.unigram
    assert found.unigram < found.model
    assert found.margin < 0


def test_a_loss_that_is_not_of_tokens_in_their_order_alone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain_a_little(tmp_path, "bert", {"name": "sentence_pairs"})
    monkeypatch.setattr(sys, "argv", ["ngram_baselines.py", str(run)])
    assert ngrams.main() == 2
    assert "not of tokens in the order" in capsys.readouterr().err


def test_a_bigram_gives_every_context_a_distribution_that_counts_decide() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 6, 400)
    tokens[tokens == 5] = 0  # 5 is never seen
    pairs = ngrams.Pairs(np.concatenate([[ngrams.NOTHING_BEFORE], tokens[:-1]]), tokens)
    bigram = ngrams.Bigram(pairs, 6, 0.7)
    for before in range(-1, 6):
        asked = ngrams.Pairs(np.full(6, before), np.arange(6))
        assert bigram.probabilities(asked).sum() == pytest.approx(1, abs=1e-12)
    # By hand: how often 2 follows 1, how many tokens follow 1, and how many come before 2.
    after_one = [b for a, b in zip(pairs.previous, tokens, strict=True) if a == 1]
    both = {(int(a), int(b)) for a, b in zip(pairs.previous, tokens, strict=True)}
    lower = (len([1 for _, b in both if b == 2]) + 0.01) / (len(both) + 6 * 0.01)
    expected = (after_one.count(2) - 0.7 + 0.7 * len(set(after_one)) * lower) / len(after_one)
    asked = ngrams.Pairs(np.array([1]), np.array([2]))
    assert bigram.probabilities(asked)[0] == pytest.approx(expected, rel=1e-9)


def test_what_ends_a_span_costs_what_a_known_share_of_ends_costs() -> None:
    pairs = ngrams.Pairs(np.array([1, 2, 3]), np.array([2, 3, 4]))
    # e0 x y e1 z end: y could have been an end, two are ends, and e0 is certain.
    targets = ngrams.Targets(pairs, np.array([False, True, False]), num_ends=2, num_certain=1)
    expected = 3 * math.log(4) - math.log(1 / 3) - 2 * math.log(2 / 3)
    assert targets.nats(np.full(3, 0.25)) == pytest.approx(expected / 6, rel=1e-12)


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    """Rows with a context and a question, as SQuAD has them."""
    rows = [
        {"context": f"{LINES[day % 5]} It is day {day}.", "question": f"Who saw day {day}?"}
        for day in range(60)
    ]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["bert", "xlnet", "t5"])
def test_both_starts_are_fine_tuned_alike_and_differ_in_their_weights_alone(
    tmp_path: Path, classification_file: Path, other_text: Path, family: TokenizerFamily,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, output = tmp_path / "kept", tmp_path / "helps.json"
    options = (
        f"--families {family} --questions {classification_file} --held-out 20 --vocab-size 160 "
        f"--other-text {other_text} --pretraining-steps 2 --steps 2 --batch 8 --lrs 1e-3 2e-3 "
        f"--seeds 0 1 --folder {folder} --json {output}"
    )
    monkeypatch.setattr(sys, "argv", ["pretraining_helps.py", *options.split()])
    assert helps.main() in (0, 1)
    written = json.loads(output.read_text(encoding="utf-8"))
    (found,) = written["comparisons"]
    assert [(each["optimizer"], each["lr"], each["start"]) for each in found["all"]] == [
        (optimizer, lr, start)
        for optimizer in helps.FINE_TUNING[family]
        for lr in (1e-3, 2e-3)
        for start in ("pre-trained", "new")
    ]
    assert all(len(each["test"]) == len(each["validation"]) == 2 for each in found["all"])
    assert found["model"] in capsys.readouterr().out
    config = build_config(pretrain.Config, read_yaml(folder / f"pretrain-{family}" / "config.yaml"))
    starts = [helps.new_start(config, seed) for seed in (0, 1)]
    starts.append(folder / f"pretrain-{family}" / "model")
    weights = [load_file(start / "model.safetensors") for start in starts]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    texts = [(start / "tokenizer.json").read_text(encoding="utf-8") for start in starts]
    assert texts[0] == texts[1] == texts[2]
    for first, second in ((0, 1), (0, 2)):
        assert any(not torch.equal(weights[first][name], weights[second][name]) for name in weights[0])  # fmt: skip # noqa: E501


def test_no_held_out_question_is_in_the_text_that_is_pre_trained_on(tmp_path: Path) -> None:
    asked = [f"Where does river {number} end ?" for number in range(40)] + ["河在哪里结束？"]
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": text, "label": "LOC"} for text in (*asked, "where does River 7 end?")]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    other = tmp_path / "other.jsonl"
    quotes = [{"text": f"She asked: “{text.upper()}” Nobody knew."} for text in asked]
    other.write_text("".join(json.dumps(row) + "\n" for row in quotes), encoding="utf-8")
    split = question_text.write_questions(
        str(labelled), tmp_path / "split", num_held_out=10, copies=2, other_text=[str(other)]
    )
    assert split.num_questions == (21, 10, 10)  # the one asked twice is one
    texts = {
        path: [
            question_text.words_of(json.loads(line)["text"])
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in (split.train, split.validation, split.test, split.text)
    }
    read = texts[split.text]
    assert split.num_left_out == 20
    assert len(read) == split.num_documents == 2 * 21 + 21
    assert set(texts[split.train]) < set(read)
    for held_out in (*texts[split.validation], *texts[split.test]):
        assert not [document for document in read if held_out in document]


def test_more_questions_held_out_than_there_are_is_refused(
    classification_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--questions {classification_file} --held-out 60".split()
    monkeypatch.setattr(sys, "argv", ["pretraining_helps.py", *words])
    assert helps.main() == 2
    assert "too few to hold out 60 twice" in capsys.readouterr().err
