from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import BertForSequenceClassification

from fulltune.data.tasks import Message
from fulltune.errors import DataError, ModelError
from fulltune.inference import GenerationSettings, generate, load_for_inference
from fulltune.recipes import chat

SHORT = GenerationSettings(max_new_tokens=6)


def talk(
    model: Path, lines: str, settings: GenerationSettings = SHORT, system: str | None = None
) -> tuple[chat.Conversation, str]:
    shown = io.StringIO()
    conversation = chat.run(
        str(model),
        settings=settings,
        system=system,
        device="cpu",
        source=io.StringIO(lines),
        console=Console(file=shown, width=100),
    )
    return conversation, shown.getvalue()


def test_each_line_of_a_pipe_is_a_turn_and_is_answered_as_predict_would(tiny_llama: Path) -> None:
    conversation, shown = talk(tiny_llama, "Hello\n\nAnd Rome?\n", system="Be short.")
    roles = [message.role for message in conversation.messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    loaded = load_for_inference(str(tiny_llama), device=torch.device("cpu"))
    messages = conversation.messages()
    for end in (2, 4):
        [answer] = generate(loaded.model, loaded.tokenizer, [messages[:end]], settings=SHORT)
        assert messages[end].content == answer.text
        assert answer.text in shown


def test_reset_system_help_and_exit(tiny_llama: Path) -> None:
    conversation, shown = talk(
        tiny_llama, "Hello\n/system Speak Latin.\n/reset\n/help\n/rest\nHi\n/exit\nnever\n"
    )
    assert conversation.system == "Speak Latin."
    assert [turn.content for turn in conversation.turns if turn.role == "user"] == ["Hi"]
    assert "the conversation is forgotten" in shown
    assert "`/rest` is not a command" in shown
    assert "never" not in shown


def test_the_oldest_turns_are_dropped_and_it_is_said(tiny_llama: Path) -> None:
    question = "How many apples are there in the basket? " * 4
    conversation, shown = talk(tiny_llama, f"{question}\n" * 6, system="Count.")
    assert "oldest messages were dropped" in shown
    assert conversation.system == "Count."
    assert conversation.turns[0].role == "user"
    assert conversation.turns[-1].role == "assistant"
    assert 2 <= len(conversation.turns) < 12


def test_a_message_longer_than_the_context_is_refused_and_the_talk_goes_on(
    tiny_llama: Path,
) -> None:
    conversation, shown = talk(tiny_llama, f"Hi\n{'word ' * 400}\nAnd you?\n")
    assert "error: the message has" in " ".join(shown.split())
    asked = [turn.content for turn in conversation.turns if turn.role == "user"]
    assert asked == ["Hi", "And you?"]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Console):
        pieces = 0

        def print(self, *objects: object, **options: object) -> None:
            super().print(*objects, **options)  # type: ignore[arg-type]
            if options.get("end") == "":
                self.pieces += 1
                if self.pieces == 2:
                    raise KeyboardInterrupt

    shown = io.StringIO()
    conversation = chat.run(
        str(tiny_llama),
        settings=GenerationSettings(max_new_tokens=30, temperature=2.0),
        device="cpu",
        source=io.StringIO("Hello\nAgain\n"),
        console=Interrupted(file=shown, width=100),
    )
    assert "(stopped)" in shown.getvalue()
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    assert len(conversation.turns[1].content) < len(conversation.turns[3].content)


def test_an_answer_that_was_cut_off_says_so(tiny_llama: Path) -> None:
    _, shown = talk(tiny_llama, "Hello\n", GenerationSettings(max_new_tokens=2))
    assert "cut off after 2 tokens" in shown


def test_a_classifier_does_not_chat(tiny_bert: Path, tmp_path: Path) -> None:
    BertForSequenceClassification.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    for file in tiny_bert.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="is a classification model, which does not chat"):
        talk(tmp_path, "Hi\n")


def test_fitting_never_drops_the_last_message(tiny_llama: Path) -> None:
    loaded = load_for_inference(str(tiny_llama), device=torch.device("cpu"))
    turns = [
        Message("user", "old " * 40),
        Message("assistant", "old"),
        Message("user", "new " * 40),
    ]
    conversation = chat.Conversation(turns=list(turns))
    assert conversation.fit(loaded, SHORT) == 2
    assert conversation.turns == turns[2:]


def test_a_pipe_that_is_not_utf_8_is_refused_by_its_byte(tiny_llama: Path) -> None:
    source = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait\n"), encoding="utf-8")
    with pytest.raises(DataError, match="not utf-8: byte 0xe9"):
        chat.run(str(tiny_llama), device="cpu", source=source)
