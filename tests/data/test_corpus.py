"""Stages of a corpus: what each removes and what it keeps, in English and in Chinese."""

from __future__ import annotations

import gzip
import itertools
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fulltune.data.binary import find_binary
from fulltune.data.cleaning import (
    CleaningConfig,
    LanguageFilter,
    LengthConfig,
    clean,
    refusal_by_length,
)
from fulltune.data.deduplication import (
    NearDuplicatesConfig,
    Signer,
    as_pairs,
    document_digest,
    find_exact_duplicates,
    find_near_duplicates,
)
from fulltune.data.files import TextReading
from fulltune.data.ngrams import EvaluationNgrams, fold, hash_ngrams, hash_tokens, tokens_of
from fulltune.data.records import read_records
from fulltune.errors import ConfigError, DataError, MissingExtraError

ENGLISH = (
    "the river runs below the old stone bridge and every spring the children of the village come "
    "to see how high the water stands before the miller opens the gates of his dam again"
)
CHINESE = "春天来了河边的柳树发出新芽孩子们跑到田野里放风筝老人坐在门前晒着温暖的太阳谈论今年的收成"


# -- cleaning and filters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "cleaned", "changes"),
    [
        ("plain text\nin two lines", "plain text\nin two lines", ()),
        ("中文文本。\n\n第二段。", "中文文本。\n\n第二段。", ()),
        ("a\r\nb\rc", "a\nb\nc", ("control characters",)),
        ("a\x00b\x1fc\ufeff", "abc", ("control characters",)),
        ("cafe\u0301", "caf\u00e9", ("not NFC",)),
        ("line  \nnext\t\n中文\u3000", "line\nnext\n中文", ("trailing spaces",)),
        ("\n\na\n\n\n\nb\n", "a\n\nb", ("blank lines",)),
        ("a \n \n \n\nb", "a\n\nb", ("trailing spaces", "blank lines")),
        ("\tcode  keeps  its  spaces", "\tcode  keeps  its  spaces", ()),
        ("می\u200cخواهم", "می\u200cخواهم", ()),
    ],
)
def test_cleaning_says_what_it_changed(raw: str, cleaned: str, changes: tuple[str, ...]) -> None:
    assert clean(raw, CleaningConfig()) == (cleaned, changes)
    assert clean(cleaned, CleaningConfig()) == (cleaned, ())


def test_every_rule_of_cleaning_can_be_left_out() -> None:
    raw = "e\u0301\x00 \r\n\n\n\nb  "
    nothing = CleaningConfig(
        unicode=False, control_characters=False, trailing_spaces=False, blank_lines=None
    )
    assert clean(raw, nothing) == (raw, ())


def test_lengths_are_characters_and_not_bytes() -> None:
    limits = LengthConfig(min_characters=3, max_characters=5)
    assert refusal_by_length(" \n", limits) == "empty"
    assert refusal_by_length("中文", limits) == "shorter than 3 characters"
    assert refusal_by_length("一二三四五", limits) is None
    assert refusal_by_length("一二三四五六", limits) == "longer than 5 characters"


def test_languages_are_told_apart() -> None:
    keep = LanguageFilter(["en", "zh"])
    assert keep.refusal("The weather was fine, and they walked along the river.") is None
    assert keep.refusal("今天天气很好，我们去公园散步，看到了很多美丽的花。") is None
    german = "Der schnelle braune Fuchs springt über den faulen Hund in den Wald."
    assert keep.refusal(german) == "language de"
    with pytest.raises(ConfigError, match="`klingon`") as error:
        LanguageFilter(["klingon"])
    assert "en" in str(error.value.hint)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    for use in (
        lambda: LanguageFilter(["en"]),
        lambda: Signer(NearDuplicatesConfig(threshold=0.8)),
    ):
        with pytest.raises(MissingExtraError) as error:
            use()
        assert error.value.hint == "pip install 'fulltune[corpus]'"


def test_binary_junk_and_half_characters_are_named() -> None:
    for text, reason, message in (
        ("a\x00b\x00c\x01", "control characters", "3 of 6 .* character 2 \\(U\\+0000\\)"),
        ("a\ud800", "half a character", "holds half a character"),
        ("中\udcff文", "not UTF-8", "not UTF-8: holds the byte 0xff"),
    ):
        found = find_binary(text, "x.jsonl:3")
        assert found is not None
        assert found.reason == reason
        assert re.match(f"x\\.jsonl:3: .*{message}", "x.jsonl:3: " + found.message)
        assert found.hint
    assert find_binary("one stray \x00 in a long text is cleaned away", "x.jsonl:5") is None


# -- duplicates ------------------------------------------------------------------------------------


def test_tokens_are_words_and_chinese_characters() -> None:
    assert tokens_of(fold("Hello,  World! 你好，GPT-4")) == [
        "hello",
        "world",
        "你",
        "好",
        "gpt",
        "4",
    ]


def first_equal(texts: list[str]) -> list[int]:
    return find_exact_duplicates(as_pairs([document_digest(fold(t)) for t in texts])).tolist()


def test_exact_duplicates_fall_to_the_first() -> None:
    texts = ["A cat.", "你好", "a  CAT.\n", "A cat!", "你好", "ｆｕｌｌ", "full"]
    assert first_equal(texts) == [0, 1, 0, 3, 1, 5, 5]
    assert first_equal(["one"]) == [0]


def near_duplicates(tmp_path: Path, texts: list[str], threshold: float = 0.7) -> dict[int, int]:
    config = NearDuplicatesConfig(threshold=threshold)
    signer = Signer(config)
    signatures = [
        signer.sign(hash_tokens(tokens_of(fold(text))), document_digest(fold(text)))
        for text in texts
    ]
    (tmp_path / "signatures").write_bytes(b"".join(signatures))
    return find_near_duplicates(tmp_path / "signatures", np.arange(len(texts)), config)


@pytest.mark.parametrize("text", [ENGLISH * 2, CHINESE * 2])
def test_near_duplicates_are_found_and_others_kept(tmp_path: Path, text: str) -> None:
    words = text.split(" ")
    other = " ".join(reversed(words)) if len(words) > 1 else text[::-1]
    edited = text[:-3] + "xyz"
    assert near_duplicates(tmp_path, [text, other, edited]) == {2: 0}


def test_a_chain_of_changes_keeps_its_far_end(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(200)]
    # Neighbours share 81 % of their shingles, the ends 66 %.
    chain = [" ".join(words[shift : shift + 150]) for shift in (0, 15, 30)]
    assert near_duplicates(tmp_path, chain[1:], threshold=0.73) == {1: 0}
    found = near_duplicates(tmp_path, [*chain, chain[2] + " end"], threshold=0.73)
    assert found == {1: 0, 3: 2}


def test_texts_shorter_than_a_shingle_are_not_all_alike(tmp_path: Path) -> None:
    assert near_duplicates(tmp_path, ["yes", "no", "…", "!!", "好"]) == {}


def test_estimated_near_duplicates_agree_with_the_true_similarity(tmp_path: Path) -> None:
    """Pairs well above the threshold are found, pairs well below are not."""
    draw = random.Random(3)
    words = [f"word{number}" for number in range(2000)]
    texts, similarities = [], []
    for share in (0.0, 0.01, 0.02, 0.1, 0.2, 0.5) * 4:
        text = draw.choices(words, k=300)
        edited = [draw.choice(words) if draw.random() < share else word for word in text]
        texts += [" ".join(text), " ".join(edited) + " end"]
        a, b = (set(hash_ngrams(hash_tokens(tokens_of(each)), 5).tolist()) for each in texts[-2:])
        similarities.append(len(a & b) / len(a | b))
    found = near_duplicates(tmp_path, texts)
    for pair, similarity in enumerate(similarities):
        # The deviation of an estimate from 128 permutations is 0.04 here.
        if similarity > 0.85:
            assert found.get(2 * pair + 1) == 2 * pair
        if similarity < 0.5:
            assert 2 * pair + 1 not in found


# -- evaluation data -------------------------------------------------------------------------------


def test_documents_that_hold_evaluation_data_are_found_by_file(tmp_path: Path) -> None:
    english, chinese = tmp_path / "english.jsonl", tmp_path / "chinese.jsonl"
    english.write_text(
        '{"messages": [{"role": "user", "content": "' + ENGLISH + '"}]}\n{"text": "too short"}\n'
    )
    chinese.write_text('{"question": "' + CHINESE + '", "answer": 3}\n', encoding="utf-8")
    ngrams, found = EvaluationNgrams.read([str(english), str(chinese)], 13)
    assert [(part.num_records, part.num_too_short) for part in found] == [(2, 1), (1, 0)]
    ngrams.save(tmp_path)
    opened = EvaluationNgrams.open(tmp_path, 13)

    def source_in(text: str) -> int:
        return opened.find(hash_tokens(tokens_of(fold(text))))

    words = ENGLISH.split()
    assert source_in("So it goes: " + " ".join(words[4:17]).upper() + ", he said") == 0
    assert source_in("So it goes: " + " ".join(words[4:16]) + ", he said") == -1
    assert source_in("他说：" + CHINESE[7:20] + "！") == 1
    assert source_in("他说：" + CHINESE[7:19] + "！") == -1
    assert source_in("") == -1
    with pytest.raises(DataError, match="holds no text of 64 tokens"):
        EvaluationNgrams.read([str(chinese)], 64)


# -- plain text ------------------------------------------------------------------------------------

STORY = "one\ntwo\n\n\n三\n<|endoftext|>\nfour\n"


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        ("file", [(1, STORY)]),
        ("line", [(1, "one"), (2, "two"), (5, "三"), (6, "<|endoftext|>"), (7, "four")]),
        ("blank_line", [(1, "one\ntwo"), (5, "三\n<|endoftext|>\nfour")]),
        ("<|endoftext|>", [(1, "one\ntwo\n\n\n三"), (7, "four")]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_plain_text_is_cut_where_the_setting_says(
    tmp_path: Path, boundary: str, expected: list[tuple[int, str]], packed: bool
) -> None:
    path = tmp_path / ("story.txt.gz" if packed else "story.txt")
    path.write_bytes(gzip.compress(STORY.encode()) if packed else STORY.encode())
    records = read_records(str(path), reading=TextReading(boundary))
    assert [(int(r.where.rpartition(":")[2]), r.fields["text"]) for r in records] == expected


@pytest.mark.parametrize(
    ("name", "content", "boundary", "line"),
    [
        ("long.txt", "short\n\n" + "x" * 5000, "line", 3),
        ("long.txt", "short\n\nb\n" + "中\n" * 2000, "blank_line", 3),
        ("long.txt", "short\n---\n" + "x" * 5000 + "\n---\n", "---", 3),
        ("long.jsonl", '{"text": "a"}\n{"text": "' + "x" * 2**21 + '"}\n', "file", 2),
    ],
)
def test_a_document_beyond_the_limit_is_named_and_not_held(
    tmp_path: Path, name: str, content: str, boundary: str, line: int
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}:{line}: a (document|line) of more than") as error:
        list(read_records(str(tmp_path / name), reading=TextReading(boundary, longest=1000)))
    assert "longest_document" in str(error.value.hint)


def test_bytes_that_are_no_text_are_named_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "junk.txt"
    for start, line, byte in ((0, 1, 2), (2**20 - 2, 1, 2**20), (3 * 2**20, 1, 3 * 2**20 + 2)):
        path.write_bytes(b"a" * start + b"a\xff")
        with pytest.raises(DataError, match=rf"junk\.txt:{line}: not UTF-8: byte {byte} is 0xff"):
            list(itertools.islice(read_records(str(path)), 99))
    path.write_bytes("中文\n第二行".encode() + "中文".encode("gbk"))
    with pytest.raises(DataError, match=r"junk\.txt:2: not UTF-8: byte 10 is 0xd6"):
        list(read_records(str(path)))
