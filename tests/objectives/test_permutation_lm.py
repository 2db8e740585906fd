"""XLNet's objective: who sees whom, how many are predicted, and that later targets read earlier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, XLNetConfig
from transformers import XLNetLMHeadModel as XLNet

from fulltune.errors import ModelError
from fulltune.objectives.base import Batch
from fulltune.objectives.permutation_lm import PermutationLM
from fulltune.objectives.permutation_noise import PermutationConfig
from fulltune.objectives.permutation_order import (
    VISIBLE,
    choose_targets,
    draw_order,
    permutation_mask,
    word_starts,
)
from tests.conftest import DocumentsInMemory, encoded_example

LINES = (
    "The capital of the country is a city by the river.",
    "How many apples are there in the basket? There are seven apples.",
    "She sells sea shells by the sea shore, and the fox sleeps on.",
    "法国的首都是巴黎。你好，世界！今天天气很好。",
)
SPECIAL = ["<unk>", "<sep>", "<pad>", "<cls>", "<mask>", "<eod>"]


def make_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", **tokens
    )


TOKENIZER = make_tokenizer(sep_token="<sep>", cls_token="<cls>", mask_token="<mask>")
SEP, CLS = 1, 3


def make_model(vocab_size: int = len(TOKENIZER), **values: Any) -> XLNet:
    torch.manual_seed(0)
    small = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    return XLNet(XLNetConfig(vocab_size=vocab_size, **{**small, "mem_len": None, **values})).eval()


def make_example(ids: Sequence[int], *, seed: int = 0, memory: Sequence[int] = ()) -> Any:
    return encoded_example(
        [*memory, *ids, SEP, CLS],
        seed,
        targets=[*[0] * len(memory), *[1] * len(ids), 0, 0],
        token_type_ids=[*[0] * (len(memory) + len(ids) + 1), 2],
    )


def random_ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(len(SPECIAL), len(TOKENIZER), count).tolist()


# -- who sees whom ---------------------------------------------------------------------------------


def test_the_mask_of_a_hand_written_sequence() -> None:
    #       visible, target, visible, target, functional
    order = np.array([VISIBLE, 3, VISIBLE, 0, 2])
    hidden = permutation_mask(order, np.array([False, True, False, True, False]))
    expected = [
        [0, 1, 0, 1, 1],  # a visible token sees the visible ones alone
        [0, 1, 0, 0, 0],  # the last in the order: all but itself
        [0, 1, 0, 1, 1],
        [0, 1, 0, 1, 1],  # the first in the order: the visible ones alone
        [0, 1, 0, 0, 0],  # functional: the earlier target, and itself
    ]
    assert hidden.astype(int).tolist() == expected


@st.composite
def kinds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Targets and functional tokens of a sequence, the size of a block, and a seed."""
    kind = np.array(draw(st.lists(st.sampled_from("vtf"), min_size=1, max_size=40)))
    return kind == "t", kind == "f", draw(st.integers(1, 50)), draw(st.integers(0, 2**32))


@given(kinds())
def test_a_target_sees_all_visible_tokens_the_earlier_in_its_order_and_never_itself(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    targets, functional, perm_size, seed = case
    order = draw_order(targets | functional, perm_size, np.random.default_rng(seed))
    sees = ~permutation_mask(order, targets)
    visible = ~targets & ~functional
    assert sees[:, visible].all()
    assert not sees[visible][:, ~visible].any()
    for place in np.flatnonzero(targets):
        assert (sees[place, ~visible] == (order[~visible] < order[place])).all()
        assert not sees[place, place]
    for place in np.flatnonzero(functional):
        assert sees[place, place]
        others = ~visible & (np.arange(len(order)) != place)
        assert (sees[place, others] == (order[others] < order[place])).all()


@given(kinds())
def test_no_block_sees_what_is_ordered_in_a_later_one(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    targets, functional, perm_size, seed = case
    order = draw_order(targets | functional, perm_size, np.random.default_rng(seed))
    sees = ~permutation_mask(order, targets)
    blocks = np.arange(len(order)) // perm_size
    ordered = targets | functional
    later = (blocks[:, None] < blocks[None]) & ordered[None]
    earlier = (blocks[:, None] > blocks[None]) & ordered[None] & ordered[:, None]
    assert not (sees & later).any()
    assert sees[earlier].all()
    assert len(set(order[ordered].tolist())) == ordered.sum()


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 24), st.integers(1, 30), st.integers(0, 2**32))
def test_no_prediction_changes_with_its_own_token_or_with_later_ones(
    length: int, perm_size: int, seed: int
) -> None:
    """Through all layers of a real model: nothing leaks, and the earlier targets are read."""
    objective = PermutationLM(
        TOKENIZER, 64, PermutationConfig(evaluate_share=0.5, perm_size=perm_size)
    )
    batch = objective.collate([make_example(random_ids(length, seed), seed=seed)])
    # Large weights, so that what is read shows.
    model = make_model(initializer_range=0.2)
    places = batch["target_mapping"][0].argmax(-1)
    hidden = batch["perm_mask"][0][places][:, places]
    rank = (~hidden).sum(-1)  # targets that each target sees

    def states(ids_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inputs = {**batch, "input_ids": ids_BL}
            return model.base_model(
                **{name: inputs[name] for name in ("input_ids", "token_type_ids")},
                perm_mask=inputs["perm_mask"].float(),
                target_mapping=inputs["target_mapping"],
            ).last_hidden_state[0]

    before = states(batch["input_ids"])
    for changed in range(len(places)):
        ids = batch["input_ids"].clone()
        ids[0, places[changed]] = len(SPECIAL) + (ids[0, places[changed]] - 5) % 40
        moved = (states(ids) - before).abs().amax(-1)
        assert (moved[rank <= rank[changed]] == 0).all()
        assert (moved[rank > rank[changed]] > 0).all()


# -- which are targets -----------------------------------------------------------------------------


@given(st.lists(st.sampled_from("cwx"), min_size=1, max_size=80), st.floats(0, 1), st.integers(0))
def test_exactly_as_many_candidates_as_asked_for_are_chosen(
    kind: list[str], share: float, seed: int
) -> None:
    candidates = np.array(kind) != "x"
    count = int(share * candidates.sum())
    starts = np.array(kind) == "w"
    chosen = choose_targets(candidates, starts, count, np.random.default_rng(seed))
    assert chosen.sum() == count
    assert not chosen[~candidates].any()


def test_spans_begin_at_word_starts_and_short_ones_are_likelier() -> None:
    length = 7000
    starts = np.arange(length) % 3 == 0
    everything = np.ones(length, dtype=bool)
    lengths = []
    for seed in range(20):
        chosen = choose_targets(everything, starts, 800, np.random.default_rng(seed))
        edges = np.diff(np.concatenate([[0], chosen.astype(int), [0]]))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        lengths += (ends - begins).tolist()
        # 800 of 7000 leave no rest to draw from single tokens.
        assert starts[begins].all()
    counts = np.bincount(lengths, minlength=6)[1:6]
    shares = counts / counts.sum()
    expected = 1 / np.arange(1, 6) / (1 / np.arange(1, 6)).sum()
    # A standard deviation is 0.006 with about 7000 spans; two that touch count as one.
    assert np.abs(shares - expected).max() < 0.03


def test_words_begin_where_the_vocabulary_marks_them() -> None:
    starts = word_starts(TOKENIZER)
    ids = TOKENIZER.encode("The river, 巴黎", add_special_tokens=False)
    tokens = TOKENIZER.convert_ids_to_tokens(ids)
    begins = [token for token, index in zip(tokens, ids, strict=True) if starts[index]]
    assert all(token[0] in "▁,巴黎" for token in begins)
    assert {"▁", ",", "巴"} <= {token[0] for token in begins}
    assert any(not starts[index] for index in ids)


def test_a_letter_that_is_a_mark_elsewhere_marks_no_words() -> None:
    vocabulary = {"[UNK]": 0, "Ġ": 1, "river": 2, "##s": 3, "##ing": 4, "▁": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    assert word_starts(tokenizer).tolist() == [True, True, True, False, False, True]


def test_85_of_512_tokens_are_predicted() -> None:
    batch = PermutationLM(TOKENIZER, 512).collate([make_example(random_ids(510, 0))])
    assert batch["target_mapping"].shape == (1, 85, 512)
    assert (batch["target_mapping"].sum(-1) == 1).all()


def test_of_held_out_text_a_share_of_its_own_is_predicted() -> None:
    """So the losses of runs that train with different shares are of the same targets."""
    text = random_ids(60, 0)

    def batches(**shares: float) -> list[Batch]:
        objective = PermutationLM(TOKENIZER, 64, PermutationConfig(**shares))
        return [
            objective.collate([{**make_example(text), "noise_seed": 1}]),
            objective.collate([make_example(text)]),
        ]

    (low, held_out), (high, same), (_, dense) = (
        batches(predict_share=0.1), batches(predict_share=0.5),
        batches(predict_share=0.1, evaluate_share=0.5),
    )  # fmt: skip
    counts = [len(batch["target_ids"]) for batch in (low, held_out, high, same, dense)]
    assert counts == [6, 10, 30, 10, 30]
    assert torch.equal(held_out["target_mapping"], same["target_mapping"])
    assert torch.equal(held_out["perm_mask"], same["perm_mask"])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_first_target_always_has_something_to_see(length: int) -> None:
    objective = PermutationLM(TOKENIZER, 8, PermutationConfig(evaluate_share=1))
    batch = objective.collate([make_example(random_ids(length, length))])
    assert objective.num_targets(batch) == length - 1
    rows = batch["target_mapping"][0].argmax(-1)[: length - 1]
    assert not batch["perm_mask"][0][rows].all(-1).any()
    loss = objective.loss_sum(make_model(), batch)
    assert (loss == 0) == (length == 1)


# -- batches ---------------------------------------------------------------------------------------


def test_the_content_is_never_masked_and_ends_with_the_class_token() -> None:
    examples = [make_example(random_ids(length, length), seed=length) for length in (7, 20)]
    batch = PermutationLM(TOKENIZER, 64).collate(examples)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, -length:].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].tolist() == [0] * (22 - length) + [1] * length
        assert batch["token_type_ids"][row, -2:].tolist() == [0, 2]
    assert TOKENIZER.mask_token_id not in batch["input_ids"]
    positions = batch["target_mapping"].flatten(0, 1)[batch["target_rows"]].argmax(-1)
    rows = batch["target_rows"] // batch["target_mapping"].shape[1]
    assert (batch["input_ids"][rows, positions] == batch["target_ids"]).all()


def test_noise_depends_on_the_example_and_its_seed_alone() -> None:
    objective = PermutationLM(TOKENIZER, 64)
    first, second = (make_example(random_ids(20, seed), seed=seed) for seed in (1, 2))
    alone, together = objective.collate([first]), objective.collate([second, first])
    assert (alone["perm_mask"][0] == together["perm_mask"][1]).all()
    again = objective.collate([{**first, "noise_seed": 1}])
    other = objective.collate([{**first, "noise_seed": 2}])
    assert (alone["perm_mask"] == again["perm_mask"]).all()
    assert (alone["perm_mask"] != other["perm_mask"]).any()


def test_the_loss_and_its_gradients_are_those_of_the_models_own_forward() -> None:
    """XLNet's own loss, with labels, of one batch of windows of different lengths."""
    objective = PermutationLM(TOKENIZER, 64)
    batch = objective.collate(
        [make_example(random_ids(count, count), seed=count) for count in (17, 30, 9, 30)]
    )
    model = make_model(initializer_range=0.2)
    labels_BP = torch.full(batch["target_mapping"].shape[:2], -100)
    labels_BP.view(-1)[batch["target_rows"]] = batch["target_ids"]
    assert (labels_BP == -100).any()  # places of shorter windows that predict nothing
    names = ("input_ids", "token_type_ids", "attention_mask", "target_mapping")
    expected = model(
        **{name: batch[name] for name in names},
        perm_mask=batch["perm_mask"].float(),
        labels=labels_BP,
    ).loss
    expected.backward()
    gradients = {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }
    model.zero_grad()
    loss = objective.loss_sum(model, batch) / objective.num_targets(batch)
    loss.backward()
    # A mean of some fifteen float32 terms near 6, and sums of as many products as there are tokens.
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("memory", [0, 6])
def test_the_loss_is_that_of_the_model_on_each_example_alone(memory: int) -> None:
    """Padding, groups of like lengths and places without targets change nothing."""
    objective = PermutationLM(TOKENIZER, 64)
    examples = [
        make_example(random_ids(count, count), seed=count, memory=random_ids(kept, count + 1))
        for count, kept in ((17, memory // 2), (30, memory), (9, 0), (30, memory))
    ]
    model = make_model(initializer_range=0.2)
    expected = 0.0
    for example in examples:
        batch = objective.collate([example])
        kept = example["targets"].index(1)
        with torch.no_grad():
            mems = None
            if kept:
                past = torch.tensor([example["input_ids"][:kept]])
                mems = model(past, token_type_ids=torch.zeros_like(past), use_mems=True).mems
            logits = model(
                input_ids=torch.tensor([example["input_ids"][kept:]]),
                token_type_ids=torch.tensor([example["token_type_ids"][kept:]]),
                perm_mask=batch["perm_mask"].float(),
                target_mapping=batch["target_mapping"],
                mems=mems,
            ).logits[0]
        expected += float(F.cross_entropy(logits.float(), batch["target_ids"], reduction="sum"))
    batch = objective.collate(examples)
    assert float(objective.loss_sum(model, batch).detach()) == pytest.approx(expected, rel=1e-5)
    scores = objective.score(model, batch)
    assert scores.loss_sum == pytest.approx(expected, rel=1e-5)
    assert scores.num_targets == objective.num_targets(batch) == len(batch["target_ids"])


@pytest.mark.parametrize("memory", [0, 6])
def test_bfloat16_weights_give_the_loss_of_float32_but_for_rounding(memory: int) -> None:
    objective = PermutationLM(TOKENIZER, 64)
    example = make_example(random_ids(30, 0), memory=random_ids(memory, 1))
    batch = objective.collate([example, make_example(random_ids(12, 2))])
    expected = objective.score(make_model(), batch).loss_sum
    model = make_model().to(torch.bfloat16)
    loss = objective.loss_sum(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    # Eight bits of mantissa are 0.4 %.
    assert float(loss.detach()) == pytest.approx(expected, rel=4e-3)
    assert model.transformer.layer[0].rel_attn.r.grad.dtype == torch.bfloat16


def test_memory_is_read_and_gets_no_gradient() -> None:
    objective = PermutationLM(TOKENIZER, 64)
    ids, model = random_ids(12, 0), make_model(initializer_range=0.2)
    losses = [
        float(
            objective.loss_sum(
                model, objective.collate([make_example(ids, memory=memory)])
            ).detach()
        )
        for memory in ([], [50, 51, 52], [60, 61, 62])
    ]
    assert len(set(losses)) == 3
    batch = objective.collate([make_example(ids, memory=[149, 149])])
    assert 149 not in batch["input_ids"]
    objective.loss_sum(model.train(), batch).backward()
    untied = make_model(tie_word_embeddings=False)
    objective.loss_sum(untied, batch).backward()
    assert (untied.transformer.word_embedding.weight.grad[149] == 0).all()
    assert (untied.transformer.word_embedding.weight.grad[batch["input_ids"][0, 0]] != 0).any()


# -- documents -------------------------------------------------------------------------------------


def make_documents(objective: PermutationLM) -> DocumentsInMemory:
    texts = [f"{line} {number}" for number, line in enumerate(LINES * 3)]
    return DocumentsInMemory.of_texts(objective, texts)


@pytest.mark.parametrize("memory_length", [0, 5, 40])
def test_windows_follow_each_other_and_remember_the_tokens_before(memory_length: int) -> None:
    objective = PermutationLM(TOKENIZER, 18, PermutationConfig(memory_length=memory_length))
    documents = make_documents(objective)
    arranged = objective.arrange(documents, range(len(documents.examples)), seed=3)
    stream: list[int] = []
    for index in range(len(arranged)):
        example = arranged[index]
        assert len(example["input_ids"]) == arranged.lengths[index]
        kept = example["targets"].index(1)
        assert kept == min(memory_length, len(stream))
        assert example["input_ids"][:kept] == stream[len(stream) - kept :]
        assert example["input_ids"][-2:] == [SEP, CLS]
        assert len(example["input_ids"]) == len(example["token_type_ids"])
        stream += example["input_ids"][kept:-2]
    assert stream.count(TOKENIZER.convert_tokens_to_ids("<eod>")) == len(documents.examples)
    other = PermutationLM(TOKENIZER, 18, PermutationConfig(memory_length=memory_length + 1))
    assert other.arrange(documents, range(12), 3).fingerprint != arranged.fingerprint


def test_a_tokenizer_without_separator_or_class_token_is_refused() -> None:
    with pytest.raises(ModelError, match="separator"):
        PermutationLM(make_tokenizer(cls_token="<cls>"), 64)
    with pytest.raises(ModelError, match="class"):
        PermutationLM(make_tokenizer(sep_token="<sep>"), 64)


def test_a_model_that_cannot_do_it_is_refused() -> None:
    objective = PermutationLM(TOKENIZER, 64)
    batch = objective.collate([make_example(random_ids(9, 0), memory=[9, 9, 9])])
    small = {"vocab_size": 200, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with pytest.raises(ModelError, match="`gpt2`"):
        objective.loss_sum(GPT2LMHeadModel(GPT2Config(**small)), batch)
    with pytest.raises(ModelError, match="`mem_len`"):
        objective.loss_sum(make_model(mem_len=2), batch)
    with pytest.raises(ModelError, match="`reuse_len`"):
        objective.loss_sum(make_model(reuse_len=2), batch)
    with pytest.raises(ModelError, match="bi_data"):
        objective.loss_sum(make_model(bi_data=True), batch)


# -- learning --------------------------------------------------------------------------------------


def train(model: XLNet, objective: PermutationLM, batches: Sequence[Batch], lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for batch in batches:
        (objective.loss_sum(model, batch) / objective.num_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("memory_length", [0, 8])
def test_eight_sequences_are_learned_by_heart(memory_length: int) -> None:
    objective = PermutationLM(TOKENIZER, 18, PermutationConfig(memory_length=memory_length))
    documents = make_documents(objective)
    arranged = objective.arrange(documents, range(len(documents.examples)), seed=0)
    batch = objective.collate([arranged[index] for index in range(8)])
    model = make_model()
    train(model, objective, [batch] * 150, lr=5e-3)
    scores = objective.score(model, batch)
    assert scores.loss_sum / scores.num_targets < 0.05
    assert scores.num_correct == scores.num_targets


@pytest.mark.slow
def test_the_second_of_a_pair_is_read_off_the_first_unless_targets_are_masked_in_the_input() -> (
    None
):
    """Two targets are one random symbol of 30: the first cannot be known, the second can.

    transformers' `DataCollatorForPermutationLanguageModeling` overwrites targets by `<mask>` in
    the content stream, so that no target ever sees another.
    """
    num_symbols, first_symbol = 30, 100
    objective = PermutationLM(TOKENIZER, 16, PermutationConfig(evaluate_share=1))

    def collate(seed: int, *, masked: bool) -> Batch:
        symbols = np.random.default_rng(seed).integers(num_symbols, size=64) + first_symbol
        examples = []
        for row, symbol in enumerate(symbols.tolist()):
            example = make_example([symbol, symbol, 10, 11, 12, 13], seed=1000 * seed + row)
            example["targets"] = [1, 1, 0, 0, 0, 0, 0, 0]
            examples.append(example)
        batch = objective.collate(examples)
        if masked:
            targets = batch["target_mapping"].sum(1) == 1
            batch["input_ids"][targets] = TOKENIZER.mask_token_id
        return batch

    def second_nll(*, masked: bool) -> float:
        model = make_model(vocab_size=first_symbol + num_symbols)
        train(model, objective, [collate(seed, masked=masked) for seed in range(400)], lr=3e-3)
        batch = collate(10_000, masked=masked)
        with torch.no_grad():
            names = ("input_ids", "token_type_ids", "target_mapping")
            inputs = {name: batch[name] for name in names}
            logits = model(**inputs, perm_mask=batch["perm_mask"].float()).logits
        assert (batch["target_mapping"].argmax(-1) == torch.tensor([0, 1])).all()
        second = (~batch["perm_mask"][:, 1, 0]).long()  # the place that sees the other one
        rows = torch.arange(len(second))
        return float(F.cross_entropy(logits[rows, second], batch["target_ids"][::2]))

    assert second_nll(masked=False) < 0.7
    assert second_nll(masked=True) == pytest.approx(np.log(num_symbols), abs=0.2)
