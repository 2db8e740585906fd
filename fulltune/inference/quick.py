"""Labels from products in bf16, and exactly once more where that could change one.

Where a processor multiplies bf16 many times as fast as float32, so does a classifier label. What
rounding does to its logits is measured on a few examples of every chunk, and each example whose two
likeliest labels are nearer than several times that is scored in the model's own dtype.

Shape suffixes: C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fulltune.data.encoding import EncodedExample
from fulltune.inference.batches import score_examples
from fulltune.objectives.classification import Classification, ClassificationOutput

NUM_PROBES = 16
"""Examples of a chunk whose rounding is measured."""

SAFETY = 4.0
"""How much larger the rounding of any other logit is taken to be than the largest measured."""


def bf16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in bf16, beside the one that is given."""
    copied = copy.deepcopy(model)
    cast(Any, copied).to(torch.bfloat16)
    return copied


def score_quickly(
    model: PreTrainedModel,
    quick: PreTrainedModel,
    objective: Classification,
    encoded: Sequence[EncodedExample],
    *,
    batch_tokens: int = 8192,
) -> list[ClassificationOutput]:
    """The outputs of `score_examples`, some of them rounded, but the likeliest label the same.

    Args:
        model: the classifier, in float32.
        quick: what `bf16_copy` made of it.
        objective: that of the model.
        encoded: a chunk of examples.
        batch_tokens: most tokens in a batch, padding included.
    """
    rounded = score_examples(quick, objective, encoded, batch_tokens=batch_tokens)
    exact: dict[int, ClassificationOutput] = {}

    def score(places: Sequence[int]) -> None:
        examples = [encoded[place] for place in places]
        found = score_examples(model, objective, examples, batch_tokens=batch_tokens)
        exact.update(zip(places, found, strict=True))

    score(range(0, len(encoded), max(1, len(encoded) // NUM_PROBES)))
    rounding = max(
        float((output.logits_C - rounded[place].logits_C).abs().max())
        for place, output in exact.items()
    )
    # Two logits that are rounded towards each other meet from twice the rounding.
    near = 2 * SAFETY * rounding
    score(
        [
            place
            for place, output in enumerate(rounded)
            if place not in exact and _lead(output) <= near
        ]
    )
    return [exact.get(place, output) for place, output in enumerate(rounded)]


def _lead(output: ClassificationOutput) -> float:
    """By how much the likeliest label's logit is above the next one's."""
    first, second = output.logits_C.topk(2).values.tolist()
    return float(first - second)
