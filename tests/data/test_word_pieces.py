"""Each word has one token at which its tag is learned, in every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fulltune.data.word_pieces import WordPieces, encode_words, require_word_ids
from fulltune.data.words import spaces_before
from fulltune.errors import DataError, ModelError

CHINESE = list("法国的首都是巴黎")


def pieces_of(tokenizer: PreTrainedTokenizerBase, words: list[str], **options: int) -> WordPieces:
    return encode_words(tokenizer, words, spaces_before(words), where="a:1", **options)


def targets_of(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[str]:
    """The tokens of the text, those that are targets in brackets."""
    pieces = pieces_of(tokenizer, words)
    assert sum(pieces.is_target) == pieces.num_words == len(words)
    tokens = tokenizer.convert_ids_to_tokens(pieces.input_ids)
    return [f"[{t}]" if target else t for t, target in zip(tokens, pieces.is_target, strict=True)]


def test_wordpiece_learns_at_the_first_piece_of_each_word(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    first, *others = tokenizer.tokenize("Riverside")
    assert others
    assert targets_of(tokenizer, ["Riverside", "is", "red"]) == [
        "[CLS]", f"[{first}]", *others, "[is]", "[red]", "[SEP]",
    ]  # fmt: skip
    assert targets_of(tokenizer, CHINESE) == [
        "[CLS]", *(f"[{character}]" for character in CHINESE), "[SEP]",
    ]  # fmt: skip
    pieces = pieces_of(tokenizer, ["the", "river"])
    assert pieces.token_type_ids == [0] * len(pieces.input_ids)


def test_byte_level_words_are_those_of_running_text(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    words = ["The", "capital", "of", "Rome"]
    assert pieces_of(tokenizer, words).input_ids == tokenizer(" ".join(words))["input_ids"]
    targets = [token for token in targets_of(tokenizer, words) if token.startswith("[")]
    assert [target.strip("[Ġ")[0] for target in targets] == ["T", "c", "o", "R"]
    # A Chinese character is up to three tokens, and no space is put before it.
    pieces = pieces_of(tokenizer, CHINESE)
    assert tokenizer.decode(pieces.input_ids) == "".join(CHINESE)
    assert pieces.token_type_ids == []


def test_sentencepiece_gets_no_space_between_characters() -> None:
    texts = ["<s>", "</s>", "<unk>", "▁", "▁the", "▁r", "ed", "▁的", *CHINESE, "x"]
    backend = Tokenizer(
        models.Unigram([(text, -float(place)) for place, text in enumerate(texts)], unk_id=2)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert targets_of(tokenizer, CHINESE) == [
        "<s>", "▁", *(f"[{character}]" for character in CHINESE), "</s>",
    ]  # fmt: skip
    # `的` is one piece with the space that is not there, and is that without it.
    assert targets_of(tokenizer, ["的"])[1] == "[▁的]"
    # Where a word has a space of its own, its first piece with a letter is the target.
    assert targets_of(tokenizer, ["the", "red", "x"]) == [
        "<s>", "[▁the]", "[▁r]", "ed", "▁", "[x]", "</s>",
    ]  # fmt: skip


def test_a_word_that_becomes_nothing_is_the_unknown_token(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert targets_of(tokenizer, ["the", "\u200b", "river", "\u3000"]) == [
        "[CLS]", "[the]", "[[UNK]]", "[river]", "[[UNK]]", "[SEP]",
    ]  # fmt: skip


def test_a_word_without_token_and_unknown_token_is_an_error() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    with pytest.raises(DataError, match=r"a:1: the tokenizer makes no token of the word '\\u3000'"):
        pieces_of(tokenizer, ["a", "\u3000"])
    with pytest.raises(DataError, match=r"a:1: the tokenizer makes no token of any of the 1 words"):
        pieces_of(tokenizer, ["\u3000"])


def test_truncation_takes_words_from_the_end_and_keeps_the_frame(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    words = ["the", "river", "is", "red"]
    pieces = pieces_of(tokenizer, words, max_length=4)
    assert tokenizer.convert_ids_to_tokens(pieces.input_ids) == ["[CLS]", "the", "river", "[SEP]"]
    assert (pieces.num_words, pieces.num_removed, pieces.is_target) == (2, 2, [0, 1, 1, 0])


def test_a_tokenizer_that_cannot_align_words_is_refused() -> None:
    with pytest.raises(ModelError, match="does not tell which word a token is of"):
        require_word_ids(SimpleNamespace(is_fast=False))
