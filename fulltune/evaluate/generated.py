"""Answers generated for sources, scored against their targets or shown beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from fulltune.data.tasks import ChatExample, Example, Message, SourceTargetExample
from fulltune.errors import DataError
from fulltune.evaluate.evaluator import Examples, Sample, sample_answers
from fulltune.evaluate.text_metrics import Tokenization, text_scores
from fulltune.inference import GenerationSettings, generate_from_ids, in_chunks
from fulltune.objectives.base import Objective
from fulltune.objectives.prompted_lm import PromptedLM
from fulltune.objectives.sequence_to_sequence import SequenceToSequence, split_pair

TextToText: TypeAlias = SequenceToSequence | PromptedLM
Indices: TypeAlias = Sequence[int] | npt.NDArray[np.int64]

SHORTEST_LIMIT = 16
SAMPLE_TOKENS = 64
"""Longest answer that is shown before and after training."""


@dataclass(frozen=True)
class GeneratedScores:
    """What answers to held-out sources are worth."""

    metrics: dict[str, float]
    details: dict[str, Any]
    """`signatures` of the metrics and of the search, and `num_generated`."""
    answers: list[str]
    """In the order of the examples."""


def score_generated(
    model: PreTrainedModel,
    objective: TextToText,
    dataset: Examples,
    indices: Indices,
    *,
    settings: GenerationSettings | None = None,
    tokenize: Tokenization = "auto",
    batch_tokens: int = 8192,
    window: int = 512,
) -> GeneratedScores:
    """Answer the sources of encoded examples and score the answers against their targets.

    Args:
        model: of the objective's head; left exactly as found.
        objective: encoded the examples.
        dataset: the examples.
        indices: positions in ``dataset`` that are answered.
        settings: how; None is greedy, with twice the tokens of the longest target for an answer:
            what is longer than that does not stop.
        tokenize: of BLEU; see `text_scores`.
        batch_tokens: most tokens of a batch, padding and answers included.
        window: examples held at a time.

    Raises:
        DataError: there is nothing to answer.
        MissingExtraError: the packages of the metrics are not installed.
    """
    if settings is None:
        settings = default_settings(objective, dataset, indices)
    answers: list[str] = []
    references: list[str] = []
    stopped = 0
    for places in in_chunks(indices, window):
        examples = [dataset[int(place)] for place in places]
        generated = generate_from_ids(
            model,
            objective.tokenizer,
            [split_pair(example)[0] for example in examples],
            settings=settings,
            where=[example["where"] for example in examples],
            batch_tokens=batch_tokens,
        )
        answers += [answer.text for answer in generated]
        stopped += sum(answer.stopped for answer in generated)
        references += [example["reference"] for example in examples]
    scores = text_scores(answers, references, tokenize=tokenize)
    return GeneratedScores(
        scores.metrics,
        {
            "signatures": {**scores.signatures, "search": describe_search(settings)},
            "num_generated": len(answers),
            "num_stopped": stopped,
        },
        answers,
    )


def default_settings(
    objective: TextToText, dataset: Examples, indices: Indices
) -> GenerationSettings:
    """Greedy answers of at most twice the longest target's tokens, and no more than were trained.

    Raises:
        DataError: there is no example.
    """
    lengths = [sum(dataset[int(index)]["targets"]) for index in indices]
    if not lengths:
        raise DataError(
            "there is no example to answer",
            hint="give a validation split that is not empty, or generate nothing",
        )
    longest = max(SHORTEST_LIMIT, 2 * max(lengths))
    return GenerationSettings(max_new_tokens=min(longest, objective.max_target_length))


def describe_search(settings: GenerationSettings) -> str:
    """How answers were searched for, as a signature."""
    if settings.num_beams > 1:
        parts = [f"beams:{settings.num_beams}", f"length_penalty:{settings.length_penalty:g}"]
    elif settings.temperature:
        parts = [f"temperature:{settings.temperature:g}", f"seed:{settings.seed}"]
    else:
        parts = ["greedy"]
    if settings.no_repeat_ngram_size:
        parts.append(f"no_repeat_ngram:{settings.no_repeat_ngram_size}")
    if settings.prefix_text:
        parts.append(f"prefix:{settings.prefix_text}")
    return "|".join([*parts, f"max_new_tokens:{settings.max_new_tokens}"])


def sample_examples(
    model: PreTrainedModel, objective: Objective, examples: Iterable[Example], *, num_samples: int
) -> list[Sample]:
    """Answer the first ``num_samples`` conversations or sources that leave room for it."""
    listed = list(examples)
    pairs = [example for example in listed if isinstance(example, SourceTargetExample)]
    if not pairs:
        conversations = [example for example in listed if isinstance(example, ChatExample)]
        return sample_answers(model, objective.tokenizer, conversations, num_samples=num_samples)
    assert isinstance(objective, SequenceToSequence | PromptedLM)
    chosen: list[tuple[SourceTargetExample, list[int]]] = []
    for example in pairs[: 4 * num_samples]:
        if len(chosen) < num_samples:
            try:
                chosen.append((example, objective.prompt_ids(example)))
            except DataError:  # too long for the model: another one is shown
                continue
    answers = generate_from_ids(
        model,
        objective.tokenizer,
        [ids for _, ids in chosen],
        settings=GenerationSettings(max_new_tokens=min(SAMPLE_TOKENS, objective.max_target_length)),
        where=[example.where for example, _ in chosen],
    )
    return [
        Sample(
            (Message("user", example.source),), answer.text, example.target or "", answer.stopped
        )
        for (example, _), answer in zip(chosen, answers, strict=True)
    ]
