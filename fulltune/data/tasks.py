"""Tasks: what a record must hold, what an example is, and the settings that name the data.

A *record* is a raw row of a file; an *example* is one instance of a task, before tokens. The
example types below are all that the objectives see of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from fulltune.config import Settings

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; its assistant turns are what is trained on."""

    messages: tuple[Message, ...]
    where: str
    """File and line, for messages to the user: ``train.jsonl:17``."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """A document for continued causal training; every token is a target."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class ClassificationExample:
    """A text, or a pair of texts, with one label. ``label`` is None only when predicting."""

    text: str
    text_pair: str | None
    label: str | None
    where: str


@dataclass(frozen=True, slots=True)
class MultiLabelExample:
    """A text, or a pair of texts, with any number of labels. Empty also when only predicting."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class RegressionExample:
    """A text, or a pair of texts, with one number. ``score`` is None only when predicting."""

    text: str
    text_pair: str | None
    score: float | None
    where: str


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Two conversations with the same prompt, of which one's answer is preferred."""

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True)
class SourceTargetExample:
    """A text and what is to be written for it. ``target`` is None only when predicting."""

    source: str
    target: str | None
    where: str


SOURCE_FIELD = "{source}"
"""Where the source stands in a prompt."""

Example: TypeAlias = (
    ChatExample
    | TextExample
    | PreferenceExample
    | ClassificationExample
    | MultiLabelExample
    | RegressionExample
    | SourceTargetExample
)
TaskKind: TypeAlias = Literal[
    "chat",
    "text",
    "preference",
    "classification",
    "multi_label",
    "regression",
    "sequence_to_sequence",
]


Supervision: TypeAlias = Literal["tokens", "labels", "numbers"]


@dataclass(frozen=True)
class Task:
    """What a kind of task reads, trains and reports."""

    kind: TaskKind
    summary: str
    fields: tuple[str, ...]
    """Columns a record must have, unless a chat format of the field is recognised instead."""
    optional_fields: tuple[str, ...]
    metrics: tuple[str, ...]
    """Metrics of an evaluation, the first being the default for early stopping."""
    supervision: Supervision
    """What is trained: tokens of the example itself, labels of it, or a number."""
    answer: str | None = None
    """The field that prediction does without, where it is a column of its own."""
    may_lack_labels: bool = False
    """Whether an example without any label is one to learn from."""
    settings: tuple[str, ...] = ()
    """Settings among `SETTINGS_OF_SOME` that have an effect."""
    answers: bool = False
    """Whether a trained model answers prompts."""
    becomes: TaskKind | None = None
    """The kind that a trained model is used as, where that is another one."""
    generated_metrics: tuple[str, ...] = ()
    """Metrics of answers that are generated for it, where that is asked for."""


TASKS: dict[TaskKind, Task] = {
    "chat": Task(
        kind="chat",
        summary="conversations; the assistant's turns are trained",
        fields=("messages",),
        optional_fields=(),
        metrics=("loss", "perplexity", "retention_loss"),
        supervision="tokens",
        settings=("too_long", "template", "special_tokens"),
        answers=True,
    ),
    "text": Task(
        kind="text",
        summary="documents; every token is trained (continued causal training)",
        fields=("text",),
        optional_fields=(),
        metrics=("loss", "perplexity", "bits_per_byte", "retention_loss"),
        supervision="tokens",
    ),
    "preference": Task(
        kind="preference",
        summary="two answers to a prompt; the chosen one is made likelier than the rejected (DPO)",
        fields=("chosen", "rejected"),
        optional_fields=("prompt",),
        metrics=("loss", "preference_accuracy", "margin"),
        supervision="tokens",
        settings=("too_long", "template", "special_tokens", "dpo_beta"),
        answers=True,
        becomes="chat",
    ),
    "classification": Task(
        kind="classification",
        summary="one label for a text or a pair of texts",
        fields=("text", "label"),
        optional_fields=("text_pair",),
        metrics=("loss", "accuracy", "macro_f1", "weighted_f1", "matthews"),
        supervision="labels",
        answer="label",
        settings=("labels", "too_long", "loss", "class_weights"),
    ),
    "multi_label": Task(
        kind="multi_label",
        summary="any number of labels for a text or a pair of texts",
        fields=("text", "labels"),
        optional_fields=("text_pair",),
        metrics=("loss", "micro_f1", "macro_f1", "subset_accuracy"),
        supervision="labels",
        answer="labels",
        may_lack_labels=True,
        settings=("labels", "too_long"),
    ),
    "regression": Task(
        kind="regression",
        summary="a number for a text or a pair of texts",
        fields=("text", "score"),
        optional_fields=("text_pair",),
        metrics=("loss", "mean_absolute_error", "pearson", "spearman", "r2"),
        supervision="numbers",
        answer="score",
        settings=("too_long",),
    ),
    "sequence_to_sequence": Task(
        kind="sequence_to_sequence",
        summary="a text for a text: translation, summaries; the target is trained",
        fields=("source", "target"),
        optional_fields=(),
        metrics=("loss", "perplexity", "retention_loss"),
        supervision="tokens",
        answer="target",
        settings=("too_long", "special_tokens", "max_target_length", "prefix", "prompt"),
        answers=True,
        generated_metrics=("bleu", "chrf", "rouge1", "rouge2", "rouge_lsum", "exact_match"),
    ),
}

SETTINGS_OF_SOME = (
    *("labels", "too_long", "template", "special_tokens", "loss", "class_weights"),
    *("dpo_beta", "max_target_length", "prefix", "prompt"),
)
"""Settings of a task that have an effect on some kinds only; `Task.settings` says on which."""


class TaskConfig(Settings):
    """The task: its kind, its data, and how rows are read."""

    kind: TaskKind
    """What is trained; `fulltune tasks` lists the kinds."""
    train: str | tuple[str, ...]
    """Training data: a file, a folder, `asset:NAME`, `hub:OWNER/NAME[:SPLIT]`, or a list."""
    validation: str | None = "5%"
    """Held-out data: a share (`5%`), a number (`500 examples`), a source like `train`, or null."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "preference",
        "preference_sharegpt",
        "text",
        "classification",
        "multi_label",
        "regression",
        "source_target",
        "summary",
        "translation",
    ] = "auto"
    """How rows are laid out; `auto` recognises it from the first rows and says so."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field name -> the column's name in the data, e.g. `{text: question, label: class}`."""
    labels: tuple[str, ...] | None = None
    """Tasks with labels: they in order; null takes the sorted labels of the training split."""
    loss: Literal["cross_entropy", "focal", "ordinal"] = "cross_entropy"
    """Classification: `focal` counts what is told well already for little, `ordinal` makes a near
    class of `labels` cost less than a far one."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Classification: what an example of each class counts for; `balanced` gives rare classes as
    much as frequent ones, null counts all the same."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest example in tokens; null is the model's context length. Sequence to sequence: longest
    source, with its prefix or prompt."""
    max_target_length: Annotated[int, Field(ge=2)] | None = None
    """Sequence to sequence: longest target in tokens; null is the model's context length."""
    prefix: str | None = None
    """Sequence to sequence on encoder-decoders: stands before every source, such as `translate
    English to German: `, its last space included."""
    prompt: str | None = None
    """Sequence to sequence on decoders: what the model is asked, with `{source}` in it. Where the
    tokenizer has a chat template it is the user's turn, by default `{source}` alone; otherwise it
    is plain text, by default `{source}` and a line end."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What happens to an example longer than `max_length`. Documents of `text` are always cut into
    windows instead, losing nothing."""
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    """Preference: how dear it is to move away from the model that training began with."""
    template: str | None = None
    """Chat: a Jinja file, or `chatml`, for a model without a chat template; null uses its own.
    `chatml` adds `<|im_start|>` and `<|im_end|>` to a model that lacks them."""
    special_tokens: Literal["error", "text"] = "error"
    """Chat, sequence to sequence: what happens to a message, source or target that holds the text
    of a special token, such as `<|im_end|>`; `text` encodes it letter by letter. It never becomes
    the token."""
    deduplicate: bool = False
    """Drop examples that repeat an earlier one exactly."""

    @field_validator("prompt")
    @classmethod
    def _holds_the_source_once(cls, prompt: str | None) -> str | None:
        if prompt is not None and prompt.count(SOURCE_FIELD) != 1:
            raise ValueError(
                f"it must hold `{SOURCE_FIELD}` once; write for example "
                f"`Translate to French: {SOURCE_FIELD}`"
            )
        return prompt
