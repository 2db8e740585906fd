"""Prompts as the tokens that training saw, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune.data import chat
from fulltune.data.tasks import Message
from fulltune.errors import DataError


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    where: str = "the conversation",
) -> list[int]:
    """Token ids of a conversation up to the place where the assistant's answer begins.

    They are rendered and cut as training does it, so they are the context that training saw.

    Raises:
        DataError: there is nothing to answer, or the template refuses the conversation.
        ModelError: the tokenizer has no chat template.
    """
    if not messages:
        raise DataError(
            f"{where}: is empty, so there is nothing to answer", hint="add a `user` turn"
        )
    segments = chat.render_prompt(tokenizer, messages, where=where)
    input_ids, _ = chat.encode_segments(tokenizer, segments)
    return input_ids


def render_text_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, where: str = "the prompt"
) -> list[int]:
    """Token ids of a text to be continued: what the tokenizer puts before a document, and the text.

    Raises:
        DataError: no token comes of it.
    """
    prompt = list(tokenizer(text)["input_ids"])
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(prompt) > 1 and prompt[-1] in ends:  # an end that the tokenizer added, not the text
        prompt.pop()
    if not prompt:
        raise DataError(f"{where}: the prompt is empty", hint="give at least one word")
    return prompt


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and the template's end of turn."""
    found = set(chat.end_of_turn_ids(tokenizer))
    config = getattr(model, "generation_config", None)
    configured = config.eos_token_id if config is not None else None
    if isinstance(configured, int):
        found.add(configured)
    elif configured is not None:
        found.update(int(token) for token in configured)
    return sorted(found)
