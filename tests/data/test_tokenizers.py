"""A new tokenizer has the tokens its family needs, loses nothing it claims to keep, and repeats."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fulltune.config import build_config
from fulltune.data.documents import cut_document, is_held_out
from fulltune.data.tokenizer_statistics import measure_tokenizer
from fulltune.data.tokenizers import FIM_TOKENS, TokenizerConfig, train_tokenizer, write_tokenizer
from fulltune.errors import ConfigError, DataError
from fulltune.objectives.fill_in_the_middle import fim_ids

SUBJECTS = ("the river", "a painter", "the old house", "every bird", "no winter", "the market")
VERBS = ("crosses", "remembers", "paints", "forgets", "follows", "answers")
主语 = ("我们的老师", "北京的冬天", "那条大河", "每一只鸟", "没有人", "市场")
谓语 = ("记得", "穿过", "忘记了", "跟着", "回答", "喜欢")
SIZES = {"gpt": 300, "bert": 140, "xlnet": 230}


def texts() -> list[str]:
    """144 sentences in English and Chinese; the Chinese ones hold no space."""
    english = [
        f"{a.capitalize()} {verb} {b}, and then {b} {verb} {a}."
        for a, verb, b in itertools.product(SUBJECTS, VERBS, SUBJECTS[:2])
    ]
    chinese = [
        f"{a}{verb}{b}，然后{b}{verb}{a}。"
        for a, verb, b in itertools.product(主语, 谓语, 主语[:2])
    ]
    return english + chinese


def train(family: str, vocab_size: int | None, **values: object) -> PreTrainedTokenizerFast:
    config = build_config(TokenizerConfig, {"family": family, "vocab_size": vocab_size, **values})
    return train_tokenizer(texts(), config)


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    write_tokenizer(tokenizer, folder, info={})
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def gpt() -> PreTrainedTokenizerFast:
    return train("gpt", 400)


@pytest.fixture(scope="module")
def t5() -> PreTrainedTokenizerFast:
    return train("t5", 300)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_byte_level_bpe_decodes_every_text_to_itself(
    gpt: PreTrainedTokenizerFast, text: str
) -> None:
    text = text.replace("<|endoftext|>", "")
    assert gpt.decode(gpt.encode(text)) == text


def test_gpt_ends_and_pads_with_endoftext(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = saved(gpt, tmp_path / "gpt")
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.unk_token is None
    assert tokenizer("The river").input_ids == tokenizer.encode(
        "The river", add_special_tokens=False
    )


@pytest.mark.parametrize("algorithm", ["bpe", "characters"])
def test_gpt_has_the_sentinels_of_fill_in_the_middle_if_asked(
    tmp_path: Path, algorithm: str
) -> None:
    size = 400 if algorithm == "bpe" else None
    plain = train("gpt", size, algorithm=algorithm)
    tokenizer = saved(
        train("gpt", size, algorithm=algorithm, fill_in_the_middle=True), tmp_path / "tokenizer"
    )
    assert set(FIM_TOKENS) <= set(tokenizer.all_special_tokens)
    assert set(FIM_TOKENS).isdisjoint(plain.get_vocab())
    assert len(tokenizer) == (400 if size else len(plain) + 3)
    prefix, middle, suffix = fim_ids(tokenizer)
    text = "<fim_prefix>a<fim_suffix>c<fim_middle>b"
    ids = tokenizer(text)["input_ids"]
    assert [ids[0], ids[2], ids[4]] == [prefix, suffix, middle]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "acb"
    with pytest.raises(ValueError, match="has no effect with `family: bert`"):
        TokenizerConfig(family="bert", fill_in_the_middle=True)


def test_bert_gives_segments_and_splits_chinese_into_characters(tmp_path: Path) -> None:
    tokenizer = saved(train("bert", 140), tmp_path / "bert")
    assert len(tokenizer) == 140
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert tokenizer.mask_token == "[MASK]"
    pair = tokenizer("那条大河", "the river")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [
        "[CLS]", "那", "条", "大", "河", "[SEP]", "the", "river", "[SEP]",
    ]  # fmt: skip
    assert pair["token_type_ids"] == [0] * 6 + [1] * 3
    assert "The" not in tokenizer.get_vocab() or tokenizer.encode("The") != tokenizer.encode("the")


def test_bert_in_lower_case_reads_capitals_and_accents_alike() -> None:
    tokenizer = train("bert", 130, lowercase=True)
    assert tokenizer.encode("Thé RIVER") == tokenizer.encode("the river")
    assert tokenizer.unk_token_id not in tokenizer.encode("THE RIVER")


def test_xlnet_ends_with_sep_and_cls_and_pads_left(tmp_path: Path) -> None:
    tokenizer = saved(train("xlnet", 200), tmp_path / "xlnet")
    assert len(tokenizer) == 200
    assert (tokenizer.mask_token, tokenizer.pad_token) == ("<mask>", "<pad>")
    assert {"<eod>", "<eop>"} <= set(tokenizer.all_special_tokens)
    pair = tokenizer("The river", "北京")
    first = tokenizer.encode("The river", add_special_tokens=False)
    second = tokenizer.encode("北京", add_special_tokens=False)
    sep, cls = tokenizer.sep_token_id, tokenizer.cls_token_id
    assert pair["input_ids"] == [*first, sep, *second, sep, cls]
    assert pair["token_type_ids"] == [0] * (len(first) + 1) + [1] * (len(second) + 1) + [2]
    padded = tokenizer(["The river crosses the market", "a"], padding=True)
    assert padded["attention_mask"][1][0] == 0


def test_t5_has_its_sentinels_count_down_from_the_top(
    t5: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = saved(t5, tmp_path / "t5")
    assert len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    assert ids == list(range(299, 199, -1))
    assert tokenizer.encode("The river")[-1] == tokenizer.eos_token_id
    assert 299 in tokenizer.encode("The <extra_id_0> crosses")


def test_unigram_reads_chinese_without_spaces_in_pieces_of_several_characters() -> None:
    words = [*主语, *谓语]
    lines = [
        "".join(words[(number * step + step * step) % 12] for step in range(1, 8)) + "。"
        for number in range(500)
    ]
    config = build_config(TokenizerConfig, {"family": "t5", "vocab_size": 160})
    tokenizer = train_tokenizer(lines, config)
    text = "那条大河记得北京的冬天。"
    pieces = tokenizer.tokenize(text)
    assert tokenizer.unk_token not in pieces
    assert len(pieces) < len(text)
    assert any(len(piece.strip("▁")) > 1 for piece in pieces)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.tokenize("北京　市场！") == tokenizer.tokenize("北京 市场!")  # NFKC


def test_characters_are_one_token_each_and_decode_to_themselves(tmp_path: Path) -> None:
    tokenizer = saved(train("gpt", None, algorithm="characters"), tmp_path / "characters")
    text = "The river: 我们"
    known = "The river 我们的老师"
    assert tokenizer.tokenize(known) == list(known)
    assert tokenizer.decode(tokenizer.encode(known)) == known
    assert tokenizer.unk_token in tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    distinct = {character for line in texts() for character in line}
    assert len(tokenizer) == len(distinct) + 2


def test_characters_keep_line_breaks() -> None:
    config = build_config(TokenizerConfig, {"family": "gpt", "algorithm": "characters"})
    tokenizer = train_tokenizer(["a\nb", "\r\n\tc"], config)
    assert tokenizer.decode(tokenizer.encode("a\n\tb\r\nc")) == "a\n\tb\r\nc"


@pytest.mark.parametrize("family", ["gpt", "bert", "xlnet", "t5"])
def test_a_vocabulary_larger_than_the_data_supports_says_how_many_there_are(family: str) -> None:
    with pytest.raises(DataError, match="larger than the data supports: it gave ") as caught:
        train(family, 20_000)
    given = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    assert len(train(family, given)) == given


@pytest.mark.parametrize("family", ["gpt", "bert", "xlnet", "t5"])
def test_a_vocabulary_smaller_than_the_alphabet_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="leaves no room"):
        train(family, 1)
    with pytest.raises(DataError, match="too small for the data"):
        train(family, 110 if family == "t5" else 20)


def test_rare_characters_beyond_the_coverage_are_unknown() -> None:
    documents = ["the river crosses the market " * 50] * 20 + ["the market of 龘"]
    values = {"family": "t5", "vocab_size": 121, "character_coverage": 0.9999}
    tokenizer = train_tokenizer(documents, build_config(TokenizerConfig, values))
    statistics = measure_tokenizer(tokenizer, ["river 龘 market"])
    assert statistics.coverage == pytest.approx(11 / 12)


def test_of_a_run_of_characters_only_the_rare_one_is_unknown() -> None:
    """Chinese is not written in words: all of a clause is one run."""
    clauses = ["春天来了河边的柳树发出新芽", "老人坐在门前晒着太阳", "孩子们跑到田野里放风筝"]
    # Two characters that stand in one clause alone, and there is no text without a rare one.
    documents = [
        clause * 3 + chr(0x9F00 + number) + clause for number, clause in enumerate(clauses)
    ]
    characters = {character for clause in clauses for character in clause}
    values = {
        "family": "xlnet", "vocab_size": 10 + len(characters) + 3, "character_coverage": 0.97
    }  # fmt: skip
    tokenizer = train_tokenizer(documents, build_config(TokenizerConfig, values))
    for document in documents:
        tokens = tokenizer.convert_ids_to_tokens(
            tokenizer.encode(document, add_special_tokens=False)
        )
        assert tokens.count("<unk>") == 1
        assert characters >= set("".join(token for token in tokens if token != "<unk>")) - {"▁"}
        assert measure_tokenizer(tokenizer, [document]).coverage == 1 - 1 / len(document)


TRAIN_IN_A_PROCESS = """
import hashlib, sys
from fulltune.data.tokenizers import TokenizerConfig, train_tokenizer
sys.path.insert(0, sys.argv[1])
from test_tokenizers import SIZES, texts
for family, size in SIZES.items():
    tokenizer = train_tokenizer(texts(), TokenizerConfig(family=family, vocab_size=size))
    print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_text_gives_the_same_bytes_in_another_process() -> None:
    command = [sys.executable, "-c", TRAIN_IN_A_PROCESS, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    here = [
        hashlib.sha256(train(family, SIZES[family]).backend_tokenizer.to_str().encode()).hexdigest()
        for family in SIZES
    ]
    assert done.stdout.split() == here


@pytest.mark.parametrize("family", SIZES)
def test_training_takes_documents_one_at_a_time_from_an_iterator(family: str) -> None:
    taken = 0

    def stream() -> Iterator[str]:
        nonlocal taken
        for text in texts():
            taken += 1
            yield text

    config = build_config(TokenizerConfig, {"family": family, "vocab_size": SIZES[family]})
    tokenizer = train_tokenizer(stream(), config)
    assert taken == len(texts())
    assert (
        tokenizer.backend_tokenizer.to_str()
        == train(family, SIZES[family]).backend_tokenizer.to_str()
    )


def test_an_error_in_the_data_comes_through_the_trainers() -> None:
    def stream() -> Iterator[str]:
        yield from texts()
        raise DataError("train.jsonl:7: field `text` is null")

    for family in ("gpt", "bert", "xlnet"):
        config = build_config(TokenizerConfig, {"family": family, "vocab_size": 300})
        with pytest.raises(DataError, match=r"train\.jsonl:7"):
            train_tokenizer(stream(), config)


def test_a_folder_that_exists_is_not_written_to(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write_tokenizer(gpt, tmp_path, info={})
    assert list(tmp_path.iterdir()) == []


@given(text=st.text(alphabet="ab \n我", max_size=200), length=st.integers(3, 20))
@settings(deadline=None)
def test_a_document_is_cut_without_losing_a_character(text: str, length: int) -> None:
    parts = list(cut_document(text, length))
    assert "".join(parts) == text
    assert all(0 < len(part) <= length for part in parts)


def test_the_held_out_share_is_about_what_was_asked_and_grows_by_adding() -> None:
    documents = [f"document {number}" for number in range(2000)]
    small = {text for text in documents if is_held_out(text, 0.05)}
    large = {text for text in documents if is_held_out(text, 0.2)}
    assert 60 <= len(small) <= 140
    assert small < large
    assert not any(is_held_out(text, 0.0) for text in documents)


def test_statistics_count_what_the_text_holds(gpt: PreTrainedTokenizerFast) -> None:
    documents = ["The river.", "那条大河"]
    statistics = measure_tokenizer(gpt, documents)
    num_tokens = sum(len(gpt.encode(text)) for text in documents)
    assert (statistics.num_documents, statistics.num_bytes) == (2, 10 + 12)
    assert statistics.num_tokens == num_tokens
    assert statistics.tokens_per_byte == pytest.approx(num_tokens / 22)
    assert statistics.bytes_per_token == pytest.approx(22 / num_tokens)
    assert statistics.coverage == 1.0
    lengths = [len(token) for token in statistics.longest_tokens]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(DataError, match="no text to measure"):
        measure_tokenizer(gpt, [])
