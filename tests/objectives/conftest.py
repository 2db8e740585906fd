"""What the tests of several objectives make or do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune.models.loading import load_tokenizer
from fulltune.objectives.base import Batch, Objective, Scores


@pytest.fixture(scope="session")
def tokenizer(tiny_bert: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_bert)


def small_encoder(config: type, model: type, vocab_size: int, **values: Any) -> Any:
    """Two layers without dropout, of a family with BERT's fields, always with the same weights."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return model(config(**fields, **values))


def disturb(model: PreTrainedModel) -> None:
    """Move all weights, so that biases and norms are not what they begin as."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def labels_of(batch: Batch) -> Tensor:
    """The targets [B, T] of a padded batch of masked tokens, as a model itself takes them."""
    labels_BT = torch.full_like(batch["input_ids"], -100)
    labels_BT.view(-1)[batch["target_positions"]] = batch["target_ids"]
    return labels_BT


def learn_by_heart(
    objective: Objective, model: PreTrainedModel, batch: Batch, *, steps: int, **values: float
) -> Scores:
    """The scores of a batch after training on it alone until every target is known."""
    optimizer = torch.optim.AdamW(model.parameters(), **values)
    for _ in range(steps):
        optimizer.zero_grad()
        (objective.loss_sum(model, batch) / objective.num_targets(batch)).backward()
        optimizer.step()
    scores = objective.score(model, batch)
    assert scores.loss_sum / scores.num_targets < 0.05
    assert scores.num_correct == scores.num_targets
    return scores
