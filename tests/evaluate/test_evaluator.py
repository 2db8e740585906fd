from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import ChatExample, ClassificationExample, Message, TextExample
from fulltune.errors import CheckpointError, ConfigError, DataError
from fulltune.evaluate.evaluator import (
    RETENTION_SOURCE,
    BestTracker,
    EvaluateConfig,
    encode_retention,
    evaluate_model,
    evaluate_retention,
    retention_reader,
    retention_source,
    sample_answers,
)
from fulltune.inference import GenerationSettings, Loaded, build_objective, load_for_inference
from fulltune.objectives.base import to_device
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.classification import Classification

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return load_for_inference(str(tiny_gpt2), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(chat_file: Path) -> list[ChatExample]:
    rows = [json.loads(line) for line in chat_file.read_text(encoding="utf-8").splitlines()]
    return [
        ChatExample(
            tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]),
            f"chat.jsonl:{number}",
        )
        for number, row in enumerate(rows, start=1)
    ]


def encode_all(loaded: Loaded, conversations: list[ChatExample]) -> list[EncodedExample]:
    objective = build_objective(loaded)
    return [encoded for example in conversations for encoded in objective.encode(example)]


def test_the_loss_is_the_mean_over_targets_of_a_plain_forward_pass(
    gpt2: Loaded, conversations: list[ChatExample]
) -> None:
    dataset = encode_all(gpt2, conversations)
    indices = [3, 0, 7, 21]
    costs: list[float] = []
    for index in indices:
        tokens, targets = dataset[index]["input_ids"], dataset[index]["targets"]
        with torch.no_grad():
            log_probabilities = gpt2.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        costs += [
            -float(log_probabilities[place - 1, tokens[place]])
            for place in range(1, len(tokens))
            if targets[place]
        ]
    result = evaluate_model(gpt2.model, build_objective(gpt2), dataset, indices, kind="chat")
    assert result.num_examples == 4
    assert result.num_targets == len(costs)
    assert result.metrics["loss"] == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))


def test_the_result_does_not_depend_on_batches_or_windows(
    gpt2: Loaded, conversations: list[ChatExample]
) -> None:
    dataset, objective = encode_all(gpt2, conversations), build_objective(gpt2)
    whole = evaluate_model(gpt2.model, objective, dataset, range(len(dataset)), kind="chat")
    cut = evaluate_model(
        gpt2.model, objective, dataset, iter(range(len(dataset))),
        kind="chat", micro_batch_tokens=100, window=7,
    )  # fmt: skip
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert cut.num_targets == whole.num_targets


def train(loaded: Loaded, dataset: list[EncodedExample], *, evaluates: bool) -> torch.Tensor:
    """Three steps with dropout; the weights afterwards."""
    model, objective = copy.deepcopy(loaded.model), build_objective(loaded)
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        batch = to_device(objective.collate(dataset[step : step + 2]), CPU)
        loss = objective.loss_sum(model, batch) / objective.num_targets(batch)
        loss.backward()
        if evaluates:  # between the backward pass and the update, where it could harm most
            evaluate_model(model, objective, dataset, range(8), kind="chat")
            sample_answers(
                model, loaded.tokenizer,
                [ChatExample((Message("user", "Hi"), Message("assistant", "")), "here")],
                num_samples=1, settings=GenerationSettings(max_new_tokens=3, temperature=1.0),
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_evaluating_does_not_change_the_training_it_interrupts(
    gpt2: Loaded, conversations: list[ChatExample]
) -> None:
    dataset = encode_all(gpt2, conversations)
    assert gpt2.model.config.resid_pdrop > 0
    undisturbed = train(gpt2, dataset, evaluates=False)
    assert torch.equal(undisturbed, train(gpt2, dataset, evaluates=True))


def test_a_classifier_is_scored_with_its_labels_by_name(tiny_bert: Path, tmp_path: Path) -> None:
    names = ["number", "person", "place"]
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, id2label=dict(enumerate(names)), label2id={}
    )
    model.save_pretrained(tmp_path)
    for file in tiny_bert.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = load_for_inference(str(tmp_path), device=CPU, dtype=torch.float32)
    objective = build_objective(loaded)
    dataset = [
        objective.encode(ClassificationExample(f"house {i}", None, names[i % 2], f"a:{i}"))[0]
        for i in range(6)
    ]
    result = evaluate_model(loaded.model, objective, dataset, range(6), kind="classification")
    assert set(result.metrics) == {"loss", "accuracy", "macro_f1", "weighted_f1", "matthews"}
    assert [result.details["per_label"][name]["support"] for name in names] == [3, 3, 0]
    batch = objective.collate(dataset)
    with torch.no_grad():
        expected = float(objective.loss_sum(loaded.model, batch)) / 6
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_nothing_to_evaluate_is_an_error(gpt2: Loaded) -> None:
    with pytest.raises(DataError, match="no example to evaluate"):
        evaluate_model(gpt2.model, build_objective(gpt2), [], [], kind="chat")


def test_samples_answer_the_last_turn_and_keep_the_reference(
    gpt2: Loaded, conversations: list[ChatExample]
) -> None:
    too_long = ChatExample((Message("user", "x " * 400), Message("assistant", "y")), "long")
    samples = sample_answers(
        gpt2.model, gpt2.tokenizer, [too_long, *conversations],
        num_samples=3, settings=GenerationSettings(max_new_tokens=4),
    )  # fmt: skip
    assert [sample.reference for sample in samples] == [
        conversation.messages[-1].content for conversation in conversations[:3]
    ]
    assert samples[2].prompt == conversations[2].messages[:-1]


def test_retention_reads_windows_of_a_text_up_to_its_limit(gpt2: Loaded) -> None:
    objective = build_objective(gpt2)
    assert isinstance(objective, CausalLM)
    documents = [TextExample("The quick brown fox jumps over the lazy dog. " * 40, "text:1")] * 5
    windows = encode_retention(documents, objective, num_tokens=300, window_tokens=64)
    total = sum(len(window["input_ids"]) for window in windows)
    assert 300 <= total < 300 + 64
    assert max(len(window["input_ids"]) for window in windows) == 64
    loss = evaluate_retention(gpt2.model, objective, windows)
    assert 0 < loss < 2 * math.log(400)
    with pytest.raises(DataError, match="retention text is empty"):
        encode_retention([], objective)


def test_retention_reads_the_source_that_is_named() -> None:
    assert retention_source(EvaluateConfig()) is None
    assert retention_source(EvaluateConfig(retention=True)) == RETENTION_SOURCE
    assert retention_source(EvaluateConfig(retention="notes.txt")) == "notes.txt"


def test_retention_is_refused_where_no_head_predicts_text(gpt2: Loaded) -> None:
    objective = build_objective(gpt2)
    assert isinstance(objective, CausalLM)
    assert retention_reader(objective) is objective
    assert retention_reader(CausalStream(objective)) is objective
    with pytest.raises(ConfigError, match="no head that predicts the next token"):
        retention_reader(Classification(gpt2.tokenizer, 8, "first", labels=("a", "b")))


def test_of_equal_evaluations_the_earlier_is_the_best_and_nan_never_is() -> None:
    tracker = BestTracker("loss", stop_after=3)
    assert not tracker.update(0, {"loss": math.nan})
    assert tracker.update(10, {"loss": 2.0})
    assert not tracker.update(20, {"loss": 2.0})
    assert not tracker.update(30, {"loss": math.nan})
    assert not tracker.should_stop
    assert not tracker.update(40, {"loss": math.inf})
    assert tracker.should_stop
    assert (tracker.best_step, tracker.best_value) == (10, 2.0)


def test_a_metric_where_higher_is_better_is_followed_upwards() -> None:
    tracker = BestTracker("accuracy")
    assert tracker.update(1, {"accuracy": 0.0, "loss": 9.0})
    assert tracker.update(2, {"accuracy": 0.5, "loss": 10.0})
    assert not tracker.update(3, {"accuracy": 0.4, "loss": 1.0})
    assert not tracker.should_stop


def test_a_tracker_goes_on_from_its_state_through_json() -> None:
    values = [3.0, 2.0, 2.5, 2.4, 2.2]
    unbroken = BestTracker("loss", stop_after=3)
    for step, value in enumerate(values):
        unbroken.update(step, {"loss": value})
    first = BestTracker("loss", stop_after=3)
    for step, value in enumerate(values[:3]):
        first.update(step, {"loss": value})
    second = BestTracker("loss", stop_after=3)
    second.load_state(json.loads(json.dumps(first.state())))
    for step, value in enumerate(values[3:], start=3):
        second.update(step, {"loss": value})
    assert second == unbroken
    assert second.should_stop
    with pytest.raises(CheckpointError, match="tracked the best `loss`"):
        BestTracker("accuracy").load_state(first.state())


def test_a_metric_that_was_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match="did not measure") as caught:
        BestTracker("accuracy").update(1, {"loss": 1.0})
    assert "`loss`" in str(caught.value.hint)
