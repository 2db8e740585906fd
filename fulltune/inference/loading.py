"""A trained model, its tokenizer and what it answers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fulltune.data.tasks import TASKS, TaskKind
from fulltune.errors import ModelError
from fulltune.inference.quick import bf16_copy
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.loading import (
    PROBLEM_TYPES,
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
    read_info,
)
from fulltune.models.sources import resolve_model
from fulltune.objectives.base import Objective, TooLong
from fulltune.objectives.causal_lm import require_plain_head
from fulltune.objectives.of_task import OF_TASK, ObjectiveSettings, make_task_objective
from fulltune.objectives.span_corruption import require_plain_decoder_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    info: dict[str, Any]
    """`fulltune.json` of the model folder; empty for a folder that fulltune did not write."""
    kind: TaskKind
    labels: tuple[str, ...]
    """Of a task that has labels: they in their order; else empty."""
    quick: PreTrainedModel | None = None
    """The same model in bf16, where labels are told with its help."""


def load_for_inference(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quick: bool = False,
) -> Loaded:
    """Load a trained model with its tokenizer and find out what it answers.

    Args:
        source: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        device: where the model runs.
        dtype: dtype of the weights; None keeps the stored one.
        quick: also hold a copy in bf16, with which labels are told quickly; see `quick.py`.

    Raises:
        ModelError: the folder is incomplete, or holds a model without a trained head.
    """
    path = resolve_model(source)
    info = read_info(path)
    config = load_model_config(path)
    tokenizer = load_tokenizer(path)
    kind = info["kind"] if "kind" in info else _infer_kind(path, config, tokenizer)
    model = load_model(
        path,
        head=OF_TASK[kind].head_of(config),
        dtype=dtype or cast(torch.dtype | None, config.dtype) or torch.float32,
        attention=IMPLEMENTATION,
    )
    cast(Any, model).to(device)
    model.eval()
    labels: tuple[str, ...] = ()
    if TASKS[kind].supervision == "labels":
        names = cast(dict[int, str], model.config.id2label)
        labels = tuple(names[index] for index in range(len(names)))
    return Loaded(
        model, tokenizer, path, info, kind, labels, quick=bf16_copy(model) if quick else None
    )


def build_objective(
    loaded: Loaded,
    *,
    too_long: TooLong = "error",
    max_length: int | None = None,
    special_tokens: Literal["error", "text"] = "text",
) -> Objective:
    """The objective that encodes and scores for a loaded model, as it was trained.

    Args:
        loaded: the model.
        too_long: what happens to an example longer than ``max_length``.
        max_length: in tokens; None is what the model was trained with, else its context.
        special_tokens: what happens to a message that holds the text of a special token.
    """
    context = context_length(loaded.model.config)
    longest = min(max_length or loaded.info.get("max_length", context), context)
    head = OF_TASK[loaded.kind].head_of(loaded.model.config)
    if head == "causal_lm":
        require_plain_head(loaded.model)
    elif head == "sequence_to_sequence":
        require_plain_decoder_head(loaded.model)
    settings = ObjectiveSettings(
        loaded.tokenizer,
        loaded.model.config,
        longest,
        labels=loaded.labels,
        too_long=too_long,
        special_tokens=special_tokens,
        of_kind=loaded.info.get("settings", {}),
        max_target_length=loaded.info.get("max_target_length"),
        prefix=loaded.info.get("prefix"),
        prompt=loaded.info.get("prompt"),
    )
    return make_task_objective(loaded.kind, settings)


def _infer_kind(
    path: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> TaskKind:
    architectures = config.architectures or []
    kind: TaskKind
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        kinds: dict[str | None, TaskKind] = {
            problem: head for head, problem in PROBLEM_TYPES.items() if head in TASKS
        }
        kind = kinds.get(config.problem_type, "classification")
        reason = f"its architecture is {architectures[0]}"
    elif any("ForQuestionAnswering" in name for name in architectures):
        kind, reason = "question_answering", f"its architecture is {architectures[0]}"
    elif any(name.endswith("ForConditionalGeneration") for name in architectures):
        kind, reason = "sequence_to_sequence", f"its architecture is {architectures[0]}"
    elif any(name.endswith("ForTokenClassification") for name in architectures):
        kind, reason = "token_classification", f"its architecture is {architectures[0]}"
    elif any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        has_template = tokenizer.chat_template is not None
        kind = "chat" if has_template else "text"
        reason = f"its tokenizer has {'a' if has_template else 'no'} chat template"
    else:
        named = architectures[0] if architectures else "a model without a named architecture"
        raise ModelError(
            f"`{path}` holds {named}, an encoder without a trained head, so it can "
            "neither answer nor label",
            hint="fine-tune it first with `fulltune finetune`, and give the run folder",
        )
    logger.info("%s has no fulltune.json; taken as a %s model, since %s", path, kind, reason)
    return kind
