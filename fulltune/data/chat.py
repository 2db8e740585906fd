"""Conversations as token ids, by the chat template of the model.

Training and generation both come through here, so that the tokens before an answer are the same in
both. A conversation is rendered by the template once, cut where assistant turns begin and end, and
the cut may never fall inside a token. What stands in a message is text: a special token written
there is never encoded as the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jinja2

from fulltune.data.special_text import (
    Span,
    encode_beside_special_text,
    mark_special_text,
    special_tokens,
)
from fulltune.data.tasks import Message
from fulltune.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    trained: bool
    literal: tuple[Span, ...] = ()
    """Where a special token in ``text`` is not the token but text of a message."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> list[Segment]:
    """The conversation so far, ending where the next answer begins."""
    if messages and messages[-1].role == "assistant":
        raise DataError(
            f"{where}: the conversation ends with an assistant turn, so there is nothing to answer",
            hint="end it with a `user` turn",
        )
    segments = _cut(tokenizer, messages, where, generate=True)
    return [replace(segment, trained=False) for segment in segments]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str
) -> list[Segment]:
    """A whole conversation; assistant turns with their end-of-turn token are the trained segments.

    Raises:
        DataError: the template refuses the conversation, or renders an earlier turn differently
            once later turns follow, so that what would be trained is not what would be seen.
    """
    return _cut(tokenizer, messages, where, generate=False)


def encode_segments(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment]
) -> tuple[list[int], list[int]]:
    """Token ids and target flags of rendered segments.

    The text is tokenized as a whole. Where a token would straddle a cut, the pieces are tokenized
    apart, since generation meets exactly that cut.
    """
    text = "".join(segment.text for segment in segments)
    cuts, flags, literal, position = [], [], [], 0
    for segment in segments:
        literal += [(position + start, position + stop) for start, stop in segment.literal]
        position += len(segment.text)
        cuts.append(position)
        flags.append(int(segment.trained))
    all_ids, offsets = _encode(tokenizer, text, literal)
    targets: list[int] = []
    index = 0
    for start, end in offsets:
        while index < len(cuts) - 1 and start >= cuts[index]:
            index += 1
        if end > cuts[index]:
            break  # straddles the cut
        targets.append(flags[index])
    else:
        return all_ids, targets
    input_ids, targets = [], []
    for segment, flag in zip(segments, flags, strict=True):
        ids, _ = _encode(tokenizer, segment.text, segment.literal)
        input_ids += ids
        targets += [flag] * len(ids)
    return input_ids, targets


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an assistant turn: what the template writes after it, and the eos token."""
    ids = {tokenizer.eos_token_id} - {None}
    probe = [Message("user", "a"), Message("assistant", "b")]
    if tokenizer.chat_template:
        segments = render_conversation(tokenizer, probe, where="chat template")
        trained_ids, _ = encode_segments(tokenizer, [s for s in segments if s.trained])
        if trained_ids and trained_ids[-1] in special_tokens(tokenizer).ids.values():
            ids.add(trained_ids[-1])
    return ids


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, literal: Sequence[Span]
) -> tuple[list[int], list[Span]]:
    if literal:
        return encode_beside_special_text(tokenizer, text, literal)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return list(encoding.ids), list(encoding.offsets)


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    generate: bool,
) -> list[Segment]:
    messages, marks = mark_special_text(tokenizer, messages, where=where)
    full = _render(tokenizer, messages, generate, where)
    segments: list[Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"{where}: the conversation begins with an assistant turn",
                hint="begin it with a `user` or `system` turn",
            )
        before = _render(tokenizer, messages[:index], True, where)
        until = _render(tokenizer, messages[: index + 1], False, where)
        if not (full.startswith(until) and until.startswith(before) and len(before) >= position):
            raise DataError(
                f"{where}: the chat template renders turn {index + 1} differently once later turns "
                "follow, so what would be trained is not what would be seen",
                hint="use conversations of one answer each, or set `task.template: chatml`",
            )
        answer = until[len(before) :]
        trained = _through_end_of_turn(tokenizer, answer)
        segments.append(Segment(full[position : len(before)], trained=False))
        segments.append(Segment(trained, trained=True))
        position = len(before) + len(trained)
    if position < len(full):
        segments.append(Segment(full[position:], trained=False))
    segments = [segment for segment in segments if segment.text]
    if marks is None:
        return segments
    unmarked = [(marks.remove(segment.text), segment.trained) for segment in segments]
    return [Segment(text, trained, literal) for (text, literal), trained in unmarked]


def _through_end_of_turn(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """The answer without the layout that follows its end-of-turn token: generation stops there."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(tuple(special_tokens(tokenizer).ids)) else answer


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot render a conversation.

    Raises:
        ModelError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the model has no chat template",
            hint="set `task.template: chatml`, or give a Jinja file",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generate: bool, where: str
) -> str:
    require_template(tokenizer)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except jinja2.TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation: {error}",
            hint="its roles may have to alternate, or it may not know a role",
        ) from None
    return str(text)
