"""Readable labels of tokens, one for each, as charts over tokens need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fulltune.data.preview_view import MAX_CHARACTER_TOKENS, visible

_UNDECODED = "\ufffd"


def label_tokens(
    decode: Callable[[list[int]], str], input_ids: Sequence[int], tokens: Sequence[str]
) -> list[str]:
    """A label for each token, without the marks of its tokenizer.

    A space before a word is left out. WordPiece keeps its `##`, which says that a word goes on.
    Where several tokens make one character, as bytes of Chinese text do, each is labelled with
    the character and its number: `法 1/3`. Bytes that make no character are their token.

    Args:
        decode: ids to text, special tokens included.
        input_ids: the tokens of one text.
        tokens: the same, in the tokenizer's own writing.
    """
    labels: list[str] = []
    while len(labels) < len(input_ids):
        start = len(labels)
        if tokens[start].startswith("##"):
            labels.append(tokens[start])
            continue
        for stop in range(start + 1, min(start + MAX_CHARACTER_TOKENS, len(input_ids)) + 1):
            text = decode(list(input_ids[start:stop]))
            if _UNDECODED not in text:
                break
        else:
            labels.append(visible(tokens[start]))
            continue
        label = _shown(text)
        num_parts = stop - start
        if num_parts == 1:
            labels.append(label)
        else:
            labels += [f"{label} {part}/{num_parts}" for part in range(1, num_parts + 1)]
    return labels


def _shown(text: str) -> str:
    """Text in one line; what is only space is drawn."""
    if not text.strip(" "):
        return "␣" * max(1, len(text))
    return visible(text.strip(" ")).replace("⏎\n", "⏎").replace("⇥\t", "⇥")
