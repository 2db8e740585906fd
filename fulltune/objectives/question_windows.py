"""A question and its context as tokens: windows of a long context, and the tokens of an answer.

A window holds the whole question and a part of the context, in the tokenizer's own form of a pair.
A tokenizer without separators (most decoders) gets a line break behind the question. Each window
also has a token that stands for "the answer is not here": its first, or for models whose last token
is the one that has seen all others, its last; where the context would be the last, the end token
is put behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fulltune.errors import ConfigError, DataError, ModelError
from fulltune.objectives.base import TooLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Window:
    """A question with a part of its context."""

    input_ids: list[int]
    token_type_ids: list[int]
    """Empty where the tokenizer gives none."""
    first: int
    """Place in ``input_ids`` of the context's first token here."""
    begins: list[int]
    """Of each context token here, the character of the whole context where it begins; spaces
    around a token are not counted to it."""
    ends: list[int]
    """Likewise, behind its last character."""
    num_before: int
    """Context tokens before this window."""


@dataclass(frozen=True, slots=True)
class CutQuestion:
    """All windows of a question, and how much of the question is in none."""

    windows: list[Window]
    num_removed: int
    """Tokens cut off the end of the question."""
    begins: list[int]
    """Of all tokens of the context, as in `Window`."""
    ends: list[int]


def cut_question(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    context: str,
    *,
    max_length: int,
    stride: int,
    marker: Literal["first", "last"],
    too_long: TooLong,
    where: str,
) -> CutQuestion:
    """Cut a question and its context into windows of at most ``max_length`` tokens.

    Args:
        tokenizer: a fast tokenizer.
        question: kept whole in each window.
        context: of which neighbouring windows share ``stride`` tokens.
        max_length: special tokens included.
        stride: tokens of the context.
        marker: which token of a window stands for no answer.
        too_long: what happens to a question that leaves too little of a window for a context that
            does not fit: fewer tokens than twice the stride or a quarter of the window.
        where: file and line, for messages.

    Returns:
        No window where the question is dropped.

    Raises:
        DataError: the question is too long, or the context has no token.
        ModelError: the tokenizer does not say which characters its tokens are.
        ConfigError: not even a short question fits.
    """
    backend: Any = require_offsets(tokenizer).backend_tokenizer
    separated = tokenizer.num_special_tokens_to_add(pair=True) > (
        tokenizer.num_special_tokens_to_add(pair=False)
    )
    asked = backend.encode(question if separated else f"{question}\n", add_special_tokens=False)
    read = backend.encode(context, add_special_tokens=False)
    begins, ends = _characters(context, read.offsets)
    if not read.ids:
        raise DataError(f"{where}: the context has no tokens", hint="drop the row")
    if max(ends) == 0:
        raise _no_offsets(tokenizer)
    end_token = _end_token(tokenizer, backend) if marker == "last" else None
    around = tokenizer.num_special_tokens_to_add(pair=True) + (end_token is not None)
    room = max_length - around - len(asked.ids)
    num_removed = 0
    needed = max(2 * stride, max_length // 4, 1)
    if len(read.ids) > room and room < needed:
        num_removed = needed - room
        if num_removed >= len(asked.ids):
            raise ConfigError(
                f"`task.max_length` of {max_length} leaves no room for a question beside windows "
                f"of {needed} tokens of its context",
                hint="raise it, or lower `task.stride`",
            )
        if too_long == "drop":
            return CutQuestion([], num_removed, begins, ends)
        if too_long == "error":
            raise DataError(
                f"{where}: the question has {len(asked.ids):,} tokens, which leaves {max(room, 0)} "
                f"of {max_length:,} for a window of its context, and {needed} are needed",
                hint="raise `task.max_length`, lower `task.stride`, or set `task.too_long` to "
                "`truncate` or `drop`",
            )
        asked.truncate(len(asked.ids) - num_removed)
        room = needed
    if len(read.ids) > room:
        read.truncate(room, stride=stride)
    windows = []
    for number, part in enumerate([read, *read.overflowing]):
        num_before = number * (room - stride)
        here = slice(num_before, num_before + len(part.ids))
        input_ids, token_type_ids, first = _joined(tokenizer, backend, asked, part, end_token)
        windows.append(
            Window(input_ids, token_type_ids, first, begins[here], ends[here], num_before)
        )
    return CutQuestion(windows, num_removed, begins, ends)


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, where it knows which characters its tokens are.

    Raises:
        ModelError: it does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _no_offsets(tokenizer)
    return tokenizer


def _no_offsets(tokenizer: PreTrainedTokenizerBase) -> ModelError:
    return ModelError(
        f"the tokenizer ({type(tokenizer).__name__}) does not say which characters of a text its "
        "tokens are, so that no answer can be found in a context",
        hint="choose a model with a fast tokenizer (tokenizer.json)",
    )


def _end_token(tokenizer: PreTrainedTokenizerBase, backend: Any) -> int | None:
    """What is put behind a context that the tokenizer itself puts nothing behind."""
    pair = backend.post_process(
        backend.encode("a", add_special_tokens=False),
        backend.encode("b", add_special_tokens=False),
        True,
    )
    if pair.sequence_ids[-1] != 1:
        return None
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.pad_token_id
    if end is None:
        raise ModelError(
            "the tokenizer has no end token, which stands for no answer in a window",
            hint="name it as `eos_token` in tokenizer_config.json",
        )
    return int(end)


def _characters(context: str, offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Where tokens begin and end, without the spaces that some tokenizers count to them."""
    begins, ends = [], []
    for begin, end in offsets:
        while begin < end and context[begin].isspace():
            begin += 1
        while end > begin and context[end - 1].isspace():
            end -= 1
        begins.append(begin)
        ends.append(end)
    return begins, ends


def _joined(
    tokenizer: PreTrainedTokenizerBase, backend: Any, asked: Any, part: Any, end_token: int | None
) -> tuple[list[int], list[int], int]:
    """Ids and segments of a question with a part of its context, and where the context begins."""
    pair = backend.post_process(asked, part, True)
    after = [] if end_token is None else [end_token]
    typed = "token_type_ids" in tokenizer.model_input_names
    return (
        [*pair.ids, *after],
        [*pair.type_ids, *pair.type_ids[-1:] * len(after)] if typed else [],
        pair.sequence_ids.index(1),
    )


def tokens_of(begins: list[int], ends: list[int], begin: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that hold a character of a span; None where none does."""
    touched = [
        place
        for place, (first, last) in enumerate(zip(begins, ends, strict=True))
        if first < end and last > begin
    ]
    return (touched[0], touched[-1]) if touched else None
