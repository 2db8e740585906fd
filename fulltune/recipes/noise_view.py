"""Pre-training examples by token, with the noise that the first epoch of a run draws for them.

Held-out ones are only counted, with the noise of an evaluation.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fulltune.data.encoding import EncodedExample
from fulltune.data.preview_facts import ArrangedFacts
from fulltune.data.preview_view import SampleView, TokenState, view_states
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.masked_lm import MaskedLM
from fulltune.objectives.noise import noise_seed
from fulltune.objectives.permutation_lm import PermutationLM
from fulltune.objectives.sentence_order import SentenceOrder
from fulltune.objectives.span_corruption import SpanCorruption
from fulltune.recipes.prepare import Prepared

NoisyObjective: TypeAlias = CausalStream | MaskedLM | PermutationLM | SentenceOrder | SpanCorruption
Shown: TypeAlias = list[tuple[int, TokenState]]
"""Tokens in the order in which they are shown, and what becomes of each."""

NUM_COUNTED = 200
"""Examples of a split whose noise is drawn to say how many tokens are predicted."""

_RELATIONS = {
    "next": ("the second segment follows the first", "the second is from another document"),
    "order": ("in order", "swapped"),
}


def count_examples(prepared: Prepared, seed: int) -> tuple[ArrangedFacts, ...]:
    """What the documents of each split became."""
    objective = _noisy(prepared)
    counted = []
    for name, indices in (("train", prepared.train), ("validation", prepared.validation)):
        if not len(indices):
            continue
        chosen = np.random.default_rng(0).permutation(indices)[:NUM_COUNTED]
        # Held-out examples have the noise of an evaluation, which may be less.
        drawn = seed if name == "train" else None
        examples = [_example(prepared, int(index), drawn) for index in np.sort(chosen)]
        predicted = sum(objective.num_targets(objective.collate([each])) for each in examples)
        lengths = prepared.dataset.lengths[indices]
        num_read = int(prepared.dataset.lengths[chosen].sum())
        if isinstance(objective, CausalStream):  # what fill-in-the-middle adds is predicted too
            num_read = sum(len(objective.rearranged(each)["input_ids"]) for each in examples)
        counted.append(
            ArrangedFacts(
                name=name,
                num_examples=len(indices),
                num_tokens=int(lengths.sum(dtype=np.int64)),
                longest=int(lengths.max()),
                num_counted=len(examples),
                num_predicted=predicted,
                predicted_share=predicted / num_read,
            )
        )
    return tuple(counted)


def make_noisy_samples(prepared: Prepared, num_samples: int, seed: int) -> list[SampleView]:
    """The first training examples, as the model reads them in the first epoch."""
    objective = _noisy(prepared)
    views = []
    for index in prepared.train[:num_samples].tolist():
        example = _example(prepared, index, seed)
        shown = show(objective, example)

        def decode(ids: list[int]) -> str:
            return str(objective.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        tokens = view_states(decode, [token for token, _ in shown], [state for _, state in shown])
        views.append(
            SampleView(prepared.dataset.where(index), _relation(objective, example), tokens)
        )
    return views


def show(objective: NoisyObjective, example: EncodedExample) -> Shown:
    """Tokens of an example: read, predicted, and what stands in place of the predicted ones."""
    if isinstance(objective, SpanCorruption):
        return _show_spans(objective, example)
    batch = objective.collate([example])
    if isinstance(objective, MaskedLM | SentenceOrder):
        return _show_masked(batch, len(example["input_ids"]))
    if isinstance(objective, PermutationLM):
        return _show_permuted(batch)
    predicted = {place + 1 for place in batch["prediction_positions"].tolist()}
    ids = objective.rearranged(example)["input_ids"]
    return [
        (token, "trained" if place in predicted else "context") for place, token in enumerate(ids)
    ]


def _show_masked(batch: dict[str, Any], num_tokens: int) -> Shown:
    """What stands in place of a predicted token is left out where it is the token itself."""
    places, targets = batch["target_positions"].tolist(), batch["target_ids"].tolist()
    predicted = dict(zip(places, targets, strict=True))
    shown: Shown = []
    for place, token in enumerate(batch["input_ids"].flatten()[:num_tokens].tolist()):
        target = predicted.get(place)
        if target != token:
            shown.append((token, "context" if target is None else "replaced"))
        if target is not None:
            shown.append((target, "trained"))
    return shown


def _show_permuted(batch: dict[str, Any]) -> Shown:
    """All tokens are read as they are; who sees whom is the order's, which is not shown."""
    places = batch["target_mapping"].flatten(0, 1)[batch["target_rows"]].argmax(-1)
    predicted = set(places.tolist())
    return [
        (token, "trained" if place in predicted else "context")
        for place, token in enumerate(batch["input_ids"][0].tolist())
    ]


def _show_spans(objective: SpanCorruption, example: EncodedExample) -> Shown:
    """Each sentinel is followed by the span it stands for; what no sentinel announces is last."""
    inputs, targets = objective.corrupt(example)
    sentinels = set(objective.sentinels)
    spans: dict[int | None, list[int]] = {}
    sentinel: int | None = None
    for token in targets:
        if token in sentinels:
            sentinel = token
            spans[sentinel] = []
        else:
            spans.setdefault(sentinel, []).append(token)
    shown: Shown = []
    last = spans[sentinel].pop()  # the end token, behind the last span
    for token in inputs:
        shown.append((token, "replaced" if token in spans else "context"))
        shown += [(each, "trained") for each in spans.get(token, ())]
    return [*shown, *((each, "trained") for each in [*spans.get(None, ()), last])]


def _relation(objective: NoisyObjective, example: EncodedExample) -> str | None:
    if not isinstance(objective, SentenceOrder):
        return None
    return _RELATIONS[objective.pairs.kind][int(example["labels"][0])]


def _example(prepared: Prepared, index: int, seed: int | None) -> EncodedExample:
    example = prepared.dataset[index]
    if seed is not None:
        example["noise_seed"] = noise_seed(seed, 0, index)
    return example


def _noisy(prepared: Prepared) -> NoisyObjective:
    objective = prepared.objective
    assert isinstance(objective, NoisyObjective)
    return objective
