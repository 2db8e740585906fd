"""The layouts of rows that are recognised: their fields, and what a row of each is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fulltune.data.chat_formats import (
    alpaca_messages,
    openai_messages,
    preferred_messages,
    preferred_sharegpt_messages,
    prompt_completion_messages,
    sharegpt_messages,
)
from fulltune.data.label_formats import labelled_text, scored_text, text_with_labels
from fulltune.data.pair_formats import source_target, text_summary, translation
from fulltune.data.question_formats import question_example
from fulltune.data.rows import Row
from fulltune.data.tag_formats import (
    tagged_text,
    tagged_words,
)
from fulltune.data.tasks import (
    ChatExample,
    Example,
    Message,
    PreferenceExample,
    TaskKind,
    TextExample,
)


@dataclass(frozen=True)
class Layout:
    """How rows are laid out."""

    kind: TaskKind
    fields: tuple[str, ...]
    answer: str | None
    """The field among `fields` that prediction does without."""
    optional_fields: tuple[str, ...]
    description: str
    example: Callable[[Row, bool], Example]
    """A row -> what it holds; the second says whether it needs its answer or label."""
    keys: tuple[str, ...] = ()
    """Fields among `optional_fields` that are no columns but keys within the first field."""
    other_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Names under which a field is found as well."""


def _chat(messages_of: Callable[[Row], list[Message]]) -> Callable[[Row, bool], Example]:
    def example(row: Row, needs_label: bool) -> Example:
        messages = messages_of(row)
        if needs_label and not any(message.role == "assistant" for message in messages):
            raise row.error(
                "no assistant turn, so there is nothing to train on", hint="drop the row"
            )
        return ChatExample(tuple(messages), row.record.where)

    return example


def _preference(
    messages_of: Callable[[Row], tuple[list[Message], list[Message]]],
) -> Callable[[Row, bool], Example]:
    def example(row: Row, needs_label: bool) -> Example:
        chosen, rejected = messages_of(row)
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if messages[-1].role != "assistant":
                raise row.error(
                    f"the {name} conversation ends with a turn of `{messages[-1].role}`",
                    hint="the last turn is the answer, of the assistant",
                )
        if chosen[:-1] != rejected[:-1]:
            raise row.error(
                "the chosen and the rejected answer have different prompts",
                hint="both must answer the same turns",
            )
        return PreferenceExample(tuple(chosen), tuple(rejected), row.record.where)

    return example


def _text(row: Row, needs_label: bool) -> Example:
    return TextExample(row.text("text"), row.record.where)


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(
        kind="chat",
        fields=("messages",),
        answer=None,
        optional_fields=("system",),
        description="OpenAI messages: {messages} is a list of turns with `role` and `content`",
        example=_chat(openai_messages),
    ),
    "sharegpt": Layout(
        kind="chat",
        fields=("conversations",),
        answer=None,
        optional_fields=("system",),
        description="ShareGPT: {conversations} is a list of turns with `from` and `value`",
        example=_chat(sharegpt_messages),
    ),
    "alpaca": Layout(
        kind="chat",
        fields=("instruction", "output"),
        answer="output",
        optional_fields=("input", "history", "system"),
        description="Alpaca: the prompt is {instruction} and, where `input` is not empty, "
        "a blank line and `input`; the answer is {output}",
        example=_chat(alpaca_messages),
    ),
    "prompt_completion": Layout(
        kind="chat",
        fields=("prompt", "completion"),
        answer="completion",
        optional_fields=("system",),
        description="prompt and completion: {prompt} is the user's turn, or a list of turns; "
        "{completion} is the assistant's",
        example=_chat(prompt_completion_messages),
    ),
    "preference": Layout(
        kind="preference",
        fields=("chosen", "rejected"),
        answer=None,
        optional_fields=("prompt", "system"),
        description="preferences: {chosen} and {rejected} are answers to `prompt`, or whole "
        "conversations",
        example=_preference(preferred_messages),
    ),
    "preference_sharegpt": Layout(
        kind="preference",
        fields=("conversations", "chosen", "rejected"),
        answer=None,
        optional_fields=("system",),
        description="preferences in ShareGPT: {conversations} are turns with `from` and `value`, "
        "{chosen} and {rejected} the last one",
        example=_preference(preferred_sharegpt_messages),
    ),
    "text": Layout(
        kind="text",
        fields=("text",),
        answer=None,
        optional_fields=(),
        description="plain text: {text} is a document",
        example=_text,
    ),
    "classification": Layout(
        kind="classification",
        fields=("text", "label"),
        answer="label",
        optional_fields=("text_pair",),
        description="classification: {text}, with `text_pair` where there is one, has one {label}",
        example=labelled_text,
    ),
    "multi_label": Layout(
        kind="multi_label",
        fields=("text", "labels"),
        answer="labels",
        optional_fields=("text_pair",),
        description="many labels: {text}, with `text_pair` where there is one, has the {labels}",
        example=text_with_labels,
    ),
    "regression": Layout(
        kind="regression",
        fields=("text", "score"),
        answer="score",
        optional_fields=("text_pair",),
        description="regression: {text}, with `text_pair` where there is one, has one {score}",
        example=scored_text,
    ),
    "question_answering": Layout(
        kind="question_answering",
        fields=("question", "context"),
        answer=None,
        optional_fields=("answers", "answer", "answer_start", "id", "is_impossible"),
        description="question answering: {question} is answered by a piece of {context}, which "
        "`answers` or `answer` gives",
        example=question_example,
    ),
    "source_target": Layout(
        kind="sequence_to_sequence",
        fields=("source", "target"),
        answer="target",
        optional_fields=(),
        description="source and target: {source} is read, {target} is written for it",
        example=source_target,
    ),
    "summary": Layout(
        kind="sequence_to_sequence",
        fields=("text", "summary"),
        answer="summary",
        optional_fields=(),
        description="summaries: {text} is read, {summary} is written for it",
        example=text_summary,
    ),
    "translation": Layout(
        kind="sequence_to_sequence",
        fields=("translation",),
        answer=None,
        optional_fields=("source", "target"),
        description="translations: {translation} holds a text by language",
        example=translation,
        keys=("source", "target"),
    ),
    "words": Layout(
        kind="token_classification",
        fields=("words", "tags"),
        answer="tags",
        optional_fields=(),
        description="words: {words} is a list of words with one of {tags} each",
        example=tagged_words,
        other_names={"words": ("tokens",), "tags": ("ner_tags",)},
    ),
    "spans": Layout(
        kind="token_classification",
        fields=("text", "spans"),
        answer="spans",
        optional_fields=(),
        description="spans: {text} has entities in {spans}, with `start`, `end` and `label`",
        example=tagged_text,
        other_names={"spans": ("entities",)},
    ),
}
