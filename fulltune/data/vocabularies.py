"""Pieces learned from text: byte-level BPE, WordPiece, unigram, characters.

The same texts give the same pieces in every process. The trainers of `tokenizers` for WordPiece and
unigram do not: they walk hash maps whose order is drawn anew, and ties fall by that order. So
WordPiece is learned here by the BPE trainer, whose ties fall by id, on characters that stand for
`a` and `##a`; and unigram by SentencePiece, which XLNet and T5 were made with, in one thread.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fulltune.errors import DataError, MissingExtraError

MIN_FREQUENCY = 2
"""BPE and WordPiece: a pair seen once is a typing error or a name, and is not joined."""
MAX_WORD_CHARACTERS = 100
"""WordPiece takes a longer word as unknown."""

# Words with the space before them; Chinese, letters, digits and signs apart, as SentencePiece
# keeps scripts apart: a piece such as `。我` would say nothing.
_SCRIPT_RUNS = r"▁?(?:\p{Han}+|[\p{L}\p{M}&&[^\p{Han}]]+|\p{N}+|[^\p{L}\p{M}\p{N}▁]+)|▁"
_STAND_INS = 0x10000  # above the last white space of Unicode, which would cut a word
_MAX_REPEATS = 1000


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be learned."""

    size: int | None
    """Pieces in all, the special tokens included; None takes all characters (`characters`)."""
    special_tokens: Sequence[str]
    unknown: str | None
    lowercase: bool
    character_coverage: float


def learn_bpe(documents: Iterable[str], wanted: Wanted) -> Tokenizer:
    """Byte-level BPE, as GPT-2: every text can be written, and decodes to itself."""
    backend = Tokenizer(models.BPE())
    if wanted.lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_size(wanted),
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(wanted.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def learn_wordpiece(documents: Iterable[str], wanted: Wanted) -> Tokenizer:
    """WordPiece, as BERT: each Chinese character is a word, and `##` begins a piece within one."""
    assert wanted.unknown is not None
    normalizer = normalizers.BertNormalizer(lowercase=wanted.lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counted = _count_words(documents, normalizer, pre_tokenizer)
    rare = _uncovered(counted, wanted)
    # A word that holds an unknown character is unknown as a whole to WordPiece.
    words = {
        word: count
        for word, count in counted.items()
        if len(word) <= MAX_WORD_CHARACTERS and rare.isdisjoint(word)
    }
    symbols = sorted({symbol for word in words for symbol in _symbols(word)})
    stand_ins = {symbol: chr(_STAND_INS + index) for index, symbol in enumerate(symbols)}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=_size(wanted),
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(wanted.special_tokens),
        show_progress=False,
    )
    learner.train_from_iterator(_repeated(words, stand_ins), trainer)
    vocabulary = {
        _joined(piece, symbols) if number >= len(wanted.special_tokens) else piece: number
        for piece, number in learner.get_vocab().items()
    }
    backend = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=wanted.unknown, max_input_chars_per_word=MAX_WORD_CHARACTERS
        )
    )
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.WordPiece()
    return backend


def _symbols(word: str) -> Iterator[str]:
    for index, character in enumerate(word):
        yield f"##{character}" if index else character


def _repeated(words: Mapping[str, int], stand_ins: Mapping[str, str]) -> Iterator[str]:
    """Each word as often as it was counted, in stand-ins and in lines of bounded length."""
    for word, count in words.items():
        written = "".join(stand_ins[symbol] for symbol in _symbols(word)) + " "
        for start in range(0, count, _MAX_REPEATS):
            yield written * min(_MAX_REPEATS, count - start)


def _joined(piece: str, symbols: Sequence[str]) -> str:
    first, *others = (symbols[ord(character) - _STAND_INS] for character in piece)
    return first + "".join(symbol.removeprefix("##") for symbol in others)


def learn_unigram(documents: Iterable[str], wanted: Wanted) -> Tokenizer:
    """The unigram language model of SentencePiece (Kudo, 2018); spaces are part of the pieces.

    Text is NFKC-normalized and its white space is single spaces, so that line breaks are lost.
    """
    assert wanted.unknown is not None
    steps = [
        normalizers.NFKC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        *([normalizers.Lowercase()] if wanted.lowercase else []),
    ]
    normalizer = normalizers.Sequence(steps)
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(_SCRIPT_RUNS), "isolated"),
        ]
    )
    counted = _count_words(documents, normalizer, pre_tokenizer)
    words = _cut_at(counted, _uncovered(counted, wanted))
    pieces = [(token, 0.0) for token in wanted.special_tokens]
    num_characters = len({character for word in words for character in word})
    if num_characters + len(pieces) <= _size(wanted):
        pieces += _sentencepieces(words, _size(wanted) - len(pieces))
    else:  # more than was wanted: the caller says so
        pieces += [(character, 0.0) for character in sorted({c for word in words for c in word})]
    backend = Tokenizer(models.Unigram(pieces, wanted.special_tokens.index(wanted.unknown), False))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend


def _sentencepieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """So many pieces with log probabilities, the likeliest first; fewer if there are no more."""
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtraError(
            "unigram is learned by the package `sentencepiece`, which is not installed",
            hint="pip install 'fulltune[tokenizer]'",
        ) from None

    def train(size: int) -> list[tuple[str, float]]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in words.items()),
            model_writer=model,
            input_format="tsv",
            model_type="unigram",
            vocab_size=size + 1,  # with its own <unk>
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=3,
        )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ids = range(1, processor.get_piece_size())
        return [(processor.id_to_piece(number), processor.get_score(number)) for number in ids]

    try:
        return train(size)
    except RuntimeError as error:
        found = re.search(r"set it to a value <= (\d+)", str(error))
        if found is None:
            raise
        return train(int(found[1]) - 1)


def learn_characters(documents: Iterable[str], wanted: Wanted) -> Tokenizer:
    """One token for a character, the most frequent ones if not all are wanted."""
    assert wanted.unknown is not None
    normalizer = normalizers.Lowercase() if wanted.lowercase else None
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document) if normalizer else document)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    if wanted.size is not None:
        ranked = ranked[: wanted.size - len(wanted.special_tokens)]
    tokens = [*wanted.special_tokens, *sorted(ranked)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=wanted.unknown))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


LEARNERS: dict[str, Callable[[Iterable[str], Wanted], Tokenizer]] = {
    "bpe": learn_bpe,
    "wordpiece": learn_wordpiece,
    "unigram": learn_unigram,
    "characters": learn_characters,
}


def _size(wanted: Wanted) -> int:
    assert wanted.size is not None, "only `characters` takes what there is"
    return wanted.size


def _count_words(
    documents: Iterable[str],
    normalizer: normalizers.Normalizer,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> Counter[str]:
    """The words of all texts, sorted: their order is the trainers' order."""
    words: Counter[str] = Counter()
    for document in documents:
        normalized = normalizer.normalize_str(document)
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalized))
    if not words:
        raise DataError(
            "the documents hold no words: nothing is left of them but white space",
            hint="is this the right column?",
        )
    return Counter(dict(sorted(words.items())))


def _uncovered(words: Counter[str], wanted: Wanted) -> set[str]:
    """The characters beyond the coverage, rarest first."""
    if wanted.character_coverage == 1.0:
        return set()
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    left = (1 - wanted.character_coverage) * counts.total()
    dropped = set()
    for character in sorted(counts, key=lambda character: (counts[character], character)):
        left -= counts[character]
        if left < 0:
            break
        dropped.add(character)
    return dropped


def _cut_at(words: Counter[str], characters: set[str]) -> Counter[str]:
    """What stands between these characters, which no piece holds, as SentencePiece's trainer does.

    A run of Chinese is one word, of which only the rare characters are lost.
    """
    if not characters:
        return words
    rare = re.compile(f"[{re.escape(''.join(sorted(characters)))}]+")
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for part in rare.split(word):
            if part:
                parts[part] += count
    return Counter(dict(sorted(parts.items())))
