"""What a model of each kind of task predicts for a row: the one table that `predict` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from fulltune.data.tasks import (
    ChatExample,
    ClassificationExample,
    Example,
    Message,
    QuestionExample,
    SourceTargetExample,
    TaggingExample,
    TaskKind,
    TextExample,
)
from fulltune.inference.batches import encode_whole, score_examples
from fulltune.inference.extraction import answer_questions
from fulltune.inference.generation import (
    Answer,
    GenerationSettings,
    generate,
    generate_from_ids,
    generate_text,
)
from fulltune.inference.labelling import classify
from fulltune.inference.loading import Loaded
from fulltune.inference.tagging import tag
from fulltune.objectives.base import Objective
from fulltune.objectives.classification import Classification
from fulltune.objectives.multi_label import MultiLabel
from fulltune.objectives.prompted_lm import PromptedLM, with_room
from fulltune.objectives.question_answering import QuestionAnswering
from fulltune.objectives.sequence_to_sequence import SequenceToSequence
from fulltune.objectives.token_classification import TokenClassification

Predict: TypeAlias = Callable[
    [Loaded, Objective, Sequence[Example], GenerationSettings | None, int], list[dict[str, Any]]
]
"""Model, its objective, examples, how answers are generated and the most tokens of a batch -> what
is predicted for each example, as plain JSON."""


@dataclass(frozen=True)
class Predictor:
    """How a kind of task is predicted."""

    predict: Predict
    rows: int
    """Rows between two writes: few enough to lose little, many enough for full batches."""
    generates: bool
    """Whether `GenerationSettings` have an effect."""
    truncates: bool
    """Whether `too_long` has an effect."""


def _label(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    labelled = classify(
        loaded.model,
        cast(Classification, objective),
        cast(Sequence[ClassificationExample], examples),
        batch_tokens=batch_tokens,
        quick=loaded.quick,
    )
    return [
        {
            "label": prediction.label,
            "probability": prediction.probabilities[prediction.label],
            "probabilities": prediction.probabilities,
        }
        for prediction in labelled
    ]


def _extract(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    found = answer_questions(
        loaded.model,
        cast(QuestionAnswering, objective),
        cast(Sequence[QuestionExample], examples),
        batch_tokens=batch_tokens,
    )
    return [answer.as_json() for answer in found]


def _tag(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    return tag(
        loaded.model,
        cast(TokenClassification, objective),
        cast(Sequence[TaggingExample], examples),
        batch_tokens=batch_tokens,
    )


def _answer(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """A conversation that ends with the assistant's turn is answered from before that turn."""
    answers = generate(
        loaded.model,
        loaded.tokenizer,
        [_before_answer(cast(ChatExample, example).messages) for example in examples],
        settings=settings,
        where=[example.where for example in examples],
        batch_tokens=batch_tokens,
    )
    return _as_json(answers)


def _before_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return messages


def _continue(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    answers = generate_text(
        loaded.model,
        loaded.tokenizer,
        [cast(TextExample, example).text for example in examples],
        settings=settings,
        where=[example.where for example in examples],
        batch_tokens=batch_tokens,
    )
    return _as_json(answers)


def _write_targets(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    settings = settings or GenerationSettings()
    writer = cast(SequenceToSequence | PromptedLM, objective)
    if isinstance(writer, PromptedLM) and writer.too_long == "truncate":
        writer = with_room(writer, settings.max_new_tokens)
    answers = generate_from_ids(
        loaded.model,
        loaded.tokenizer,
        [writer.prompt_ids(cast(SourceTargetExample, example)) for example in examples],
        settings=settings,
        where=[example.where for example in examples],
        batch_tokens=batch_tokens,
    )
    return _as_json(answers)


def _as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [{"answer": answer.text, "stopped": answer.stopped} for answer in answers]


def _label_each(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """The labels that are likelier than not."""
    labels = cast(MultiLabel, objective).labels
    encoded = encode_whole(objective, examples)
    predictions = []
    for output in score_examples(loaded.model, objective, encoded, batch_tokens=batch_tokens):
        shares = dict(zip(labels, output.logits_C.sigmoid().tolist(), strict=True))
        chosen = [label for label, share in shares.items() if share > 0.5]
        predictions.append({"labels": chosen, "probabilities": shares})
    return predictions


def _give_score(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    settings: GenerationSettings | None,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    encoded = encode_whole(objective, examples)
    outputs = score_examples(loaded.model, objective, encoded, batch_tokens=batch_tokens)
    return [{"score": output.predicted} for output in outputs]


PREDICTORS: dict[TaskKind, Predictor] = {
    "chat": Predictor(_answer, rows=32, generates=True, truncates=False),
    "text": Predictor(_continue, rows=32, generates=True, truncates=False),
    "classification": Predictor(_label, rows=512, generates=False, truncates=True),
    "multi_label": Predictor(_label_each, rows=512, generates=False, truncates=True),
    "regression": Predictor(_give_score, rows=512, generates=False, truncates=True),
    "sequence_to_sequence": Predictor(_write_targets, rows=32, generates=True, truncates=True),
    "question_answering": Predictor(_extract, rows=128, generates=False, truncates=True),
    "token_classification": Predictor(_tag, rows=512, generates=False, truncates=True),
}


def predict_examples(
    loaded: Loaded,
    objective: Objective,
    examples: Sequence[Example],
    *,
    settings: GenerationSettings | None = None,
    batch_tokens: int = 8192,
) -> list[dict[str, Any]]:
    """What a model predicts for examples of its kind, in their order, as plain JSON.

    Args:
        loaded: the model.
        objective: that of `build_objective`.
        examples: what to predict; their own answers and labels are not looked at.
        settings: how answers are generated; None is the defaults.
        batch_tokens: most tokens of a batch.

    Raises:
        DataError: an example does not fit the model.
    """
    predict = PREDICTORS[loaded.kind].predict
    return predict(loaded, objective, examples, settings, batch_tokens)
