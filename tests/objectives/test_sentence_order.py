"""The two losses of a pair, and that no cut into micro-batches changes their sum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerBase,
)

from fulltune.data.encoding import EncodedExample
from fulltune.data.sentence_pairs import SentencePairsConfig
from fulltune.data.tasks import TextExample
from fulltune.errors import ConfigError, DataError, ModelError
from fulltune.models.loading import load_tokenizer
from fulltune.objectives.masked_lm import MaskedLM, MaskingConfig
from fulltune.objectives.sentence_order import SentenceOrder
from tests.conftest import DocumentsInMemory
from tests.objectives.conftest import disturb, labels_of, learn_by_heart, small_encoder

TEXTS = (
    "The capital of the country is a city by the river. She sells sea shells by the sea shore. "
    "The house is red. Who painted the door?",
    "The quick brown fox jumps over the lazy dog. And the dog sleeps on! How many birds live in "
    "the house? There are seven birds.",
    "How many apples are there in the basket? There are seven apples. The answer is in the system.",
    "法国的首都是巴黎。你好，世界！今天天气很好。法国的天气很好。",
)


def arranged(
    objective: SentenceOrder, texts: Sequence[str] = TEXTS, seed: int = 0
) -> list[EncodedExample]:
    documents = DocumentsInMemory.of_texts(objective, texts)
    examples = objective.arrange(documents, range(len(documents)), seed=seed)
    return [examples[index] for index in range(len(examples))]


def small_model(kind: str, tokenizer: PreTrainedTokenizerBase, **values: Any) -> Any:
    if kind == "bert":
        return small_encoder(BertConfig, BertForPreTraining, len(tokenizer), **values)
    values |= {"embedding_size": 16, "classifier_dropout_prob": 0.0}
    return small_encoder(AlbertConfig, AlbertForPreTraining, len(tokenizer), **values)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("model_type", "kind", "labels"),
    [("bert", "next", "next_sentence_label"), ("albert", "order", "sentence_order_label")],
)
def test_loss_of_pairs_alike_in_length_is_that_of_the_models_own_forward(
    tokenizer: PreTrainedTokenizerBase, model_type: str, kind: Any, labels: str, packing: bool
) -> None:
    attention = "fulltune" if packing else "sdpa"
    model = small_model(model_type, tokenizer, attn_implementation=attention).eval()
    disturb(model)
    objective = SentenceOrder(
        tokenizer, 32, pairs=SentencePairsConfig(kind=kind, copies=20), packing=packing
    )
    examples = [example for example in arranged(objective) if len(example["input_ids"]) == 32][:6]
    assert len(examples) == 6
    assert len({example["labels"][0] for example in examples}) == 2
    batch = objective.collate(examples)

    padded = SentenceOrder(tokenizer, 32, packing=False).collate(examples)
    labels_BT = labels_of(padded)
    own = model(
        input_ids=padded["input_ids"],
        token_type_ids=padded["token_type_ids"],
        attention_mask=padded["attention_mask"],
        labels=labels_BT,
        **{labels: torch.tensor([int(example["labels"][0]) for example in examples])},
    )
    count = objective.num_targets(batch)
    loss = objective.loss_sum(model, batch)
    # Sums of some twenty-four float32 terms near 7.
    torch.testing.assert_close(loss, own.loss * count, rtol=1e-5, atol=1e-4)
    scores = objective.score(model, batch)
    assert scores.loss_sum == pytest.approx(loss.item(), rel=1e-5)
    assert scores.num_targets == count
    assert scores.num_sentences == 6
    logits_D2 = own.seq_relationship_logits if model_type == "bert" else own.sop_logits
    assert scores.num_sentences_correct == int(
        (logits_D2.argmax(-1) == padded["sentence_labels"]).sum()
    )
    assert scores.num_correct == int((own.prediction_logits.argmax(-1) == labels_BT).sum())


def test_loss_and_targets_add_up_over_any_cut_into_micro_batches(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = small_model("bert", tokenizer, attn_implementation="fulltune").eval()
    objective = SentenceOrder(tokenizer, 32, pairs=SentencePairsConfig(copies=3, short_share=0.5))
    examples = arranged(objective)
    assert len({len(example["input_ids"]) for example in examples}) > 3
    whole = objective.collate(examples)
    parts = [objective.collate(each) for each in (examples[:1], examples[1:6], examples[6:])]
    assert sum(map(objective.num_targets, parts)) == objective.num_targets(whole)
    torch.testing.assert_close(
        sum(objective.loss_sum(model, part) for part in parts), objective.loss_sum(model, whole)
    )


def test_without_weight_the_loss_is_that_of_the_masked_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = small_model("bert", tokenizer, attn_implementation="fulltune").eval()
    objective = SentenceOrder(tokenizer, 32, pairs=SentencePairsConfig(weight=0))
    examples = arranged(objective)
    batch = objective.collate(examples)
    masked_lm = MaskedLM(tokenizer, 32)
    assert torch.equal(
        objective.loss_sum(model, batch), masked_lm.loss_sum(model, masked_lm.collate(examples))
    )


@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_eight_pairs_are_learned_by_heart(
    tokenizer: PreTrainedTokenizerBase, model_type: str
) -> None:
    model = small_model(model_type, tokenizer, attn_implementation="fulltune")
    objective = SentenceOrder(tokenizer, 40, pairs=SentencePairsConfig(copies=4))
    examples = arranged(objective)[:8]
    assert {example["labels"][0] for example in examples} == {"0", "1"}
    batch = objective.collate(examples)
    scores = learn_by_heart(objective, model, batch, steps=250, lr=5e-3)
    assert scores.num_sentences_correct == scores.num_sentences == 8


def test_masks_are_drawn_anew_and_whole_words_stay_whole_in_pairs(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = ["Unbelievable riverside basketball. Countrywide dogsleeping."] * 3
    objective = SentenceOrder(
        tokenizer, 64, masking=MaskingConfig(rate=0.5, whole_words=True), packing=False
    )
    example = arranged(objective, texts)[0]
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    seen = set()
    for seed in range(30):
        noisy = EncodedExample(**{**example, "noise_seed": seed})  # type: ignore[typeddict-item]
        chosen = set(objective.collate([noisy])["target_positions"].tolist())
        seen.add(frozenset(chosen))
        for position, token in enumerate(tokens):
            assert not (position in chosen and token in ("[CLS]", "[SEP]"))
            # Where a segment was cut inside a word, its first piece stands behind [SEP].
            if token.startswith("##") and not tokens[position - 1].startswith("["):
                assert (position in chosen) == (position - 1 in chosen)
    assert len(seen) > 5


def test_documents_are_encoded_as_for_masked_tokens_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective, masked_lm = SentenceOrder(tokenizer, 32), MaskedLM(tokenizer, 16)
    document = TextExample(TEXTS[0], "a.txt:1")
    assert objective.encode(document) == masked_lm.encode(document)
    assert objective.fingerprint == masked_lm.fingerprint
    marks = objective.encode(document)[0]["boundaries"]
    assert sum(mark >> 1 for mark in marks) == 4


def test_what_cannot_be_trained_is_said(
    tokenizer: PreTrainedTokenizerBase, tiny_llama: Path
) -> None:
    with pytest.raises(ModelError, match="has no `mask_token`"):
        SentenceOrder(load_tokenizer(tiny_llama), 16)
    with pytest.raises(ConfigError, match="`max_length` is 4"):
        SentenceOrder(tokenizer, 4)
    with pytest.raises(DataError, match="has two sentences"):
        arranged(SentenceOrder(tokenizer, 16), ["One sentence.", "Another one."])
    objective = SentenceOrder(tokenizer, 16, packing=False)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    batch = objective.collate(arranged(objective))
    del batch["token_type_ids"]
    with pytest.raises(ModelError, match="`distilbert` has no head for pairs"):
        objective.loss_sum(DistilBertForMaskedLM(config), batch)
