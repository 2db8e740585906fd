from __future__ import annotations

from typing import Any

import pytest

from fulltune.data.formats import RecordFormat, make_example, recognise_format
from fulltune.data.records import Record
from fulltune.data.tasks import (
    ChatExample,
    ClassificationExample,
    Example,
    TaskConfig,
    TextExample,
)
from fulltune.errors import ConfigError, DataError, FulltuneError

USER = {"role": "user", "content": "Where?"}
ASSISTANT = {"role": "assistant", "content": "Here."}


def config(kind: str = "chat", **settings: Any) -> TaskConfig:
    return TaskConfig.model_validate({"kind": kind, "train": "train.jsonl", **settings})


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, f"train.jsonl:{line}") for line, row in enumerate(rows, start=1)]


def recognised(row: dict[str, Any], settings: TaskConfig) -> RecordFormat:
    return recognise_format(records(row), settings)


def example(row: dict[str, Any], settings: TaskConfig | None = None) -> Example:
    settings = settings or config()
    return make_example(records(row)[0], recognised(row, settings), kind=settings.kind)


def turns(row: dict[str, Any], settings: TaskConfig | None = None) -> list[tuple[str, str]]:
    found = example(row, settings)
    assert isinstance(found, ChatExample)
    return [(message.role, message.content) for message in found.messages]


def refusal(row: dict[str, Any], settings: TaskConfig | None = None) -> FulltuneError:
    with pytest.raises(FulltuneError) as caught:
        example(row, settings)
    return caught.value


def conversation(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


# Chat


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", conversation(USER, ASSISTANT)),
        ("messages", {"conversations": [USER, ASSISTANT]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Where?"},
                    {"from": "gpt", "value": "Here."},
                ]
            },
        ),
        (
            "sharegpt",
            {"messages": [{"from": "user", "value": "Where?"}, {"from": "bot", "value": "Here."}]},
        ),
        ("alpaca", {"instruction": "Where?", "input": "", "output": "Here."}),
        ("alpaca", {"instruction": "Where?", "output": "Here."}),
        ("prompt_completion", {"prompt": "Where?", "completion": "Here."}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    ],
)
def test_chat_formats_are_recognised_and_mean_the_same(name: str, row: dict[str, Any]) -> None:
    assert recognised(row, config()).name == name
    assert turns(row) == [("user", "Where?"), ("assistant", "Here.")]


def test_the_description_says_what_is_read_as_what() -> None:
    row = {"instruction": "a", "input": "b", "answer": "c"}
    format = recognised(row, config(columns={"output": "answer"}))
    assert format.columns == {"instruction": "instruction", "input": "input", "output": "answer"}
    assert format.description == (
        "Alpaca: the prompt is `instruction` and, where `input` is not empty, a blank line and "
        "`input`; the answer is `output`; `output` is column `answer`"
    )


def test_alpaca_joins_instruction_and_input_and_keeps_history() -> None:
    row = {
        "system": "Be kind.",
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
        "history": [["Hi", "Hello"]],
    }
    assert turns(row) == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate.\n\nchat"),
        ("assistant", "cat"),
    ]


def test_roles_of_the_field_are_understood() -> None:
    assert turns(conversation({"role": "developer", "content": "d"}, USER, ASSISTANT))[0] == (
        "system",
        "d",
    )
    names = ["system", "human", "chatgpt", "observation", "model"]
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert [role for role, _ in turns(row)] == ["system", "user", "assistant", "tool", "assistant"]


def test_a_sharegpt_system_column_is_the_first_turn() -> None:
    row = {
        "system": "s",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert turns(row)[0] == ("system", "s")


@pytest.mark.parametrize(
    "row",
    [
        conversation(USER, ASSISTANT),
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "Where?", "completion": "Here."},
        {"instruction": "Where?", "output": "Here."},
    ],
)
def test_a_system_column_is_the_first_turn_in_every_layout(row: dict[str, Any]) -> None:
    assert turns({**row, "system": "s"})[0] == ("system", "s")
    renamed = config(columns={"system": "rules"})
    assert turns({**row, "rules": "s"}, renamed)[0] == ("system", "s")
    said = refusal({**row, "rule": "s"}, renamed)
    assert "no column `rules`" in str(said)
    assert "did you mean `rule`?" in str(said.hint)


def test_texts_are_taken_as_they_stand() -> None:
    row = conversation(
        {"role": "user", "content": " a\n"}, {"role": "assistant", "content": "\tb "}
    )
    assert turns(row) == [("user", " a\n"), ("assistant", "\tb ")]


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]
    assert turns(conversation({"role": "user", "content": parts}, ASSISTANT))[0] == (
        "user",
        "Where?",
    )
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    error = refusal(conversation({"role": "user", "content": [image]}, ASSISTANT))
    assert str(error) == (
        "train.jsonl:1: turn 1 of `messages` holds a part of type `image_url`; "
        "only texts can be trained on"
    )


def test_assistant_turns_may_follow_each_other() -> None:
    assert len(turns(conversation(USER, ASSISTANT, ASSISTANT))) == 3


def test_an_empty_system_or_tool_turn_is_allowed() -> None:
    row = conversation(
        {"role": "system", "content": ""}, USER, {"role": "tool", "content": ""}, ASSISTANT
    )
    assert len(turns(row)) == 4


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        (
            conversation(USER, {"role": "asistant", "content": "x"}),
            "turn 2 of `messages` has the unknown role `asistant`",
            "did you mean `assistant`? possible are `system`, `developer`, `user`, `assistant`, "
            "`tool`",
        ),
        (
            conversation(USER, {"role": "narrator", "content": "x"}),
            "turn 2 of `messages` has the unknown role `narrator`",
            "possible are `system`, `developer`, `user`, `assistant`, `tool`",
        ),
        (
            conversation(USER),
            "no assistant turn, so there is nothing to train on",
            "drop the row",
        ),
        (
            conversation(USER, {"role": "assistant", "content": " "}),
            "turn 2 of `messages` (`assistant`) is empty",
            "fill it in, or drop the row",
        ),
        (
            conversation(USER, {"role": "assistant", "content": 7}),
            "turn 2 of `messages` (`assistant`) must be a text, not a number",
            None,
        ),
        (
            conversation(USER, {"role": "assistant", "content": None}),
            "turn 2 of `messages` (`assistant`) is null",
            "fill it in, or drop the row",
        ),
        (
            conversation(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
            "turn 2 of `messages` holds `tool_calls`: tool calls cannot be trained on",
            "write it into the text of the turn, or drop the row",
        ),
        (
            conversation(USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}),
            "turn 2 of `messages` holds `tool_calls`: tool calls cannot be trained on",
            "write it into the text of the turn, or drop the row",
        ),
        (
            conversation(USER, {**ASSISTANT, "reasoning_content": "hm"}),
            "turn 2 of `messages` holds `reasoning_content`: a separate reasoning text cannot be "
            "trained on",
            "write it into the text of the turn, or drop the row",
        ),
        (
            conversation(USER, {**ASSISTANT, "weight": 0}),
            "turn 2 of `messages` has `weight` 0; every assistant turn is trained alike",
            "drop the row, or the key `weight` to train the turn",
        ),
        (
            {**conversation(USER, ASSISTANT), "tools": [{"name": "x"}]},
            "field `tools` defines tools, which cannot be trained on",
            "drop the column to train without them",
        ),
        (
            conversation(USER, {"role": "assistant", "text": "x"}),
            "turn 2 of `messages` must have `role` and `content`; it has `role`, `text`",
            "correct the turn, or drop the row",
        ),
        (
            conversation(USER, {"role": "assistant", "content": "\ud83d"}),
            "turn 2 of `messages` (`assistant`) holds half a character (a lone surrogate), the 1th",
            "it was cut in the middle of an escaped character; write the row again",
        ),
        (
            {"instruction": "a", "output": ""},
            "field `output` is empty",
            "fill it in, or drop the row",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            "entry 1 of `history` must be a pair of question and answer",
            "write `[[question, answer], ...]`",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "b"},
                ]
            },
            "turn 2 of `conversations` holds `function_call`: function calls cannot be trained on",
            "write it into the text of the turn, or drop the row",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_with_its_line(
    row: dict[str, Any], message: str, hint: str | None
) -> None:
    error = refusal(row)
    assert str(error) == f"train.jsonl:1: {message}"
    assert error.hint == hint


def test_later_rows_are_held_to_the_format_of_the_first() -> None:
    format = recognised(conversation(USER, ASSISTANT), config())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mesages": []}, "no column `messages`; there are `mesages`"),
        ({"messages": None}, "field `messages` must be a list of turns, not null"),
        ({"messages": []}, "field `messages` holds no turns"),
        ({"messages": "hi"}, "field `messages` must be a list of turns, not a text"),
        (
            {"messages": ["hi"]},
            "turn 1 of `messages` must have `role` and `content`; it has a text",
        ),
    ]
    for row, message in cases:
        with pytest.raises(DataError) as caught:
            make_example(Record(row, "train.jsonl:9"), format, kind="chat")
        assert str(caught.value) == f"train.jsonl:9: {message}"
    with pytest.raises(DataError) as caught:
        make_example(Record({"mesages": []}, "train.jsonl:9"), format, kind="chat")
    assert caught.value.hint == (
        "did you mean `mesages`? map another name with `task.columns={messages: mesages}`"
    )


@pytest.mark.parametrize(
    "row",
    [
        conversation(USER),
        {"prompt": "Where?"},
        {"prompt": "Where?", "completion": ""},
        {"instruction": "Where?"},
        {"instruction": "Where?", "output": None},
    ],
)
def test_prediction_needs_no_answer(row: dict[str, Any]) -> None:
    format = recognise_format(records(row), config(), needs_label=False)
    found = make_example(records(row)[0], format, kind="chat", needs_label=False)
    assert isinstance(found, ChatExample)
    assert [(message.role, message.content) for message in found.messages] == [("user", "Where?")]


# Text and classification


def test_a_text_is_a_document() -> None:
    assert example({"text": "a b", "id": 1}, config("text")) == TextExample("a b", "train.jsonl:1")
    settings = config("text", columns={"text": "body"})
    assert example({"body": "a"}, settings) == TextExample("a", "train.jsonl:1")


@pytest.mark.parametrize(
    ("label", "expected"),
    [("yes", "yes"), (0, "0"), (-1, "-1"), (True, "true"), (False, "false"), (2.0, "2")],
)
def test_a_label_becomes_a_name(label: object, expected: str) -> None:
    assert example({"text": "a", "label": label}, config("classification")) == (
        ClassificationExample("a", None, expected, "train.jsonl:1")
    )


def test_a_pair_is_read_where_there_is_one() -> None:
    row = {"question": "a", "sentence": "b", "label": "c"}
    columns = {"text": "question", "text_pair": "sentence"}
    assert example(row, config("classification", columns=columns)) == (
        ClassificationExample("a", "b", "c", "train.jsonl:1")
    )
    assert example({"text": "a", "text_pair": "b", "label": "c"}, config("classification")) == (
        ClassificationExample("a", "b", "c", "train.jsonl:1")
    )


def test_a_pair_that_the_first_rows_do_not_show_is_not_dropped() -> None:
    format = recognised({"text": "a", "label": "c"}, config("classification"))
    later = Record({"text": "a", "text_pair": "b", "label": "c"}, "train.jsonl:900")
    with pytest.raises(DataError, match=r"train.jsonl:900: has a `text_pair`"):
        make_example(later, format, kind="classification")
    empty = Record({"text": "a", "text_pair": None, "label": "c"}, "train.jsonl:901")
    make_example(empty, format, kind="classification")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": None}, "field `label` is empty"),
        ({"text": "a", "label": ""}, "field `label` is empty"),
        ({"text": "a", "label": float("nan")}, "field `label` is empty"),
        ({"text": "a", "label": 0.5}, "field `label` is 0.5, and a label is a class"),
        (
            {"text": "a", "label": ["x", "y"]},
            "field `label` is a list, and an example has exactly one label",
        ),
        ({"text": "", "label": "x"}, "field `text` is empty"),
        ({"text": 3, "label": "x"}, "field `text` must be a text, not a number"),
        ({"text": "a", "text_pair": None, "label": "x"}, "field `text_pair` is null"),
    ],
)
def test_a_row_without_text_or_class_is_refused(row: dict[str, Any], message: str) -> None:
    assert str(refusal(row, config("classification"))) == f"train.jsonl:1: {message}"


@pytest.mark.parametrize(
    ("row", "expected"),
    [({"text": "a"}, None), ({"text": "a", "label": ""}, None), ({"text": "a", "label": 1}, "1")],
)
def test_prediction_needs_no_label(row: dict[str, Any], expected: str | None) -> None:
    format = recognise_format(records(row), config("classification"), needs_label=False)
    found = make_example(records(row)[0], format, kind="classification", needs_label=False)
    assert found == ClassificationExample("a", None, expected, "train.jsonl:1")


# Recognition


def test_an_ambiguous_row_asks_for_the_format() -> None:
    row = {**conversation(USER, ASSISTANT), "prompt": "a", "completion": "b"}
    error = refusal(row)
    assert str(error) == (
        "train.jsonl has the columns `messages`, `prompt`, `completion`, "
        "which can be read in several ways: `messages`, `prompt_completion`"
    )
    assert error.hint == "choose one, for example `task.format=messages`"
    assert turns(row, config(format="prompt_completion")) == [("user", "a"), ("assistant", "b")]
    assert turns(row, config(columns={"prompt": "prompt"})) == [("user", "a"), ("assistant", "b")]


def test_an_unknown_layout_lists_what_is_there_and_what_is_possible() -> None:
    error = refusal({"question": "a", "answer": "b"})
    assert str(error) == (
        "train.jsonl has the columns `question`, `answer`; that is no known format of kind `chat`"
    )
    assert error.hint == (
        "it needs `messages`, or `conversations`, or `instruction` and `output`, "
        "or `prompt` and `completion`; "
        "map the names of yours with `task.columns={prompt: question, completion: answer}`"
    )


def test_a_missing_column_names_the_nearest() -> None:
    error = refusal({"txt": "a", "label": "b"}, config("classification"))
    assert str(error) == "train.jsonl:1: no column `text`; there are `txt`, `label`"
    assert error.hint == "did you mean `txt`? map another name with `task.columns={text: txt}`"
    columns = {"text": "sentence", "label": "clas"}
    error = refusal({"sentence": "a", "class": "b"}, config("classification", columns=columns))
    assert str(error) == "train.jsonl:1: no column `clas`; there are `sentence`, `class`"
    assert error.hint == "did you mean `class`?"
    error = refusal({"prompt": "a"}, config(format="prompt_completion"))
    assert str(error) == "train.jsonl:1: no column `completion`; there are `prompt`"


def test_first_rows_of_different_layouts_are_refused() -> None:
    rows = records(conversation(USER, ASSISTANT), {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError) as caught:
        recognise_format(rows, config())
    assert str(caught.value) == (
        "train.jsonl has the columns `messages`, and train.jsonl:2 has `prompt`, `completion`; "
        "that is no known format of kind `chat`"
    )


def test_settings_that_contradict_the_kind_are_refused() -> None:
    error = refusal({"text": "a"}, config("text", format="alpaca"))
    assert isinstance(error, ConfigError)
    assert str(error) == "`task.format` is `alpaca`, not a format of kind `text`"
    assert error.hint == "choose from `text`, or `auto`"
    error = refusal({"text": "a"}, config("classification", columns={"txt": "a"}))
    assert isinstance(error, ConfigError)
    assert error.hint == "its fields are `text`, `label`, `text_pair`"
