"""Entities of texts and tags of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from fulltune.data.tags import spans_of
from fulltune.data.tasks import TaggingExample
from fulltune.inference.batches import encode_whole, score_examples
from fulltune.objectives.token_classification import TaggingOutput, TokenClassification


def tag(
    model: PreTrainedModel,
    objective: TokenClassification,
    examples: Sequence[TaggingExample],
    *,
    batch_tokens: int = 8192,
) -> list[dict[str, Any]]:
    """The entities and tags of examples, in their order, as plain JSON.

    Only tags that are valid in IOB2 together are given; see `tag_decoding`.

    Args:
        model: a tagger.
        objective: how words become tokens, and tokens tags.
        examples: what to tag; their own tags are not looked at.
        batch_tokens: most tokens in a batch, padding included.

    Returns:
        For each example `entities`, and `tags` of the words, null for those that truncation cut
        off. Of a text, `start` and `end` of an entity count its characters, and `words` are those
        that the tags are of; of given words, they count the words. `probability` is the mean of an
        entity's tags.
    """
    encoded = encode_whole(objective, examples)
    outputs = score_examples(model, objective, encoded, batch_tokens=batch_tokens)
    return [_as_json(example, output) for example, output in zip(examples, outputs, strict=True)]


def _as_json(example: TaggingExample, output: TaggingOutput) -> dict[str, Any]:
    num_cut_off = len(example.words) - len(output.predicted)
    entities = []
    for span in spans_of(output.predicted):
        start, end = span.start, span.end
        if example.text is not None:
            start, end = example.places[span.start][0], example.places[span.end - 1][1]
            text = example.text[start:end]
        else:
            text = "".join(
                f"{' ' if example.spaces[place] and place > span.start else ''}{word}"
                for place, word in enumerate(example.words[: span.end])
                if place >= span.start
            )
        probabilities = output.probabilities[span.start : span.end]
        entities.append(
            {
                "text": text,
                "label": span.label,
                "start": start,
                "end": end,
                "probability": sum(probabilities) / len(probabilities),
            }
        )
    prediction: dict[str, Any] = {"entities": entities}
    if example.text is not None:
        prediction["words"] = list(example.words)
    prediction["tags"] = [*output.predicted, *[None] * num_cut_off]
    return prediction
