"""Many labels, numbers, and the other losses of one label: their definitions, and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune.data.tasks import ClassificationExample, MultiLabelExample, RegressionExample
from fulltune.errors import ConfigError, DataError
from fulltune.models.loading import Head, load_model, load_model_config, load_tokenizer
from fulltune.objectives.classification import Classification
from fulltune.objectives.document_reader import document_logits
from fulltune.objectives.multi_label import MultiLabel, start_at_shares
from fulltune.objectives.of_task import ObjectiveSettings, make_task_objective
from fulltune.objectives.regression import Regression

TEXTS = ("where is the house", "who", "how many birds live near the river")
LABELS = ("a", "b", "c")


def loaded(path: Path, head: Head, labels: tuple[str, ...] | None) -> PreTrainedModel:
    model = load_model(path, head=head, labels=labels, dtype=torch.float32, attention="fulltune")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def own_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Tensor) -> float:
    """Transformers' own, which is a mean over the documents."""
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        return float(model(**batch, labels=labels).loss)


def test_the_loss_of_many_labels_is_transformers_own(tiny_bert: Path) -> None:
    model, tokenizer = loaded(tiny_bert, "multi_label", LABELS), load_tokenizer(tiny_bert)
    objective = MultiLabel(tokenizer, 64, "first", labels=LABELS)
    has = [("a", "c"), (), ("b",)]
    examples = [
        objective.encode(MultiLabelExample(text, None, labels, "rows:1"))[0]
        for text, labels in zip(TEXTS, has, strict=True)
    ]
    batch = objective.collate(examples)
    assert batch["has_label"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    ours = float(objective.loss_sum(model, batch).detach()) / objective.num_targets(batch)
    assert ours == pytest.approx(own_loss(model, tokenizer, batch["has_label"]), rel=1e-5)
    scores = objective.score(model, batch)
    assert scores.loss_sum / 3 == pytest.approx(ours, rel=1e-5)
    assert [output.has_label_C.tolist() for output in scores.outputs][1] == [False] * 3


def test_a_new_head_begins_at_the_shares_of_its_labels_and_a_trained_one_as_it_is(
    tiny_bert: Path,
) -> None:
    model = load_model(
        tiny_bert, head="multi_label", labels=LABELS, dtype=torch.float32, attention="fulltune"
    )
    shares = (0.5, 0.01, 0.0)
    assert start_at_shares(model, shares)
    torch.testing.assert_close(
        model.classifier.bias.sigmoid(), torch.tensor(shares).clamp(1e-4), atol=1e-6, rtol=1e-5
    )
    before = model.classifier.bias.clone()
    assert not start_at_shares(model, (0.2, 0.2, 0.2))
    assert torch.equal(model.classifier.bias, before)


def test_the_loss_of_a_number_is_transformers_own(tiny_bert: Path) -> None:
    model, tokenizer = loaded(tiny_bert, "regression", None), load_tokenizer(tiny_bert)
    objective = Regression(tokenizer, 64, "first")
    numbers = [0.1, -3.5, 1e-7]
    examples = [
        objective.encode(RegressionExample(text, None, number, "rows:1"))[0]
        for text, number in zip(TEXTS, numbers, strict=True)
    ]
    batch = objective.collate(examples)
    assert batch["scores"].tolist() == torch.tensor(numbers).tolist()
    ours = float(objective.loss_sum(model, batch).detach()) / objective.num_targets(batch)
    assert ours == pytest.approx(own_loss(model, tokenizer, batch["scores"]), rel=1e-5)


def classified(tiny_bert: Path, **changes: Any) -> tuple[Tensor, float]:
    """The logits of three documents of classes a, c and b, and the sum of their losses."""
    objective = Classification(load_tokenizer(tiny_bert), 64, "first", labels=LABELS, **changes)
    model = loaded(tiny_bert, "classification", LABELS)
    examples = [
        objective.encode(ClassificationExample(text, None, label, "rows:1"))[0]
        for text, label in zip(TEXTS, "acb", strict=True)
    ]
    batch = objective.collate(examples)
    with torch.no_grad():
        return document_logits(model, batch), float(objective.loss_sum(model, batch))


def test_focal_loss_counts_what_is_told_well_for_little(tiny_bert: Path) -> None:
    logits_DC, ours = classified(tiny_bert, loss="focal")
    right_D = logits_DC.softmax(-1)[range(3), [0, 2, 1]]
    assert ours == pytest.approx(float(-((1 - right_D) ** 2 * right_D.log()).sum()), rel=1e-5)


def test_ordinal_loss_is_the_squared_earth_movers_distance(tiny_bert: Path) -> None:
    logits_DC, ours = classified(tiny_bert, loss="ordinal")
    below_DC = logits_DC.softmax(-1).cumsum(-1)
    right_DC = torch.tensor([[1.0, 1, 1], [0, 0, 1], [0, 1, 1]])
    assert ours == pytest.approx(float((below_DC - right_DC).square().sum()), rel=1e-5)


def test_class_weights_multiply_each_documents_loss(tiny_bert: Path) -> None:
    logits_DC, ours = classified(tiny_bert, class_weights=(0.5, 2.0, 3.0))
    losses_D = F.cross_entropy(logits_DC, torch.tensor([0, 2, 1]), reduction="none")
    assert ours == pytest.approx(float(losses_D @ torch.tensor([0.5, 3.0, 2.0])), rel=1e-5)


def test_a_setting_without_effect_is_refused(tiny_bert: Path) -> None:
    settings = {"tokenizer": load_tokenizer(tiny_bert), "config": load_model_config(tiny_bert)}
    for kind, more, word in (
        ("multi_label", {"label_smoothing": 0.1}, "task.kind: multi_label"),
        ("regression", {"z_loss": 0.1}, "task.kind: regression"),
        ("classification", {"label_smoothing": 0.1, "loss": "focal"}, "task.loss: focal"),
    ):
        with pytest.raises(ConfigError, match=f"no effect with `{word}`"):
            make_task_objective(kind, ObjectiveSettings(**settings, max_length=64, **more))


def test_a_label_that_the_model_lacks_names_its_row(tiny_bert: Path) -> None:
    objective = MultiLabel(load_tokenizer(tiny_bert), 64, "first", labels=LABELS)
    example = objective.encode(MultiLabelExample("who", None, ("d",), "rows.jsonl:7"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: label 'd'"):
        objective.collate(example)
