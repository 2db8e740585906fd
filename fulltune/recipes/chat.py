"""`fulltune chat MODEL`: talk to a model in the terminal, or through a pipe line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

import torch
from rich.console import Console

from fulltune.data.tasks import Message
from fulltune.errors import DataError, ModelError
from fulltune.inference import (
    GenerationSettings,
    Loaded,
    generate,
    load_for_inference,
    render_prompt,
)
from fulltune.models.loading import context_length
from fulltune.runtime import choose_device

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves"


@dataclass
class Conversation:
    """The turns so far, kept within the model's context."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """What the model is given."""
        first = [Message("system", self.system)] if self.system else []
        return [*first, *self.turns]

    def fit(self, loaded: Loaded, settings: GenerationSettings) -> int:
        """Drop the oldest exchanges until an answer fits; the number of messages dropped.

        Raises:
            DataError: the last message alone leaves no room.
        """
        context = context_length(loaded.model.config)
        reserve = min(settings.max_new_tokens, context // 4)
        kept = self.turns
        while True:
            first = [Message("system", self.system)] if self.system else []
            used = len(render_prompt(loaded.tokenizer, [*first, *kept], where="the conversation"))
            if used + reserve <= context:
                break
            following = [i for i, turn in enumerate(kept) if turn.role == "user" and i > 0]
            if not following:
                raise DataError(
                    f"the message has {used} tokens with its system prompt, and {reserve} are kept "
                    f"for the answer, but the model's context is {context}",
                    hint="shorten the message",
                )
            kept = kept[following[0] :]
        dropped = len(self.turns) - len(kept)
        self.turns = kept
        return dropped


def run(
    model: str,
    *,
    settings: GenerationSettings | None = None,
    system: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    source: TextIO | None = None,
    console: Console | None = None,
) -> Conversation:
    """Answer what is typed until Ctrl-D or `/exit`.

    Args:
        model: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        settings: how answers are generated.
        system: the system prompt; None leaves it to the chat template.
        device: `auto`, `cpu` or `cuda`.
        dtype: dtype of the weights; None keeps the stored one.
        source: where turns come from, one a line; None is the terminal, or stdin if it is a pipe.
        console: where answers go; None is stdout.

    Returns:
        The conversation as it stood at the end.

    Raises:
        ModelError: the model is not one that chats.
    """
    console = console or Console(highlight=False)
    loaded = load_for_inference(model, device=choose_device(device), dtype=dtype)
    if loaded.kind == "text" and loaded.tokenizer.chat_template is None:
        raise ModelError(
            f"`{model}` has no chat template, so it cannot take turns",
            hint="fine-tune it with `task.kind: chat` and `task.template: chatml`, or let it "
            f"continue texts by `fulltune predict {model} FILE`",
        )
    if loaded.kind != "chat":
        raise ModelError(
            f"`{model}` is a {loaded.kind} model, which does not chat",
            hint=f"use `fulltune predict {model} FILE`",
        )
    settings = settings or GenerationSettings()
    conversation = Conversation(system)
    stream = source or sys.stdin
    typed = _type_turns(console) if stream.isatty() else _read_turns(stream)
    if stream.isatty():
        console.print(f"[dim]{HELP}; Ctrl-C stops an answer, Ctrl-D leaves[/]")
    for line in typed:
        text = line.strip()
        if text == "/exit":
            break
        if text.startswith("/"):
            _obey(text, conversation, console)
        elif text:
            _answer(text, conversation, loaded, settings, console)
    return conversation


def _read_turns(stream: TextIO) -> Iterator[str]:
    try:
        for line in stream:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not {error.encoding}: byte 0x{error.object[error.start]:02x}",
            hint="convert it to UTF-8 by `iconv -f ENCODING -t UTF-8`, with the encoding it is in",
        ) from None


def _type_turns(console: Console) -> Iterator[str]:
    """Lines typed at the prompt; Ctrl-C clears the line, Ctrl-D ends."""
    import readline  # noqa: F401  (gives the prompt its arrow keys and its history)

    # readline must know the prompt to redraw it; \001 and \002 mark what takes no room.
    coloured = console.color_system is not None
    prompt = "\001\x1b[1;36m\002you\001\x1b[0m\002 › " if coloured else "you › "
    while True:
        try:
            yield input(prompt)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /exit leaves[/]")


def _obey(command: str, conversation: Conversation, console: Console) -> None:
    name, _, argument = command.partition(" ")
    if name == "/reset":
        conversation.turns = []
        _say(console, "the conversation is forgotten")
    elif name == "/system":
        conversation.system = argument.strip() or None
        said = (
            "the system prompt is set" if conversation.system else "there is no system prompt now"
        )
        _say(console, said)
    elif name == "/help":
        _say(console, HELP)
    else:
        _say(console, f"`{name}` is not a command: {HELP}")


def _answer(
    text: str,
    conversation: Conversation,
    loaded: Loaded,
    settings: GenerationSettings,
    console: Console,
) -> None:
    before = list(conversation.turns)
    conversation.turns.append(Message("user", text))
    pieces: list[str] = []

    def show(_: int, piece: str) -> None:
        pieces.append(piece)
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.file.flush()

    try:
        dropped = conversation.fit(loaded, settings)
        if dropped:
            _say(console, f"the context is full: the {dropped} oldest messages were dropped")
        [answer] = generate(
            loaded.model,
            loaded.tokenizer,
            [conversation.messages()],
            settings=settings,
            stream=show,
        )
        console.print()
        if not answer.stopped:
            _say(console, f"cut off after {answer.num_tokens} tokens")
    except KeyboardInterrupt:
        console.print()
        _say(console, "stopped")
    except DataError as error:
        conversation.turns = before
        _say(console, f"error: {error}")
        if error.hint:
            _say(console, f"hint: {error.hint}")
        return
    if pieces:
        conversation.turns.append(Message("assistant", "".join(pieces)))
    else:
        # Without an answer the template could refuse the next turn.
        conversation.turns = before
        _say(console, "no answer; the message is not kept")


def _say(console: Console, text: str) -> None:
    console.print(f"({text})", style="dim", markup=False, highlight=False)
