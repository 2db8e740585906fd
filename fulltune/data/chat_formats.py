"""Conversations as the field writes them: OpenAI, ShareGPT, Alpaca, prompt and completion.

Every text is taken as it stands. What cannot be trained on as it is meant (tool calls, images,
weights) is refused by name, never dropped.
"""

from __future__ import annotations

from typing import Any

from fulltune.data.rows import Row, type_name
from fulltune.data.tasks import Message, Role
from fulltune.errors import DataError, listed, near_names

_OPENAI_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES: dict[str, Role] = {
    **_OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# Parts of a turn that say something which a plain text does not; training without them would teach
# something else than the data means.
_REFUSED_PARTS = {
    "tool_calls": "tool calls",
    "function_call": "function calls",
    "reasoning_content": "a separate reasoning text",
    "reasoning": "a separate reasoning text",
    "thinking": "a separate reasoning text",
    "audio": "audio",
    "images": "images",
    "refusal": "a refusal apart from the content",
}


def openai_messages(row: Row) -> list[Message]:
    """A list of turns with `role` and `content`."""
    column = row.columns.get("messages", "messages")
    turns = _turns(row, row.value("messages"), column)
    return [*_system(row, row.optional("system")), *turns]


def sharegpt_messages(row: Row) -> list[Message]:
    """A list of turns with `from` and `value`."""
    column = row.columns.get("conversations", "conversations")
    system = row.optional("system")
    turns = _turns(row, row.value("conversations"), column, sharegpt=True)
    return [*_system(row, system), *turns]


def alpaca_messages(row: Row) -> list[Message]:
    """An instruction with its input, after the turns of its history, and the output."""
    messages = _system(row, row.optional("system"))
    history = row.optional("history")
    if history is not None and not isinstance(history, list):
        raise row.error(
            f"field `history` must be a list of pairs, not {type_name(history)}",
            hint="write `[[question, answer], ...]`",
        )
    for number, pair in enumerate(history or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(
                f"entry {number} of `history` must be a pair of question and answer",
                hint="write `[[question, answer], ...]`",
            )
        question, answer = (row.checked_text(text, f"entry {number} of `history`") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    prompt = row.text("instruction")
    extra = row.optional("input")
    if extra not in (None, ""):
        prompt += "\n\n" + row.checked_text(extra, "field `input`")
    messages.append(Message("user", prompt))
    if "output" in row.columns:
        messages.append(Message("assistant", row.text("output")))
    return messages


def prompt_completion_messages(row: Row) -> list[Message]:
    """Prompt and completion, each a text or a list of turns."""
    messages = _system(row, row.optional("system"))
    messages += _text_or_turns(row, "prompt", "user")
    if "completion" in row.columns:
        messages += _text_or_turns(row, "completion", "assistant")
    return messages


def preferred_messages(row: Row) -> tuple[list[Message], list[Message]]:
    """The conversation with the chosen and with the rejected answer.

    Each answer is a text or a list of turns; without a prompt, the turns are whole conversations.
    """
    system = _system(row, row.optional("system"))
    prompt = _text_or_turns(row, "prompt", "user") if "prompt" in row.columns else []
    sides = []
    for field in ("chosen", "rejected"):
        if not prompt and not isinstance(row.value(field), list):
            raise row.error(
                f"field `{row.columns.get(field, field)}` is an answer, and there is no `prompt`",
                hint="add a column `prompt`, or write whole conversations as lists of turns",
            )
        answer = _text_or_turns(row, field, "assistant")
        # Some sets repeat the prompt in both lists of turns.
        repeated = prompt and answer[: len(prompt)] == prompt
        sides.append([*system, *([] if repeated else prompt), *answer])
    return sides[0], sides[1]


def preferred_sharegpt_messages(row: Row) -> tuple[list[Message], list[Message]]:
    """Turns in `conversations`, and the two last ones in `chosen` and `rejected`."""
    before = sharegpt_messages(row)
    sides = []
    for field in ("chosen", "rejected"):
        name = f"field `{row.columns.get(field, field)}`"
        sides.append([*before, _turn(row, row.value(field), name, sharegpt=True)])
    return sides[0], sides[1]


def _text_or_turns(row: Row, field: str, role: Role) -> list[Message]:
    value = row.value(field)
    if isinstance(value, list):
        return _turns(row, value, row.columns.get(field, field))
    return [Message(role, row.text(field))]


def _system(row: Row, text: Any) -> list[Message]:
    return (
        [] if text in (None, "") else [Message("system", row.checked_text(text, "field `system`"))]
    )


def _turns(row: Row, turns: Any, column: str, *, sharegpt: bool = False) -> list[Message]:
    if not isinstance(turns, list):
        raise row.error(
            f"field `{column}` must be a list of turns, not {type_name(turns)}",
            hint='write `[{"role": "user", "content": ...}, ...]`',
        )
    if not turns:
        raise row.error(f"field `{column}` holds no turns", hint="drop the row")
    if row.record.fields.get("tools"):
        raise row.error(
            "field `tools` defines tools, which cannot be trained on",
            hint="drop the column to train without them",
        )
    return [
        _turn(row, turn, f"turn {number} of `{column}`", sharegpt=sharegpt)
        for number, turn in enumerate(turns, start=1)
    ]


def _turn(row: Row, turn: Any, name: str, *, sharegpt: bool) -> Message:
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    roles = _SHAREGPT_ROLES if sharegpt else _OPENAI_ROLES
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        found = listed(turn) if isinstance(turn, dict) else type_name(turn)
        if isinstance(turn, dict) and turn.get("tool_calls"):
            raise _refused(row, name, "tool_calls")
        raise row.error(
            f"{name} must have `{role_key}` and `{text_key}`; it has {found}",
            hint="correct the turn, or drop the row",
        )
    for key in _REFUSED_PARTS:
        if turn.get(key):
            raise _refused(row, name, key)
    if turn.get("weight") not in (None, 1):
        raise row.error(
            f"{name} has `weight` {turn['weight']}; every assistant turn is trained alike",
            hint="drop the row, or the key `weight` to train the turn",
        )
    if turn[role_key] == "function_call":
        raise _refused(row, name, "function_call")
    role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        near = near_names(str(turn[role_key]), roles)
        raise row.error(
            f"{name} has the unknown role `{turn[role_key]}`",
            hint=(f"did you mean `{near[0]}`? " if near else "") + f"possible are {listed(roles)}",
        )
    # A tool may answer nothing, and an empty system turn says "no system prompt" to most templates.
    may_be_empty = role in ("system", "tool")
    text = row.checked_text(
        _joined_parts(row, turn[text_key], name), f"{name} (`{role}`)", may_be_empty=may_be_empty
    )
    return Message(role, text)


def _refused(row: Row, name: str, key: str) -> DataError:
    return row.error(
        f"{name} holds `{key}`: {_REFUSED_PARTS[key]} cannot be trained on",
        hint="write it into the text of the turn, or drop the row",
    )


def _joined_parts(row: Row, content: Any, name: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise row.error(
                f"{name} holds a part of type `{kind}`; only texts can be trained on",
                hint="drop the row",
            )
        texts.append(part["text"])
    return "".join(texts)
