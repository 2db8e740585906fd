"""Tokenizers trained from scratch: which special tokens a family needs, and the folder they make.

`vocabularies.py` learns the pieces. Here they become a tokenizer as the family of models reads it:

    gpt     nothing added; `<|endoftext|>` ends and pads; if asked, sentinels to fill in the middle
    bert    [CLS] A [SEP]            and [CLS] A [SEP] B [SEP] with segments 0 and 1
    xlnet   A <sep> <cls>            and A <sep> B <sep> <cls> with segments 0, 1 and 2 (<cls>)
    t5      A </s>                   and A </s> B </s>; 100 sentinels, <extra_id_0> the last id
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from fulltune.assets.building import built_whole
from fulltune.config import Settings
from fulltune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TokenizerFamily: TypeAlias = Literal["gpt", "bert", "xlnet", "t5"]
Algorithm: TypeAlias = Literal["bpe", "wordpiece", "unigram", "characters"]

INFO_FILE = "fulltune-tokenizer.json"
NUM_SENTINELS = 100
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
"""What marks the parts of a document whose middle is moved to its end (Bavarian et al., 2022)."""


class TokenizerConfig(Settings):
    """What a new tokenizer is to be."""

    family: TokenizerFamily
    """Models it is for: `gpt`, `bert`, `xlnet` or `t5`; says the special tokens."""
    algorithm: Algorithm | None = None
    """How pieces are found; null takes the family's own: gpt `bpe`, bert `wordpiece`, else
    `unigram`."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens in all, special ones included, exactly; null takes the family's usual number, and for
    `characters` every character of the data."""
    lowercase: bool = False
    """Read every text in lower case; WordPiece then drops accents too, as BERT does."""
    fill_in_the_middle: bool = False
    """gpt: add `<fim_prefix>`, `<fim_middle>` and `<fim_suffix>`, which `objective.fim_rate` of
    pre-training needs."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the documents that is measured on, not trained on; their hash says which ones."""
    character_coverage: Annotated[float, Field(gt=0.9, le=1.0)] = 1.0
    """WordPiece and unigram: share of the text's characters that pieces are made of; the rarest
    ones beyond it are unknown, as is usual for Chinese or Japanese (0.9995). WordPiece reads a word
    with such a character as unknown (each Chinese character is a word), unigram the character."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> TokenizerConfig:
        if self.fill_in_the_middle and self.family != "gpt":
            raise ValueError(
                f"`fill_in_the_middle` has no effect with `family: {self.family}`; leave it out"
            )
        return self


@dataclass(frozen=True)
class FamilyTokens:
    """What a family of models asks of its tokenizer."""

    algorithm: Algorithm
    vocab_size: int
    """Of the family's first published model."""
    special_tokens: tuple[str, ...]
    """In the order of their ids, from 0."""
    names: Mapping[str, str]
    """Transformers' name of a special token -> the token."""
    unknown: str | None
    has_segments: bool = False
    padding_side: Literal["left", "right"] = "right"
    num_sentinels: int = 0


FAMILY_TOKENS: dict[TokenizerFamily, FamilyTokens] = {
    "gpt": FamilyTokens(
        algorithm="bpe",
        vocab_size=50257,
        special_tokens=("<|endoftext|>",),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        unknown=None,
    ),
    "bert": FamilyTokens(
        algorithm="wordpiece",
        vocab_size=30522,
        special_tokens=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        names={
            "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
            "sep_token": "[SEP]", "mask_token": "[MASK]",
        },
        unknown="[UNK]",
        has_segments=True,
    ),
    "xlnet": FamilyTokens(
        algorithm="unigram",
        vocab_size=32000,
        special_tokens=(
            "<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>",
        ),
        names={
            "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<cls>",
            "sep_token": "<sep>", "pad_token": "<pad>", "mask_token": "<mask>",
        },
        unknown="<unk>",
        has_segments=True,
        padding_side="left",
    ),
    "t5": FamilyTokens(
        algorithm="unigram",
        vocab_size=32100,
        special_tokens=("<pad>", "</s>", "<unk>"),
        names={"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        unknown="<unk>",
        num_sentinels=NUM_SENTINELS,
    ),
}  # fmt: skip


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a stream of texts; the same texts in order give the same tokenizer.

    Memory grows with the distinct words of the text, not with its length.

    Raises:
        ConfigError: the special tokens alone exceed the vocabulary.
        DataError: the texts support no vocabulary of this size; the message says how many tokens
            they gave.
        MissingExtraError: the package of the unigram trainer is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    from fulltune.data import vocabularies

    check_vocabulary_size(config)
    family = FAMILY_TOKENS[config.family]
    algorithm = config.algorithm or family.algorithm
    special_tokens, unknown = _special_tokens(config)
    names = dict(family.names)
    if unknown is not None:
        names["unk_token"] = unknown
    size = config.vocab_size
    if size is None and algorithm != "characters":
        size = family.vocab_size
    backend = vocabularies.LEARNERS[algorithm](
        documents,
        vocabularies.Wanted(
            size=None if size is None else size - family.num_sentinels,
            special_tokens=special_tokens,
            unknown=unknown,
            lowercase=config.lowercase,
            character_coverage=config.character_coverage,
        ),
    )
    num_given = backend.get_vocab_size() + family.num_sentinels
    if size is not None and num_given < size:
        raise DataError(
            f"a vocabulary of {size:,} tokens is larger than the data supports: it gave "
            f"{num_given:,}",
            hint=f"`--vocab-size {num_given}` or less, or more text",
        )
    if size is not None and num_given > size:
        raise DataError(
            f"a vocabulary of {size:,} tokens is too small for the data: its characters and the "
            f"special tokens alone are {num_given:,}",
            hint=f"`--vocab-size {num_given}` or more"
            + ("" if algorithm == "bpe" else ", or a lower `--character-coverage`"),
        )
    backend.add_special_tokens(special_tokens)
    # Counting down from the top, as T5 has them: <extra_id_0> is the last id.
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(family.num_sentinels))]
    backend.add_special_tokens(sentinels)
    _add_post_processor(backend, config.family, algorithm)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[
            *(token for token in special_tokens if token not in names.values()),
            *reversed(sentinels),
        ],
        padding_side=family.padding_side,
        model_input_names=[
            "input_ids",
            *(["token_type_ids"] if family.has_segments else []),
            "attention_mask",
        ],
        clean_up_tokenization_spaces=False,
        **names,
    )


def check_vocabulary_size(config: TokenizerConfig) -> None:
    """See that the vocabulary has room for more than the special tokens.

    Raises:
        ConfigError: it has not.
    """
    num_reserved = len(_special_tokens(config)[0]) + FAMILY_TOKENS[config.family].num_sentinels
    if config.vocab_size is not None and config.vocab_size <= num_reserved:
        raise ConfigError(
            f"a vocabulary of {config.vocab_size} leaves no room: `{config.family}` has "
            f"{num_reserved} special tokens",
            hint=f"give more than {num_reserved}",
        )


def stand_in(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with all special tokens of the one to be trained, before there is text."""
    characters = {"algorithm": "characters", "vocab_size": None}
    return train_tokenizer(["a"], config.model_copy(update=characters))


def _special_tokens(config: TokenizerConfig) -> tuple[list[str], str | None]:
    """Special tokens in the order of their ids, without sentinels; and the unknown token if any."""
    family = FAMILY_TOKENS[config.family]
    tokens, unknown = list(family.special_tokens), family.unknown
    if unknown is None and (config.algorithm or family.algorithm) != "bpe":
        unknown = "<unk>"
        tokens.append(unknown)
    return [*tokens, *(FIM_TOKENS if config.fill_in_the_middle else ())], unknown


def _add_post_processor(backend: Tokenizer, family: TokenizerFamily, algorithm: Algorithm) -> None:
    from tokenizers import processors

    def numbered(*tokens: str) -> list[tuple[str, int]]:
        vocabulary = backend.get_vocab()
        return [(token, vocabulary[token]) for token in tokens]

    if family == "bert":
        backend.post_processor = processors.BertProcessing(*numbered("[SEP]", "[CLS]"))
    elif family == "xlnet":
        backend.post_processor = processors.TemplateProcessing(
            single="$A:0 <sep>:0 <cls>:2",
            pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
            special_tokens=numbered("<sep>", "<cls>"),
        )
    elif family == "t5":
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=numbered("</s>")
        )
    elif algorithm == "bpe":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)


def readable_piece(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A piece as the text it stands for, its space included; of part of a character, the bytes.

    Byte-level BPE has letters for bytes (`Ġ` is a space, `ä¸Ń` is 中), SentencePiece writes a space
    as `▁`. A piece that goes on with a word keeps WordPiece's `##`.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = str(tokenizer.convert_ids_to_tokens(number))
    if number in tokenizer.added_tokens_decoder:
        return name
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
        return name.replace("▁", " ")
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(bytes_of[letter] for letter in name).decode("utf-8", "backslashreplace")


def check_output(folder: Path) -> None:
    """Refuse an output folder that is there already.

    Raises:
        ConfigError: it exists, or what should be its parent is a file or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"`{folder}` exists already, and is never overwritten",
            hint="give `output` another name, or remove it",
        )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ConfigError(
            f"`{folder}` cannot be made: `{parent}` is a file",
            hint="give `output` another name",
        )
    if not os.access(parent, os.W_OK):
        raise ConfigError(
            f"`{folder}` cannot be made: `{parent}` may not be written",
            hint="give `output` another place",
        )


def write_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: Path, *, info: Mapping[str, Any]
) -> None:
    """Write a folder that `AutoTokenizer` loads, with ``info`` beside it; whole, or not at all.

    Raises:
        ConfigError: the folder exists.
    """
    check_output(folder)
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    with built_whole(folder) as building:
        tokenizer.save_pretrained(building)
        (building / INFO_FILE).write_text(text, encoding="utf-8")
