"""Words to tokens, with the token of each word at which its tag is learned and read.

A word is cut as it is cut in running text, but never together with its neighbours, as
SentencePiece would cut Chinese. Its tag is that of its first piece (Devlin et al., 2019) that is
more than the space before the word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulltune.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What SentencePiece and byte-level tokenizers write for a space.
_SPACES = ("▁", "Ġ")


@dataclass(frozen=True, slots=True)
class WordPieces:
    """The tokens of some words."""

    input_ids: list[int]
    is_target: list[int]
    """As long as ``input_ids``: 1 at one token of each word that is kept, else 0."""
    token_type_ids: list[int]
    """As long as ``input_ids``, or empty where the model has no segments."""
    num_words: int
    """Words that are kept, from the first on."""
    num_removed: int
    """Tokens that did not fit."""


def require_word_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot tell which word a token is of.

    Raises:
        ModelError: it is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not tell which word a token is of, "
            "which tagging needs",
            hint="use a model with a tokenizer.json (a fast tokenizer)",
        )


def encode_words(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    spaces: Sequence[bool],
    *,
    max_length: int | None = None,
    where: str,
) -> WordPieces:
    """Cut words into tokens.

    A word that the tokenizer makes nothing of, such as a character that its normalization removes,
    is its unknown token, so that each word has a tag and the preview counts it.

    Args:
        tokenizer: a fast one.
        words: none empty.
        spaces: whether a space stands before each.
        max_length: most tokens, special ones included; the last words are cut off.
        where: file and line, for errors.

    Raises:
        DataError: a word has no token, and the tokenizer has none for what it does not know.
    """
    backend = tokenizer.backend_tokenizer
    # Byte-level tokenizers read the space as part of the word; others ignore or restore it.
    texts = [f" {word}" if space else word for word, space in zip(words, spaces, strict=True)]
    encoding = backend.encode(texts, is_pretokenized=True)
    pieces: list[list[tuple[int, str]]] = [[] for _ in words]
    frame: list[tuple[int, int]] = []
    num_before, kind = 0, 0
    for token, text, word, segment in zip(
        encoding.ids, encoding.tokens, encoding.word_ids, encoding.type_ids, strict=True
    ):
        if word is None:
            frame.append((token, segment))
            continue
        if not any(pieces):
            num_before, kind = len(frame), segment
        pieces[word].append((token, text))
    if not any(pieces):
        raise DataError(
            f"{where}: the tokenizer makes no token of any of the {len(words)} words",
            hint="drop the row, or choose a model whose tokenizer knows this script",
        )
    tokens: list[tuple[int, int]] = []  # and whether it is the target of its word
    for place, of_word in enumerate(pieces):
        if not of_word:
            of_word = [(_unknown(tokenizer, words[place], where), "")]
        if place and not spaces[place]:
            of_word = _without_space(tokenizer, of_word)
        target = int(len(of_word) > 1 and of_word[0][1] in _SPACES)
        tokens += [(token, int(number == target)) for number, (token, _) in enumerate(of_word)]
    room = len(tokens) if max_length is None else max(max_length - len(frame), 0)
    kept = tokens[:room]
    before, after = frame[:num_before], frame[num_before:]
    segments = "token_type_ids" in tokenizer.model_input_names
    return WordPieces(
        input_ids=[*(t for t, _ in before), *(t for t, _ in kept), *(t for t, _ in after)],
        is_target=[*(0 for _ in before), *(target for _, target in kept), *(0 for _ in after)],
        token_type_ids=[*(s for _, s in before), *(kind for _ in kept), *(s for _, s in after)]
        if segments
        else [],
        num_words=sum(target for _, target in kept),
        num_removed=len(tokens) - len(kept),
    )


def _without_space(
    tokenizer: PreTrainedTokenizerBase, of_word: list[tuple[int, str]]
) -> list[tuple[int, str]]:
    """The tokens of a word inside of running text: SentencePiece puts a space before each."""
    (token, text), *others = of_word
    if text in _SPACES and others:
        return others
    if text[:1] in _SPACES and len(text) > 1:
        inside = tokenizer.backend_tokenizer.token_to_id(text[1:])
        return [(token if inside is None else inside, text), *others]
    return of_word


def _unknown(tokenizer: PreTrainedTokenizerBase, word: str, where: str) -> int:
    if tokenizer.unk_token_id is None:
        raise DataError(
            f"{where}: the tokenizer makes no token of the word {word!r}, and has no token for "
            "what it does not know",
            hint="drop the word, or write it with other characters",
        )
    return int(tokenizer.unk_token_id)
