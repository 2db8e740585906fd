"""The one inference path: evaluation, `predict`, `chat` and serving answer through this folder.

A prompt is rendered by the tokenizer's own chat template, so its tokens are the context that
training saw, and an example becomes tokens by the objective that trained the model.
"""

from fulltune.inference.batches import answering, cut_into_batches, in_chunks, score_examples
from fulltune.inference.generation import (
    Answer,
    GenerationSettings,
    Stream,
    generate,
    generate_from_ids,
    generate_text,
)
from fulltune.inference.labelling import Prediction, classify
from fulltune.inference.loading import Loaded, build_objective, load_for_inference
from fulltune.inference.of_task import PREDICTORS, Predictor, predict_examples
from fulltune.inference.prompts import render_prompt, render_text_prompt, stop_ids

__all__ = [
    "PREDICTORS",
    "Answer",
    "GenerationSettings",
    "Loaded",
    "Prediction",
    "Predictor",
    "Stream",
    "answering",
    "build_objective",
    "classify",
    "cut_into_batches",
    "generate",
    "generate_from_ids",
    "generate_text",
    "in_chunks",
    "load_for_inference",
    "predict_examples",
    "render_prompt",
    "render_text_prompt",
    "score_examples",
    "stop_ids",
]
