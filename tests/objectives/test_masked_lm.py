"""Which tokens are masked, with what, and that the loss is that of the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import TextExample
from fulltune.errors import ConfigError, ModelError
from fulltune.models.loading import load_tokenizer
from fulltune.objectives.masked_lm import MaskedLM, MaskingConfig
from tests.conftest import DocumentsInMemory, encoded_example
from tests.objectives.conftest import disturb, labels_of, learn_by_heart, small_encoder

TEXTS = (
    "The capital of the country is a city by the river. She sells sea shells!",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "How many apples are there in the basket? There are seven apples.",
    "法国的首都是巴黎。你好，世界！今天天气很好。",
)


def arranged(objective: MaskedLM, texts: Sequence[str] = TEXTS) -> list[EncodedExample]:
    documents = DocumentsInMemory.of_texts(objective, texts)
    examples = objective.arrange(documents, range(len(documents)), seed=0)
    assert [len(examples[i]["input_ids"]) for i in range(len(examples))] == list(examples.lengths)
    return [examples[index] for index in range(len(examples))]


def seeded(example: EncodedExample, seed: int) -> EncodedExample:
    return EncodedExample(**{**example, "noise_seed": seed})  # type: ignore[typeddict-item]


def invented(tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> EncodedExample:
    """An example of ordinary tokens with a start and a separator around them."""
    ordinary = np.random.default_rng(number).integers(5, len(tokenizer), length).tolist()
    return encoded_example(
        [tokenizer.cls_token_id, *ordinary, tokenizer.sep_token_id],
        number,
        targets=[0, *[1] * length, 0],
        boundaries=[0, *np.random.default_rng(number).integers(0, 2, length).tolist(), 0],
    )


def small_model(tokenizer: PreTrainedTokenizerBase, **values: Any) -> BertForMaskedLM:
    return small_encoder(BertConfig, BertForMaskedLM, len(tokenizer), **values)


def test_windows_keep_every_token_once_and_never_mix_documents(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective = MaskedLM(tokenizer, 9)
    documents = DocumentsInMemory.of_texts(objective, TEXTS)
    examples = objective.arrange(documents, [2, 0], seed=0)
    seen: dict[str, list[int]] = {}
    for index in range(len(examples)):
        example = examples[index]
        assert len(example["input_ids"]) <= 9
        assert example["input_ids"][0] == tokenizer.cls_token_id
        assert example["input_ids"][-1] == tokenizer.sep_token_id
        assert example["targets"] == [0, *[1] * (len(example["input_ids"]) - 2), 0]
        assert examples.where(index) == example["where"]
        seen.setdefault(example["where"], []).extend(example["input_ids"][1:-1])
    assert seen == {
        "a.txt:3": documents[2]["input_ids"],
        "a.txt:1": documents[0]["input_ids"],
    }
    hashes = {examples[index]["example_hash"] for index in range(len(examples))}
    assert len(hashes) == len(examples)
    assert examples.fingerprint != objective.arrange(documents, [0, 2], seed=0).fingerprint
    assert examples.fingerprint == objective.arrange(documents, [2, 0], seed=0).fingerprint


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rate=st.floats(0.01, 0.99),
    max_masked=st.none() | st.integers(1, 10),
    seed=st.integers(0, 2**63),
    packing=st.booleans(),
)
def test_the_number_of_masked_tokens_is_exact_and_targets_are_the_original_tokens(
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    rate: float,
    max_masked: int | None,
    seed: int,
    packing: bool,
) -> None:
    objective = MaskedLM(
        tokenizer, 64, masking=MaskingConfig(rate=rate, max_masked=max_masked), packing=packing
    )
    examples = [
        seeded(invented(tokenizer, length, number), seed + number)
        for number, length in enumerate(lengths)
    ]
    batch = objective.collate(examples)
    expected = [min(max_masked or 99, max(1, round(rate * length))) for length in lengths]
    assert objective.num_targets(batch) == sum(expected)

    rows = [example["input_ids"] for example in examples]
    width = max(map(len, rows))
    starts = np.cumsum([0, *map(len, rows)])[:-1] if packing else np.arange(len(rows)) * width
    flat = batch["input_ids"].flatten().tolist()
    positions = batch["target_positions"].tolist()
    targets = dict(zip(positions, batch["target_ids"].tolist(), strict=True))
    assert len(targets) == len(positions)
    for start, row, count in zip(starts.tolist(), rows, expected, strict=True):
        inside = [position for position in positions if start <= position < start + len(row)]
        assert len(inside) == count
        for offset, token in enumerate(row):
            if start + offset in targets:
                assert 0 < offset < len(row) - 1
                assert targets[start + offset] == token
                assert flat[start + offset] not in {0, 1, 2, 3}  # never [PAD] [UNK] [CLS] [SEP]
            else:
                assert flat[start + offset] == token


def test_noise_follows_the_seed_of_the_example_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    objective = MaskedLM(tokenizer, 64, packing=False)
    first, second = (invented(tokenizer, 30, number) for number in (1, 2))

    def noise(*examples: EncodedExample) -> list[list[int]]:
        rows: list[list[int]] = objective.collate(examples)["input_ids"].tolist()
        return rows

    assert noise(seeded(first, 5)) == noise(seeded(first, 5)) != noise(seeded(first, 6))
    assert noise(first) == noise(seeded(first, first["example_hash"]))
    assert noise(seeded(second, 4), seeded(first, 5))[1] == noise(seeded(first, 5))[0]


@pytest.mark.parametrize("whole_words", [False, True])
def test_eight_in_ten_chosen_tokens_are_masked_and_one_in_ten_is_kept(
    tokenizer: PreTrainedTokenizerBase, whole_words: bool
) -> None:
    objective = MaskedLM(
        tokenizer, 512, masking=MaskingConfig(rate=0.4, whole_words=whole_words), packing=False
    )
    masked = kept = total = 0
    others: set[int] = set()
    for seed in range(40):
        batch = objective.collate([seeded(invented(tokenizer, 500, 1), seed)])
        found = batch["input_ids"].flatten()[batch["target_positions"]]
        is_mask, is_same = found == tokenizer.mask_token_id, found == batch["target_ids"]
        masked, kept = masked + int(is_mask.sum()), kept + int(is_same.sum())
        total += len(found)
        others.update(found[~is_mask & ~is_same].tolist())
    # 8,000 draws: six standard deviations are 2.7 and 2.0 points.
    assert masked / total == pytest.approx(0.8, abs=0.027)
    assert kept / total == pytest.approx(0.1, abs=0.02)
    vocabulary = len(tokenizer)
    assert others <= set(range(5, vocabulary))
    assert len(others) > 0.8 * (vocabulary - 5)


def test_special_tokens_inside_a_text_are_never_chosen(tokenizer: PreTrainedTokenizerBase) -> None:
    objective = MaskedLM(tokenizer, 64, masking=MaskingConfig(evaluate_rate=0.99), packing=False)
    [example] = arranged(objective, ["the [SEP] dog [MASK] sleeps \u2603"])
    batch = objective.collate([example])
    assert tokenizer.convert_ids_to_tokens(batch["target_ids"].tolist()) == ["the", "dog", "sleeps"]


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**63))
def test_whole_words_are_chosen_with_all_their_pieces_and_within_the_budget(
    tokenizer: PreTrainedTokenizerBase, rate: float, seed: int
) -> None:
    objective = MaskedLM(
        tokenizer, 128, masking=MaskingConfig(rate=rate, whole_words=True), packing=False
    )
    text = "unbelievable riverside basketball, the dog countrywide sleeps"
    [example] = arranged(objective, [text])
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert sum(token.startswith("##") for token in tokens) > 5
    batch = objective.collate([seeded(example, seed)])
    chosen = set(batch["target_positions"].tolist())
    assert len(chosen) <= max(1, round(rate * (len(tokens) - 2)))
    for position, token in enumerate(tokens):
        if token.startswith("##"):
            assert (position in chosen) == (position - 1 in chosen)


def runs_of(positions: Sequence[int]) -> list[int]:
    """Lengths of the runs of neighbours."""
    cuts = np.flatnonzero(np.diff(positions) > 1) + 1
    return [len(run) for run in np.split(np.array(positions), cuts)]


def test_runs_of_words_are_chosen_at_once_and_short_ones_are_likelier(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    masking = MaskingConfig(rate=0.02, whole_words=True, max_ngram=3)
    objective = MaskedLM(tokenizer, 2000, masking=masking, packing=False)
    example = invented(tokenizer, 1800, 1)
    example["boundaries"] = [1] * 1802  # each token a word
    lengths: list[int] = []
    for seed in range(100):
        batch = objective.collate([seeded(example, seed)])
        assert objective.num_targets(batch) == 36
        lengths += runs_of(batch["target_positions"].tolist())
    shares = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    # About 2,200 runs: a standard deviation is 1.1 points;
    # a few runs touch, or end with the budget.
    assert np.abs(shares - np.array([6, 3, 2]) / 11).max() < 0.05


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**63), max_ngram=st.integers(1, 5))
def test_runs_take_whole_words_within_the_budget_and_end_at_a_separator(
    tokenizer: PreTrainedTokenizerBase, rate: float, seed: int, max_ngram: int
) -> None:
    masking = MaskingConfig(rate=rate, whole_words=True, max_ngram=max_ngram)
    objective = MaskedLM(tokenizer, 128, masking=masking, packing=False)
    example = invented(tokenizer, 40, seed % 1000)
    example["input_ids"][20] = tokenizer.sep_token_id
    example["targets"][20] = 0
    chosen = set(objective.collate([seeded(example, seed)])["target_positions"].tolist())
    assert len(chosen) <= max(1, round(rate * 39))
    assert 20 not in chosen
    for position in range(2, 41):
        if not example["boundaries"][position] and position not in (20, 21):
            assert (position in chosen) == (position - 1 in chosen)


def test_held_out_text_is_masked_at_a_rate_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    """So the losses of runs that train at different rates are of the same masked tokens."""
    example = invented(tokenizer, 100, 1)

    def batches(**masking: Any) -> tuple[Any, Any]:
        objective = MaskedLM(tokenizer, 128, masking=MaskingConfig(**masking), packing=False)
        return objective.collate([seeded(example, 1)]), objective.collate([example])

    (low, held_out), (high, same), (_, dense) = (
        batches(rate=0.1), batches(rate=0.4), batches(rate=0.1, evaluate_rate=0.5),
    )  # fmt: skip
    counts = [len(batch["target_ids"]) for batch in (low, held_out, high, same, dense)]
    assert counts == [10, 15, 40, 15, 50]
    assert torch.equal(held_out["input_ids"], same["input_ids"])
    assert torch.equal(held_out["target_positions"], same["target_positions"])


@pytest.mark.parametrize("name", ["max_ngram", "chinese_words"])
def test_a_setting_about_words_is_refused_without_whole_words(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` has no effect without"):
        MaskingConfig(**{name: 2 if name == "max_ngram" else True})


def test_chinese_characters_of_a_word_are_chosen_together(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    pytest.importorskip("jieba")
    text = "法国的首都是巴黎。"
    plain = MaskedLM(tokenizer, 64, masking=MaskingConfig(whole_words=True))
    joined = MaskedLM(tokenizer, 64, masking=MaskingConfig(whole_words=True, chinese_words=True))
    starts = {
        name: [mark & 1 for mark in objective.encode(TextExample(text, "a:1"))[0]["boundaries"]]
        for name, objective in (("plain", plain), ("joined", joined))
    }
    assert starts["plain"] == [1] * 9
    assert starts["joined"] == [1, 0, 1, 1, 0, 1, 1, 0, 1]  # 法国 的 首都 是 巴黎 。
    assert plain.fingerprint != joined.fingerprint


@pytest.mark.parametrize("packing", [False, True])
def test_loss_equals_that_of_the_models_own_forward(
    tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    model = small_model(tokenizer, attn_implementation="fulltune" if packing else "sdpa").eval()
    disturb(model)
    objective = MaskedLM(tokenizer, 24, packing=packing)
    examples = arranged(objective)
    batch = objective.collate(examples)

    padded = MaskedLM(tokenizer, 24, packing=False).collate(examples)
    labels_BT = labels_of(padded)
    own = model(
        input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], labels=labels_BT
    )
    count = objective.num_targets(batch)
    assert count == int((labels_BT != -100).sum())
    # Sums of some twenty float32 terms near 6.
    loss = objective.loss_sum(model, batch)
    torch.testing.assert_close(loss, own.loss * count, rtol=1e-5, atol=1e-4)
    assert loss.dtype == torch.float32
    scores = objective.score(model, batch)
    assert scores.loss_sum == pytest.approx(loss.item())
    assert scores.num_targets == count
    best_BT = own.logits.argmax(-1)
    assert scores.num_correct == int((best_BT == labels_BT).sum())


def test_eight_sequences_are_learned_by_heart(tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_model(tokenizer, attn_implementation="fulltune")
    objective = MaskedLM(tokenizer, 16)
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 2)]
    examples = [example for example in arranged(objective, texts) if len(example["targets"]) > 10]
    batch = objective.collate(examples[:8])
    learn_by_heart(objective, model, batch, steps=80, lr=5e-3)


def test_hashes_and_bytes_are_those_of_the_document(tokenizer: PreTrainedTokenizerBase) -> None:
    [document] = MaskedLM(tokenizer, 8).encode(TextExample(TEXTS[3], "a.txt:1"))
    assert document["example_hash"] == document["input_hash"] == content_hash(TEXTS[3])
    assert document["num_bytes"] == len(TEXTS[3].encode())
    assert tokenizer.cls_token_id not in document["input_ids"]
    assert len(document["input_ids"]) > 8


def test_a_text_without_tokens_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    assert MaskedLM(tokenizer, 16).encode(TextExample(" \u200b", "a.txt:4")) == []


def test_what_cannot_be_trained_is_said(
    tokenizer: PreTrainedTokenizerBase, tiny_llama: Path
) -> None:
    with pytest.raises(ModelError, match="has no `mask_token`"):
        MaskedLM(load_tokenizer(tiny_llama), 16)
    with pytest.raises(ConfigError, match="`max_length` is 2"):
        MaskedLM(tokenizer, 2)
    with pytest.raises(ValueError, match="rate"):
        MaskingConfig(rate=1.0)
