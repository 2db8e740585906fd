"""Span corruption: nothing is lost, nothing is padded, and the loss is the model's own."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fulltune.config import build_config
from fulltune.data.tasks import TextExample
from fulltune.errors import ConfigError, DataError, ModelError
from fulltune.objectives.span_corruption import (
    SpanConfig,
    SpanCorruption,
    require_plain_decoder_head,
)
from fulltune.objectives.spans import (
    T5_DENOISER,
    UL2_DENOISERS,
    Denoiser,
    corrupt,
    random_segmentation,
    raw_length,
)
from tests.conftest import DocumentsInMemory, encoded_example
from tests.objectives.conftest import learn_by_heart

END = 1
SENTINELS = tuple(range(9999, 7999, -1))


def make_tokenizer(num_sentinels: int = 100, modes: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, and sentinels that count down from the top as in T5."""
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if modes:
        tokens += ["[NLU]", "[NLG]", "[S2S]"]
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(num_sentinels))]
    vocabulary = {token: index for index, token in enumerate(tokens + sentinels)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*tokens[:2], *sentinels])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def make_model(**values: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 364, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    config = T5Config(
        **{**sizes, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0, **values}
    )
    return T5ForConditionalGeneration(config)


def splice(inputs: list[int], targets: list[int], sentinels: tuple[int, ...]) -> list[int]:
    """What a reader of both would write: each sentinel of the inputs is what follows it."""
    assert inputs[-1] == targets[-1] == END
    fills: dict[int, list[int]] = {}
    current = -1
    for token in targets[:-1]:
        if token in sentinels:
            current = token
            fills[current] = []
        else:
            fills[current].append(token)
    whole: list[int] = []
    for token in inputs[:-1]:
        whole += fills.pop(token) if token in sentinels else [token]
    assert not fills
    return whole


ids = st.lists(st.integers(0, 300), min_size=2, max_size=200)
seeds = st.integers(-(2**63), 2**63 - 1)
denoisers = st.sampled_from([each for each in UL2_DENOISERS if each.mean_span_length]) | st.builds(
    Denoiser, st.floats(0.01, 0.99), st.floats(1, 20)
)


@given(ids, seeds, denoisers)
def test_inputs_and_targets_together_are_the_text(
    ids: list[int], seed: int, denoiser: Denoiser
) -> None:
    kept, noise = denoiser.draw(len(ids), np.random.default_rng(seed % 2**64))
    inputs, targets = corrupt(ids, kept, noise, SENTINELS, END)
    assert splice(inputs, targets, SENTINELS) == ids
    assert (len(inputs), len(targets)) == denoiser.lengths(len(ids))
    assert (sum(noise), len(noise)) == denoiser.counts(len(ids))
    assert min(kept + noise) >= 1
    for side in (inputs, targets):
        used = [token for token in side if token in SENTINELS]
        assert used == list(SENTINELS[: len(noise)])
    assert inputs[0] == ids[0]
    assert targets[0] == SENTINELS[0]


def test_a_tiny_case_is_as_published() -> None:
    # Figure 2 of Raffel et al.: "Thank you <X> me to your party <Y>".
    thank, you, for_, inviting, me, to, your, party, last = range(10, 19)
    text = [thank, you, for_, inviting, me, to, your, party, last]
    inputs, targets = corrupt(text, [2, 4], [2, 1], SENTINELS, END)
    assert inputs == [thank, you, SENTINELS[0], me, to, your, party, SENTINELS[1], END]
    assert targets == [SENTINELS[0], for_, inviting, SENTINELS[1], last, END]


def test_512_inputs_are_568_tokens_with_85_of_noise_in_28_spans() -> None:
    assert raw_length(512) == (568, 114)
    assert T5_DENOISER.counts(568) == (85, 28)


@given(st.integers(3, 600), st.builds(Denoiser, st.floats(0.01, 0.5), st.floats(2, 70)))
def test_corrupted_windows_fill_the_inputs_to_the_last_token(
    length: int, denoiser: Denoiser
) -> None:
    raw, targets = raw_length(length, denoiser)
    assert denoiser.lengths(raw) == (length, targets)
    assert denoiser.lengths(raw + 1)[0] == length + 1


def test_every_way_to_cut_is_equally_likely() -> None:
    generator = np.random.default_rng(0)
    draws = [tuple(random_segmentation(5, 3, generator)) for _ in range(6000)]
    counts = {cut: draws.count(cut) for cut in set(draws)}
    assert len(counts) == 6  # of 4 places, 2
    # 1000 expected; six standard deviations of a binomial are 173.
    assert max(abs(count - 1000) for count in counts.values()) < 173


@given(st.lists(st.integers(2, 250), min_size=2, max_size=80), seeds, st.booleans())
def test_noise_follows_from_the_seed_alone(ids: list[int], seed: int, epoch: bool) -> None:
    objective = OBJECTIVES["ul2"]
    example = encoded_example(ids, seed)
    if epoch:
        example = {**example, "example_hash": 0, "noise_seed": seed}
    together = objective.collate([encoded_example([5] * 30, 3), example])
    alone = objective.collate([example])
    number = alone["target_ids"].numel()
    assert together["target_ids"][-number:].tolist() == alone["target_ids"].tolist()
    assert objective.corrupt(example) == objective.corrupt(encoded_example(ids, seed))


@given(st.lists(st.integers(2, 250), min_size=2, max_size=300), seeds)
def test_every_denoiser_of_ul2_keeps_the_text_and_says_its_mode(ids: list[int], seed: int) -> None:
    objective = OBJECTIVES["ul2"]
    inputs, targets = objective.corrupt(encoded_example(ids, seed))
    mode = objective.tokenizer.convert_ids_to_tokens(inputs[0])
    if mode == "[S2S]":
        assert inputs[1:-1] + targets[:-1] == ids
        assert len(targets) - 1 == max(1, round(len(ids) / 4))
    else:
        assert mode in ("[NLU]", "[NLG]")
        assert splice(inputs[1:], targets, objective.sentinels) == ids


OBJECTIVES = {
    "t5": SpanCorruption(make_tokenizer(), 512),
    "ul2": SpanCorruption(make_tokenizer(modes=True), 512, SpanConfig(mixture="ul2")),
}


def test_ul2_draws_all_seven_and_never_exceeds_the_inputs() -> None:
    objective = OBJECTIVES["ul2"]
    ids = [7] * objective.window_tokens
    shapes = [objective.corrupt(encoded_example(ids, seed)) for seed in range(300)]
    assert max(len(inputs) for inputs, _ in shapes) == 512
    assert len({(len(inputs), len(targets)) for inputs, targets in shapes}) == 7
    plain = SpanCorruption(make_tokenizer(), 512, SpanConfig(mixture="ul2"))
    assert plain.mode_ids == {}


def test_a_batch_of_full_windows_has_no_padding_and_no_mask() -> None:
    objective = OBJECTIVES["t5"]
    text = "巴黎是法国的首都。The dog sleeps. " * 70
    documents = DocumentsInMemory.of_texts(objective, [text])
    stream = objective.arrange(documents, np.arange(1), 0)
    assert stream.lengths[:4].tolist() == [568] * 4
    batch = objective.collate([stream[index] for index in range(4)])
    assert batch["input_ids"].shape == (4, 512)
    assert batch["decoder_input_ids"].shape == (4, 114)
    assert batch["target_ids"].shape == (456,)
    assert objective.num_targets(batch) == 456
    assert "attention_mask" not in batch
    assert set(batch["input_ids"][:, -1].tolist()) == {END}
    targets = batch["target_ids"].view(4, 114)
    assert batch["decoder_input_ids"][:, 1:].tolist() == targets[:, :-1].tolist()
    assert batch["decoder_input_ids"][:, 0].tolist() == [0] * 4
    inputs, first = batch["input_ids"][0].tolist(), targets[0].tolist()
    assert splice(inputs, first, objective.sentinels) == stream[0]["input_ids"]


def test_sentinels_count_down_from_the_top_of_the_vocabulary() -> None:
    tokenizer = make_tokenizer()
    sentinels = SpanCorruption(tokenizer, 512).sentinels
    assert sentinels == tuple(range(len(tokenizer) - 1, len(tokenizer) - 101, -1))


def test_missing_sentinels_and_sentinels_in_the_text_are_said() -> None:
    with pytest.raises(ModelError, match=r"0 sentinels.* up to 28 spans"):
        SpanCorruption(make_tokenizer(0), 512)
    with pytest.raises(ModelError, match="27 sentinels"):
        SpanCorruption(make_tokenizer(27), 512)
    with pytest.raises(DataError, match=r"text\.txt:3"):
        SpanCorruption(make_tokenizer(28), 512).encode(TextExample("A <extra_id_4>", "text.txt:3"))


def test_an_objective_can_be_sent_to_a_worker() -> None:
    objective = pickle.loads(pickle.dumps(OBJECTIVES["t5"]))
    assert objective.encode(TextExample("dog", "here"))[0]["input_ids"]
    assert objective.fingerprint == OBJECTIVES["t5"].fingerprint


def make_mt5() -> Any:
    torch.manual_seed(0)
    return MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=364, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        make_model,
        lambda: make_model(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
        lambda: make_model(decoder_start_token_id=5),
        make_mt5,
    ],
    ids=["t5", "t5-1.1", "other-start", "mt5"],
)
def test_the_loss_and_its_gradients_are_those_of_the_model(make: Any) -> None:
    model = make()
    objective = OBJECTIVES["t5"]
    batch = objective.collate(
        [encoded_example([*range(2, 60)], 1), encoded_example([*range(9, 40)], 2)]
    )
    assert "attention_mask" in batch
    labels = torch.full(batch["decoder_input_ids"].shape, -100)
    labels.view(-1)[batch["prediction_positions"]] = batch["target_ids"]
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    own.backward()
    own = own.detach()
    expected = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    loss = objective.loss_sum(model, batch) / objective.num_targets(batch)
    loss.backward()
    loss = loss.detach()
    # Sums of a few hundred float32 terms, in another order.
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    scores = objective.score(model, batch)
    assert scores.loss_sum / scores.num_targets == pytest.approx(float(own), rel=1e-6)
    require_plain_decoder_head(model)
    require_plain_decoder_head(model.to(torch.bfloat16))


def test_logits_that_are_transformed_once_more_are_refused() -> None:
    model = make_model()
    model.config.scale_decoder_outputs = True
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.square())
    with pytest.raises(ModelError, match="`t5`"):
        require_plain_decoder_head(model)


def test_eight_texts_are_learned_by_heart() -> None:
    objective = SpanCorruption(make_tokenizer(), 48)
    texts = [f"{word} is number {index}, 第{index}个。" for index, word in enumerate("abcdefgh")]
    examples = [
        objective.encode(TextExample(text, f"text.txt:{index + 1}"))[0]
        for index, text in enumerate(texts)
    ]
    model = make_model(d_model=64, d_kv=16, d_ff=128, feed_forward_proj="gated-gelu")
    batch = objective.collate(examples)
    learn_by_heart(objective, model, batch, steps=150, lr=3e-3, weight_decay=0.0)


def test_noise_leaves_enough_text_for_windows_to_end() -> None:
    """A window is text until what is kept of it fills the inputs."""
    with pytest.raises(ConfigError, match=r"`noise_density` .* at most 0\.9"):
        build_config(SpanConfig, {"noise_density": 0.999})
    spans = SpanConfig(noise_density=0.9, mean_length=64)
    objective = SpanCorruption(make_tokenizer(), 512, spans)
    assert objective.window_tokens == 4484  # not 5,110: a sentinel stands for each span


@pytest.mark.parametrize(
    ("length", "spans", "modes"),
    [
        (4096, {}, False),
        (1000, {"noise_density": 0.5}, False),
        (1000, {"mixture": "ul2"}, True),
        (2**20, {}, False),
    ],
)
def test_what_is_said_of_too_long_inputs_is_what_is_possible(
    length: int, spans: dict[str, Any], modes: bool
) -> None:
    tokenizer = make_tokenizer(modes=modes)

    def make(length: int, **more: Any) -> SpanCorruption:
        return SpanCorruption(tokenizer, length, SpanConfig(**{**spans, **more}))

    with pytest.raises(ModelError, match=f"`objective.length: {length}` reads") as caught:
        make(length)
    said = re.findall(r"`(objective\.[\w.]+)` to (\d+)", str(caught.value.hint))
    values = {name: int(value) for name, value in said}
    longest = values.pop("objective.length")
    make(longest)
    with pytest.raises(ModelError):
        make(longest + 1)
    if modes:
        assert not values
        return
    mean_length = values.pop("objective.spans.mean_length")
    make(length, mean_length=mean_length)
    with pytest.raises(ModelError):
        make(length, mean_length=mean_length - 1)


@given(st.integers(8, 600), st.floats(0.01, 0.9), st.floats(1, 70) | st.none())
def test_the_most_text_that_fits_is_found(
    length: int, density: float, mean_length: float | None
) -> None:
    denoiser = Denoiser(density, mean_length)
    tokens = 2
    while denoiser.lengths(tokens + 1)[0] <= length:
        tokens += 1
    assert raw_length(length, denoiser)[0] == tokens
