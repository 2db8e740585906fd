"""`tokenizer train`, `compare` and `extend`, from files to folders."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from fulltune.cli import main
from fulltune.config import build_config
from fulltune.data.tokenizers import TokenizerConfig, readable_piece
from fulltune.errors import ConfigError, DataError, FulltuneError
from fulltune.models.loading import load_model
from fulltune.recipes import tokenizer as recipe

LINES = [
    {"article": f"The {colour} house number {number} stands near 北京的大河。"}
    for number in range(80)
    for colour in ("red", "green", "blue")
]


def config(**values: object) -> TokenizerConfig:
    return build_config(TokenizerConfig, {"family": "gpt", "vocab_size": 300, **values})


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    path = tmp_path / "articles.jsonl"
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in LINES)
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder nobody can write")
def test_an_output_that_cannot_be_written_is_no_traceback(articles: Path) -> None:
    with pytest.raises(FulltuneError, match="/proc/nowhere/out"):
        recipe.train(
            [str(articles)], Path("/proc/nowhere/out"), config(), columns={"text": "article"}
        )


def test_a_tokenizer_is_trained_on_some_documents_and_measured_on_the_others(
    articles: Path, tmp_path: Path
) -> None:
    columns = {"text": "article"}
    trained = recipe.train([str(articles)], tmp_path / "out", config(held_out=0.2), columns=columns)
    assert trained.measured_on == "held_out"
    assert trained.num_training_documents + trained.statistics.num_documents == len(LINES)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    info = json.loads((tmp_path / "out" / "fulltune-tokenizer.json").read_text(encoding="utf-8"))
    assert info["settings"]["algorithm"] == "bpe"
    assert len(info["sources"][0]["fingerprint"]) == 64
    recipe.train([str(articles)], tmp_path / "again", config(held_out=0.2), columns=columns)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_source_too_small_to_hold_out_is_measured_on_itself_and_says_so(
    text_file: Path, tmp_path: Path
) -> None:
    trained = recipe.train([str(text_file)], tmp_path / "out", config())
    assert trained.measured_on == "training"
    assert trained.statistics.num_documents == trained.num_training_documents == 1


def test_bad_sources_and_outputs_are_refused_by_name(articles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt` is empty"):
        recipe.train([str(tmp_path / "empty.txt")], out, config())
    (tmp_path / "junk.txt").write_bytes(b"good line\n\xff\xfe\x00\x81junk\n")
    with pytest.raises(DataError, match=r"junk\.txt:2: not UTF-8"):
        recipe.train([str(tmp_path / "junk.txt")], out, config())
    with pytest.raises(DataError, match=r"is no known format of kind `text`|no column"):
        recipe.train([str(articles)], out, config())
    with pytest.raises(DataError, match="does not exist"):
        recipe.train([str(tmp_path / "absent.txt")], out, config())
    with pytest.raises(DataError, match="can be read only once"):
        recipe.train(["-"], out, config())
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        recipe.train([str(articles)], out, config(), columns={"text": "article"})


def test_tokenizers_and_models_are_compared_on_the_same_text(
    articles: Path, tmp_path: Path, tiny_llama: Path, tiny_bert: Path
) -> None:
    columns = {"text": "article"}
    recipe.train([str(articles)], tmp_path / "out", config(), columns=columns)
    names = [str(tmp_path / "out"), str(tiny_llama), str(tiny_bert)]
    found = recipe.compare(names, str(articles), columns=columns)
    assert list(found) == names
    assert len({statistics.num_bytes for statistics in found.values()}) == 1
    own, other, _ = found.values()
    assert own.tokens_per_byte < other.tokens_per_byte
    with pytest.raises(ConfigError, match="named twice"):
        recipe.compare([names[0], names[0]], str(articles), columns=columns)
    with pytest.raises(FulltuneError):
        recipe.compare([str(tmp_path)], str(articles), columns=columns)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_old_texts_keep_their_logits_when_tokens_are_added(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    extended = recipe.extend(str(folder), ["photosynthesis", "光合作用"], tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    old = AutoTokenizer.from_pretrained(folder)
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after.config.vocab_size == extended.vocab_size == before.config.vocab_size + 2
    ids = torch.tensor([old.encode("The capital of the country: 法国的首都是巴黎。")])
    assert new.encode("The capital of the country: 法国的首都是巴黎。") == ids[0].tolist()
    with torch.no_grad():
        old_logits_TV, new_logits_TV = before(ids).logits[0], after(ids).logits[0]
    assert torch.equal(new_logits_TV[:, : len(old)], old_logits_TV)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_new_row_is_the_mean_of_the_rows_of_its_old_pieces(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    recipe.extend(str(folder), ["光合作用"], tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pieces = AutoTokenizer.from_pretrained(folder).encode("光合作用", add_special_tokens=False)
    [number] = AutoTokenizer.from_pretrained(tmp_path / "out").encode(
        "光合作用", add_special_tokens=False
    )
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old_VD, new_VD = getattr(before, layer)().weight, getattr(after, layer)().weight
        torch.testing.assert_close(new_VD[number], old_VD[pieces].mean(dim=0))
        assert torch.equal(new_VD[: len(old_VD)], old_VD)
    tied = after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert tied == (name == "tiny_gpt2")
    load_model(tmp_path / "out", head="causal_lm", dtype=torch.float32)


def test_a_masked_model_gets_a_bias_of_zero_and_keeps_its_head(
    tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "masked"
    shutil.copytree(tiny_bert, folder)
    model_config = BertConfig.from_pretrained(tiny_bert)
    torch.manual_seed(4)
    model = BertForMaskedLM(model_config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    recipe.extend(str(folder), ["photosynthesis"], tmp_path / "out")
    extended = BertForMaskedLM.from_pretrained(tmp_path / "out")
    bias_V = extended.cls.predictions.decoder.bias
    assert bias_V.shape == (model_config.vocab_size + 1,)
    assert bias_V[-1] == 0
    assert torch.equal(bias_V[:-1], model.cls.predictions.bias)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("Photosynthesis in the house")[0] == "photosynthesis"
    ids = torch.tensor([tokenizer.encode("the capital of the country")])
    with torch.no_grad():
        assert torch.equal(extended(ids).logits[..., :-1], model.eval()(ids).logits)


def test_spare_rows_of_the_embeddings_are_used_first(tiny_llama: Path, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    shutil.copytree(tiny_llama, padded)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(padded)
    extended = recipe.extend(str(padded), ["photosynthesis"], tmp_path / "out")
    assert extended.vocab_size == model.config.vocab_size


def test_tokens_that_cannot_be_added_are_refused(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="`<\\|im_end\\|>`: one token already"):
        recipe.extend(str(tiny_llama), ["photosynthesis", "<|im_end|>"], out)
    with pytest.raises(ConfigError, match="`The`: one token already"):
        recipe.extend(str(tiny_bert), ["The"], out)
    with pytest.raises(ConfigError, match="twice"):
        recipe.extend(str(tiny_llama), ["光合", "光合"], out)
    with pytest.raises(ConfigError, match="no token to add"):
        recipe.extend(str(tiny_llama), [], out)
    with pytest.raises(ConfigError, match="never be found"):
        recipe.extend(str(tiny_bert), ["Photosynthesis", "photosynthesis"], out)
    assert not out.exists()
    with pytest.raises(ConfigError, match="exists already"):
        recipe.extend(str(tiny_llama), ["光合"], tmp_path)


def test_a_file_of_tokens_is_read_by_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text("光合作用\r\n\nphoto synthesis\n", encoding="utf-8")
    assert recipe.read_tokens(path) == ["光合作用", "photo synthesis"]
    path.write_text("a\nb\na\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokens\.txt:3: `a` stands in line 1 already"):
        recipe.read_tokens(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no tokens"):
        recipe.read_tokens(path)
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match=r"tokens\.txt:2: not UTF-8"):
        recipe.read_tokens(path)
    with pytest.raises(DataError, match="cannot be read"):
        recipe.read_tokens(tmp_path / "absent.txt")


def test_the_command_line_trains_compares_and_extends(
    articles: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fulltune", "tokenizer", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    column = ("--column", "text=article")
    new, grown = tmp_path / "new", tmp_path / "grown"
    train = ("train", articles, *column, "--family", "bert", "--output", new)
    code, out, _ = say(*train, "--vocab-size", 100, "--json")
    assert (code, json.loads(out)["vocab_size"]) == (0, 100)
    code, out, _ = say("compare", new, tiny_llama, "--data", articles, *column)
    assert code == 0
    assert "tokens per byte" in out
    code, _, err = say(*train)
    assert code == 2
    assert "exists already" in err
    code, out, _ = say("extend", tiny_llama, "--add", "光合作用", "--output", grown, "--json")
    assert code == 0
    assert list(json.loads(out)["added"]) == ["光合作用"]


def test_old_pieces_are_shown_as_the_text_they_stand_for(
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = "".join(json.dumps({"text": "the red house 北京"}) + "\n" for _ in range(99))
    (tmp_path / "text.jsonl").write_text(rows, encoding="utf-8")
    for family, algorithm, size in (("gpt", "bpe", 273), ("gpt", "unigram", 19)):
        folder = tmp_path / algorithm
        values = {"family": family, "algorithm": algorithm, "vocab_size": size}
        recipe.train(
            [str(tmp_path / "text.jsonl")], folder, build_config(TokenizerConfig, values)
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in (" the red 北京 house", " 龘"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            pieces = [readable_piece(tokenizer, number) for number in ids]
            if text != " 龘":
                assert "".join(pieces) == text
            elif algorithm == "bpe":
                assert pieces == [" ", "\\xe9", "\\xbe", "\\x98"]
    bert = AutoTokenizer.from_pretrained(tiny_bert)
    ids = bert.encode("rivers", add_special_tokens=False)
    assert [readable_piece(bert, number) for number in ids] == bert.convert_ids_to_tokens(ids)
    command = ["tokenizer", "extend", str(tiny_llama), "--add", " 中国", "--output"]
    monkeypatch.setattr(sys, "argv", ["fulltune", *command, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "ä" not in said
    assert "Ġ" not in said
    assert "` `" in said
