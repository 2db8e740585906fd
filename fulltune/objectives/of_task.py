"""The objective of each kind of task: the one table that training and inference share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fulltune.data.tags import complete_tags, wrong_class
from fulltune.data.tasks import ANSWER_SETTINGS, SOURCE_FIELD, TaskKind
from fulltune.data.word_pieces import require_word_ids
from fulltune.errors import ConfigError, ModelError
from fulltune.models.families import Family, family_of
from fulltune.models.loading import context_length, offers_head, require_head
from fulltune.objectives.base import Objective, TooLong
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.classification import Classification, ClassificationLoss
from fulltune.objectives.multi_label import MultiLabel
from fulltune.objectives.preference import Preference
from fulltune.objectives.prompted_lm import PromptedLM
from fulltune.objectives.question_answering import QuestionAnswering
from fulltune.objectives.question_windows import require_offsets
from fulltune.objectives.regression import Regression
from fulltune.objectives.sequence_to_sequence import SequenceToSequence
from fulltune.objectives.token_classification import TokenClassification

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fulltune.models.loading import Head


@dataclass(frozen=True)
class ObjectiveSettings:
    """What an objective of a task is made of."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    """Of the model."""
    max_length: int
    """Longest example in tokens."""
    labels: tuple[str, ...] = ()
    """The classes in order, where they are known already."""
    too_long: TooLong = "error"
    loss: ClassificationLoss = "cross_entropy"
    beta: float = 0.1
    special_tokens: Literal["error", "text"] = "error"
    max_target_length: int | None = None
    prefix: str | None = None
    prompt: str | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    of_kind: Mapping[str, Any] = field(default_factory=dict)
    """Values of the settings that only some kinds have, by their names in `task`."""


@dataclass(frozen=True)
class TaskObjective:
    """How a kind of task is trained and scored."""

    head: Head
    """What a model is loaded to predict."""
    make: Callable[[ObjectiveSettings], Objective]
    can: Callable[[Family], bool] = lambda family: True
    """Whether models of a family can do it."""
    smooths_labels: bool = False
    """Whether `label_smoothing` has an effect."""
    bounds_logits: bool = False
    """Whether `z_loss` has an effect."""
    encoder_decoder_head: Head | None = None
    """What an encoder-decoder is loaded to predict instead."""
    classes: Callable[[Iterable[str]], tuple[str, ...]] = tuple
    """The labels of the training data -> those of the model."""

    def head_of(self, config: PretrainedConfig) -> Head:
        """What a model of this configuration is loaded to predict."""
        is_two_sided = bool(getattr(config, "is_encoder_decoder", False))
        return (self.encoder_decoder_head if is_two_sided else None) or self.head

    def offered_for(self, model_type: str) -> bool:
        """Whether transformers has a model of this type with such a head."""
        heads = [head for head in (self.head, self.encoder_decoder_head) if head is not None]
        return any(offers_head(model_type, head) for head in heads)


def _language_model(settings: ObjectiveSettings) -> dict[str, Any]:
    return {
        "tokenizer": settings.tokenizer,
        "max_length": settings.max_length,
        "too_long": settings.too_long,
        "packing": family_of(settings.config).can_pack,
        "label_smoothing": settings.label_smoothing,
        "z_loss": settings.z_loss,
        "special_tokens": settings.special_tokens,
    }


def _causal_lm(settings: ObjectiveSettings) -> CausalLM:
    return CausalLM(**_language_model(settings))


def _preference(settings: ObjectiveSettings) -> Preference:
    return Preference(**_language_model(settings), beta=settings.beta)


def _reader(settings: ObjectiveSettings) -> dict[str, Any]:
    family = family_of(settings.config)
    return {
        "tokenizer": settings.tokenizer,
        "max_length": settings.max_length,
        "pooling": family.pooling,
        "too_long": settings.too_long,
        "packing": family.can_pack,
        "own_forward": family.pools_real_tokens,
    }


def _classification(settings: ObjectiveSettings) -> Classification:
    return Classification(
        **_reader(settings),
        labels=settings.labels,
        label_smoothing=settings.label_smoothing,
        loss=settings.loss,
    )


def _multi_label(settings: ObjectiveSettings) -> MultiLabel:
    return MultiLabel(**_reader(settings), labels=settings.labels)


def _regression(settings: ObjectiveSettings) -> Regression:
    return Regression(**_reader(settings))


def _question_answering(settings: ObjectiveSettings) -> QuestionAnswering:
    family = family_of(settings.config)
    given = {name: settings.of_kind[name] for name in ANSWER_SETTINGS if name in settings.of_kind}
    return QuestionAnswering(
        require_offsets(settings.tokenizer),
        settings.max_length,
        family.pooling,
        too_long=settings.too_long,
        packing=family.can_pack,
        **given,
    )


def _sequence_to_sequence(settings: ObjectiveSettings) -> SequenceToSequence | PromptedLM:
    context = context_length(settings.config)
    if settings.config.is_encoder_decoder:
        if settings.prompt is not None:
            raise ConfigError(
                "`task.prompt` has no effect on an encoder-decoder, whose encoder reads the source",
                hint="write what is to stand before it as `task.prefix`",
            )
        return SequenceToSequence(
            settings.tokenizer,
            settings.max_length,
            settings.max_target_length or context,
            prefix=settings.prefix or "",
            too_long=settings.too_long,
            special_tokens=settings.special_tokens,
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
        )
    if settings.prefix is not None:
        raise ConfigError(
            "`task.prefix` has no effect on a decoder, which is prompted",
            hint=f"write `task.prompt: '{settings.prefix}{SOURCE_FIELD}'`",
        )
    has_template = bool(settings.tokenizer.chat_template)
    return PromptedLM(
        **_language_model(settings),
        prompt=settings.prompt or (SOURCE_FIELD if has_template else f"{SOURCE_FIELD}\n"),
        max_target_length=settings.max_target_length or context,
        context=context,
    )


def _token_classification(settings: ObjectiveSettings) -> TokenClassification:
    require_word_ids(settings.tokenizer)
    if problem := wrong_class(settings.labels):
        raise ModelError(
            f"the classes of a tagger are tags of IOB2, but {problem}",
            hint="they are `O`, and `B-LABEL` with or without `I-LABEL` of each label",
        )
    return TokenClassification(
        settings.tokenizer,
        settings.labels,
        settings.max_length,
        too_long=settings.too_long,
        packing=family_of(settings.config).can_pack,
        label_smoothing=settings.label_smoothing,
    )


def _predicts_the_next_token(family: Family) -> bool:
    return family.can_generate


def _writes(family: Family) -> bool:
    return family.can_generate or family.has_decoder


OF_TASK: dict[TaskKind, TaskObjective] = {
    "chat": TaskObjective("causal_lm", _causal_lm, _predicts_the_next_token, True, True),
    "text": TaskObjective("causal_lm", _causal_lm, _predicts_the_next_token, True, True),
    "preference": TaskObjective("causal_lm", _preference, _predicts_the_next_token, True),
    "classification": TaskObjective("classification", _classification, smooths_labels=True),
    "multi_label": TaskObjective("multi_label", _multi_label),
    "regression": TaskObjective("regression", _regression),
    "question_answering": TaskObjective("question_answering", _question_answering),
    "sequence_to_sequence": TaskObjective(
        "causal_lm",
        _sequence_to_sequence,
        _writes,
        smooths_labels=True,
        bounds_logits=True,
        encoder_decoder_head="sequence_to_sequence",
    ),
    "token_classification": TaskObjective(
        "token_classification",
        _token_classification,
        smooths_labels=True,
        classes=complete_tags,
    ),
}


def kinds_of(family: Family, model_type: str | None = None) -> list[TaskKind]:
    """The kinds of task that models of a family can do, of one type where it is given."""
    return [
        kind
        for kind, task in OF_TASK.items()
        if task.can(family) and (model_type is None or task.offered_for(model_type))
    ]


def make_task_objective(kind: TaskKind, settings: ObjectiveSettings) -> Objective:
    """The objective of a kind of task on a model.

    Raises:
        ConfigError: a setting has no effect on this kind.
        ModelError: the model's family cannot do it.
    """
    task = OF_TASK[kind]
    if settings.z_loss and not task.bounds_logits:
        raise ConfigError(f"`z_loss` has no effect with `task.kind: {kind}`", hint="leave it out")
    if settings.label_smoothing and (not task.smooths_labels or settings.loss != "cross_entropy"):
        beside = f"task.kind: {kind}" if not task.smooths_labels else f"task.loss: {settings.loss}"
        raise ConfigError(f"`label_smoothing` has no effect with `{beside}`", hint="leave it out")
    family = family_of(settings.config)
    if not task.can(family):
        lacks = " does not predict the next token, so it" if task.head == "causal_lm" else ""
        model_type = settings.config.model_type
        possible = ", ".join(f"`{other}`" for other in kinds_of(family, model_type))
        raise ModelError(
            f"a model of type `{settings.config.model_type}`{lacks} cannot do `task.kind: {kind}`",
            hint=f"it can do {possible}; `fulltune models` says what others can",
        )
    require_head(settings.config, task.head_of(settings.config))
    return task.make(settings)


def info_of(objective: Objective) -> dict[str, Any]:
    """What a model's `fulltune.json` must hold besides its kind and `max_length`.

    With it, examples are encoded in prediction as they were in training.
    """
    if isinstance(objective, SequenceToSequence | PromptedLM):
        return objective.info
    return {}
