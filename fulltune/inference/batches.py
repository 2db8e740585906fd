"""What every answer is made in: evaluation mode, and batches by length."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from fulltune.data.encoding import EncodedExample
from fulltune.data.packing import group_by_length, pack
from fulltune.data.tasks import Example
from fulltune.errors import DataError
from fulltune.models.evaluation_mode import evaluation_mode
from fulltune.objectives.base import Objective, to_device
from fulltune.runtime import preserved_random_state

T = TypeVar("T")


@contextmanager
def answering(model: PreTrainedModel) -> Generator[None]:
    """Evaluation mode without gradients; modes and random states are put back afterwards.

    Training that is interrupted by answers goes on exactly as if nothing had happened.
    """
    own_config = getattr(model, "generation_config", None)
    with preserved_random_state(), torch.no_grad(), evaluation_mode(model):
        if own_config is not None:
            # `generate` fills what we leave open from here, and warns about combinations.
            model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            if own_config is not None:
                model.generation_config = own_config


def cut_into_batches(
    examples: Sequence[EncodedExample], objective: Objective, batch_tokens: int
) -> list[list[int]]:
    """Places of ``examples`` in batches of at most ``batch_tokens``, packed or padded."""
    lengths = np.array([len(example["input_ids"]) for example in examples])
    if objective.packing:
        cut = pack(lengths, batch_tokens)
    else:
        cut = group_by_length(lengths, token_budget=batch_tokens)
    return [places.tolist() for places in cut]


def encode_whole(objective: Objective, examples: Sequence[Example]) -> list[EncodedExample]:
    """Examples of which each is one encoded example.

    Raises:
        DataError: one of them is dropped, or does not fit the model.
    """
    encoded = []
    for example in examples:
        pieces = objective.encode(example)
        if not pieces:
            raise DataError(
                f"{example.where}: the text is longer than the context, and was dropped",
                hint="set `task.too_long=truncate`, or shorten the text",
            )
        encoded.append(pieces[0])
    return encoded


def score_examples(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[EncodedExample],
    *,
    batch_tokens: int = 8192,
) -> list[Any]:
    """The `Scores.outputs` of encoded examples, in their order, whatever batches they are in.

    Args:
        model: of the objective's head; its mode and torch's random states are left as found.
        objective: gives one output for each document.
        examples: encoded by it.
        batch_tokens: most tokens in a batch, padding included.
    """
    device = next(model.parameters()).device
    outputs: list[Any] = [None] * len(examples)
    with answering(model):
        for places in cut_into_batches(examples, objective, batch_tokens):
            batch = objective.collate([examples[place] for place in places])
            scored = objective.score(model, to_device(batch, device)).outputs
            for place, output in zip(places, scored, strict=True):
                outputs[place] = output
    return outputs


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
