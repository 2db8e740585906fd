"""What a user may get wrong: each is refused with what to do, and nothing is touched."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError

from fulltune.assets.building import built_whole
from fulltune.cli import main
from fulltune.config import build_config, dump_config, load_config
from fulltune.data.records import read_records
from fulltune.errors import AssetError
from fulltune.recipes import finetune

Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run the command line, which must refuse; the message and the hint as printed."""

    def run(*arguments: object, code: int = 2) -> str:
        before = contents(workplace)
        monkeypatch.setattr(sys, "argv", ["fulltune", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return checked(captured.err, captured.out, caught.value.code, code, before, workplace)

    return run


def checked(
    errors: str, output: str, found: object, code: int, before: Mapping[str, bytes], folder: Path
) -> str:
    assert found == code, errors
    assert "Traceback" not in errors
    assert output == ""
    assert contents(folder) == before, "something was written"
    lines = errors.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, errors
    said = lines[starts[0] :]
    hints = [line for line in said if line.startswith("hint: ")]
    assert len(hints) == 1, f"no hint: {errors}"
    if os.environ.get("SHOW_REFUSALS"):
        os.write(2, ("\n".join(said) + "\n\n").encode())
    return "\n".join(said)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def write_settings(folder: Path, model: Path, data: Path | str, kind: str, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": kind, "train": str(data)},
        "duration": "2 steps",
        "batch": "4 examples",
        "precision": "fp32",
        "num_workers": 0,
        "run_dir": "run",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return path


@pytest.fixture
def chat_settings(workplace: Path, tiny_llama: Path, chat_file: Path) -> Path:
    return write_settings(workplace, tiny_llama, chat_file, "chat")


@pytest.fixture
def class_settings(workplace: Path, tiny_bert: Path, classification_file: Path) -> Path:
    return write_settings(workplace, tiny_bert, classification_file, "classification")


# -- the settings file and the command line --------------------------------------------------------


def test_a_settings_file_that_is_not_there_names_the_nearest(
    refuse: Refuse, chat_settings: Path
) -> None:
    said = refuse("finetune", "confg.yaml")
    assert "no settings file `confg.yaml`" in said
    assert "did you mean `config.yaml`" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: a\ntask: {kind: chat\nrun_dir: b\n", "broken.yaml:3: "),
        (b"- model: a\n- run_dir: b\n", "holds a list, not"),
        (b"just words\n", "holds text, not"),
        ("model: caf\u00e9\n".encode("latin-1"), "broken.yaml:1: not UTF-8"),
        (b"model: a\nmodel: b\n", "`model` is given twice"),
        (b"model: a\x00b\n", "broken.yaml"),
        (b"", "`model` is not set"),
    ],
)
def test_a_settings_file_that_cannot_be_read_is_named_with_its_line(
    refuse: Refuse, workplace: Path, content: bytes, message: str
) -> None:
    (workplace / "broken.yaml").write_bytes(content)
    assert message in refuse("finetune", "broken.yaml")


def test_a_folder_is_no_settings_file(refuse: Refuse, workplace: Path) -> None:
    (workplace / "configs").mkdir()
    assert "is a folder" in refuse("finetune", "configs")


def test_a_settings_file_of_another_word_is_not_suggested(
    refuse: Refuse, workplace: Path, chat_settings: Path
) -> None:
    (workplace / "configs").mkdir()
    (workplace / "configs" / "trec-minilm.yaml").touch()
    said = refuse("finetune", "configs/trec-minilmm.yaml")
    assert "did you mean `configs/trec-minilm.yaml`?" in said
    assert "did you mean" not in refuse("finetune", "configs/my-own.yaml")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optimizer.learning_rate=1", "unknown setting", "did you mean `optimizer.lr`?"),
        ("optimizer.beta=1", "unknown setting `optimizer.beta`", "`optimizer.betas`"),
        ("optimizer.x=1", "unknown setting `optimizer.x`", "name, lr, head_lr"),
        ("num_train_epochs=3", "unknown setting `num_train_epochs`", "`duration`"),
        ("optimiser.lr=1", "unknown setting `optimiser`", "did you mean `optimizer`?"),
        ("lr=1e-5", "unknown setting `lr`", "did you mean `optimizer.lr`?"),
        ("validation=10%", "unknown setting", "did you mean `task.validation`?"),
        ("task.max_lenght=8", "unknown setting", "did you mean `task.max_length`?"),
        ("optimizer.lr", "`optimizer.lr` is not a setting", "write `optimizer.lr=VALUE`"),
        ("optimizer=adamw", "`optimizer` is a section", "`optimizer.name"),
        ("seed.x=1", "`seed` cannot be `{x: 1}`", "whole number"),
        ("duration=3", "`duration` cannot be `3`: the unit is missing", "`3 epochs`"),
        ("duration=3 weeks", "`weeks` is not a unit", "`3 epochs`"),
        ("duration=0 steps", "more than zero", "`duration`"),
        ("duration=-3 epochs", "`duration` cannot be", "`3 epochs`"),
        ("duration=1,5 epochs", "a comma only parts thousands", "`3 epochs`"),
        ("optimizer.warmup=0,5%", "a comma only parts thousands", "`5%`"),
        ("batch=4,0 examples", "a comma only parts thousands", "`64 examples`"),
        ("save_every=1,5 steps", "a comma only parts thousands", "`500 steps`"),
        ("memory=1,5 GiB", "a comma only parts thousands", "`20 GiB`"),
        ("memory=2 TB", "`TB` is not a unit here", "`20 GiB`"),
        ("optimizer.warmup=0.5 steps", "must be a whole number", "steps"),
        ("evaluate.every=0.4 steps", "must be a whole number", "steps"),
        ("batch=0 examples", "`batch` cannot be `0 examples`", "`batch`"),
        ("batch=0", "`batch` cannot be `0`", "`64 examples`"),
        ("optimizer.lr=-1e-3", "it must be more than 0", "(number > 0)"),
        ("optimizer.lr=high", "`optimizer.lr` cannot be `high`", "number"),
        ("optimizer.lr=.nan", "`optimizer.lr` cannot be", "number"),
        ("optimizer.name=sgd", "`optimizer.name` cannot be `sgd`", "adamw"),
        ("optimizer.betas=[0.9]", "`optimizer.betas", "`optimizer.betas"),
        ("seed=-1", "`seed` cannot be `-1`", "0"),
        ("seed=1.5", "`seed` cannot be `1.5`", "whole number"),
        ("seed=18446744073709551616", "`seed` cannot be", "< 1e+09"),
        ("evaluate.retention=''", "`evaluate.retention` is empty", "true"),
        ("evaluate.retention=nowhere.txt", "`nowhere.txt` does not exist", "data file"),
        ("label_smoothing=1", "it must be less than 1", "number >= 0 and < 1"),
        ("memory=L4", "`memory` cannot be `L4`", "20 GiB"),
        ("dropout=1.5", "`dropout` cannot be `1.5`: it must be less than 1", "null"),
        ("task.kind=translate", "`task.kind` cannot be `translate`", "classification"),
        ("task.max_length=1", "`task.max_length` cannot be `1`", "2"),
        ("task.columns=text", "`task.columns`", "mapping"),
        ("save_every=0 steps", "`save_every` cannot be", "`save_every`"),
        ("scope=layers", "`scope` cannot be `layers`", "last N layers"),
        ("optimizer.name=adafactor  optimizer.betas=[0.8,0.9]", "has no effect", "leave"),
        ("optimizer.momentum=0.8", "has no effect with `optimizer.name: adamw`", "leave"),
        ("evaluate.metric=acuracy", "acuracy", "loss"),
        ("evaluate.metric=accuracy", "accuracy", "loss"),
        ("device=tpu", "`device` cannot be 'tpu'", "cuda:N"),
        ("device=cuda:7", "that GPU is not there", "device: cpu"),
        ("task.validation=0%", "`task.validation` is `0%`", "null"),
        ("run_dir=", "`run_dir` cannot be `null`", "run_dir"),
        ("run_dir=2026", "not text, as it would be in quotes", "run_dir"),
        ("tracking.sinks=[excel]", "excel", "tensorboard"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_the_model_is_opened(
    refuse: Refuse, chat_settings: Path, override: str, message: str, hint: str
) -> None:
    overrides = override.split("  ")
    said = refuse("finetune", chat_settings, "model=there/is/no/model", *overrides)
    assert message in said
    assert hint in said.partition("hint: ")[2]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    refuse: Refuse, chat_settings: Path
) -> None:
    said = refuse("finetune", chat_settings, "tracking.sinks=[wandb]")
    assert "fulltune[wandb]" in said


def test_settings_are_refused_alike_in_the_file(
    refuse: Refuse, workplace: Path, tiny_llama: Path, chat_file: Path
) -> None:
    write_settings(
        workplace, tiny_llama, chat_file, "chat", duration="3", evaluate={"evry": "1 epoch"}
    )
    said = refuse("finetune", "config.yaml")
    assert "`duration` cannot be `3`" in said
    assert "unknown setting `evaluate.evry`" in said
    assert "did you mean `evaluate.every`?" in said


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["finetun", "x.yaml"], "`finetun`", "finetune"),
        (["finetune"], "FILE", "fulltune finetune --help"),
        (["finetune", "x.yaml", "--resum"], "--resum", "--resume"),
        (["predict", "m", "rows.jsonl", "--max-new-tokens", "0"], "--max-new-tokens", "--help"),
        (
            ["predict", "m", "rows.jsonl", "--top-p", "2"],
            "less than or equal to 1",
            "fulltune predict --help",
        ),
        (["predict", "m", "rows.jsonl", "--too-long", "drop"], "`truncate`", "--help"),
        (["evaluate", "m", "--too-long", "cut"], "`error`, `truncate`, `drop`", "--help"),
        (["evaluate", "m", "--column", "text"], "--column", "text=question"),
        (["settings", "preview"], "`preview` is not one of `finetune`", "--help"),
    ],
)
def test_a_wrong_command_line_says_what_is_possible(
    refuse: Refuse, workplace: Path, arguments: list[str], message: str, hint: str
) -> None:
    said = refuse(*arguments)
    assert message in said
    assert hint in said.partition("hint: ")[2]


# -- settings that the model or the task does not know ---------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.template=chatml"], "`task.template` has no effect"),
        (["z_loss=1e-4"], "`z_loss` has no effect"),
        (["evaluate.retention=true"], "`evaluate.retention`"),
        (["task.max_length=4096"], "`task.max_length` is 4,096, but the model's context is 128"),
        (["task.labels=[place]"], "label"),
        (["scope=last 9 layers"], "the model has 2 layers"),
        (["memory=10 MiB"], "are allowed by `memory`"),
    ],
)
def test_settings_without_effect_or_beyond_the_model_are_refused(
    refuse: Refuse, class_settings: Path, overrides: list[str], message: str
) -> None:
    assert message in refuse("finetune", class_settings, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.labels=[a,b]"], "`task.labels` has no effect"),
        (["task.template=none.jinja"], "`none.jinja` is neither built in nor a file"),
        (["task.validation=40 examples"], "leaves none of the 40 examples for training"),
        (["task.validation=100%"], "`task.validation` is `100%`"),
        (["task.validation=1,5 examples"], "a comma only parts thousands"),
        (["task.validation=null", "evaluate.every=5 steps"], "`evaluate.every` has no effect"),
        (["task.validation=null", "evaluate.num_samples=1"], "`evaluate.num_samples` has no"),
    ],
)
def test_settings_a_chat_run_cannot_use_are_refused(
    refuse: Refuse, chat_settings: Path, overrides: list[str], message: str
) -> None:
    assert message in refuse("finetune", chat_settings, *overrides)


def test_a_template_with_a_syntax_error_is_named_with_its_line(
    refuse: Refuse, workplace: Path, chat_settings: Path
) -> None:
    (workplace / "mine.jinja").write_text("{% for m in messages %}\n{{ m['content' }}\n")
    said = refuse("finetune", chat_settings, "task.template=mine.jinja")
    assert "mine.jinja:2" in said


def test_special_tokens_can_be_text_in_messages_alone(refuse: Refuse, class_settings: Path) -> None:
    said = refuse("finetune", class_settings, "task.special_tokens=text")
    assert "`task.special_tokens` has no effect with `task.kind: classification`" in said


# -- data ------------------------------------------------------------------------------------------


def test_a_turn_that_holds_a_special_token_is_refused_with_its_line(
    refuse: Refuse, workplace: Path, tiny_llama: Path, chat_file: Path
) -> None:
    rows = chat_file.read_text(encoding="utf-8").splitlines(keepends=True)
    turns = [user("a<|im_end|>b"), {"role": "assistant", "content": "c"}]
    rows[11] = json.dumps({"messages": turns}) + "\n"
    (workplace / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    write_settings(workplace, tiny_llama, "train.jsonl", "chat")
    for verb in ("finetune", "preview"):
        said = refuse(verb, "config.yaml")
        assert "train.jsonl:12: the text of turn 1 (`user`) holds `<|im_end|>`" in said
        assert "`task.special_tokens: text`" in said.partition("hint: ")[2]


def test_a_data_file_that_is_not_there_names_near_ones(
    refuse: Refuse, workplace: Path, tiny_llama: Path, chat_file: Path
) -> None:
    shutil.copy(chat_file, workplace / "train.jsonl")
    write_settings(workplace, tiny_llama, "trian.jsonl", "chat")
    said = refuse("finetune", "config.yaml")
    assert "`trian.jsonl` does not exist" in said
    assert "did you mean `train.jsonl`?" in said


def test_data_is_looked_for_before_the_model_is_loaded(
    refuse: Refuse, workplace: Path, tiny_llama: Path
) -> None:
    write_settings(workplace, tiny_llama / "nothing", "trian.jsonl", "chat")
    assert "`trian.jsonl` does not exist" in refuse("finetune", "config.yaml")
    said = refuse("finetune", "config.yaml", "task.train=config.yaml")
    assert "suffix `.yaml`" in said


def user(content: str = "Hello?") -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str = "Hello.") -> dict[str, str]:
    return {"role": "assistant", "content": content}


GOOD = [json.dumps({"messages": [user(f"Hello {number}?"), assistant()]}) for number in range(17)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "train.jsonl:17: not JSON"),
        ("[1, 2]", "train.jsonl:17: a record must be an object"),
        (json.dumps({"messages": [{"role": "critic", "content": "?"}]}), "`critic`"),
        (json.dumps({"messages": [user()]}), "train.jsonl:17"),
        (json.dumps({"messages": [assistant(), user(), assistant()]}), "train.jsonl:17"),
        (json.dumps({"messages": []}), "train.jsonl:17"),
        (json.dumps({"messages": [user(), {"role": "assistant"}]}), "train.jsonl:17"),
        (json.dumps({"text": "no messages"}), "train.jsonl:17"),
        (json.dumps({"messages": [user(), assistant("long " * 400)]}), "train.jsonl:17"),
        (json.dumps({"messages": [user(), assistant(None)]}), "train.jsonl:17"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    refuse: Refuse, workplace: Path, tiny_llama: Path, line: str, message: str
) -> None:
    lines = [*GOOD[:16], line, GOOD[16]]
    (workplace / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_settings(workplace, tiny_llama, "train.jsonl", "chat")
    said = refuse("finetune", "config.yaml")
    assert message in said
    assert "train.jsonl:17" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "`train.jsonl` is empty"),
        ("train.jsonl", b"\n\n", "`train.jsonl` is empty"),
        ("train.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), "train.jsonl:1: not UTF-8"),
        ("train.csv", "text,label\n\u4f60\u597d\u554a,a\n".encode("gbk"), "train.csv:2: not UTF-8"),
        ("train.parquet", b"PAR1 no", "`train.parquet` is not a whole"),
        ("train.jsonl.gz", b"\x1f\x8b cut", "`train.jsonl.gz` is not a whole"),
        ("train.doc", b"x", "suffix `.doc`"),
        ("train.json", b'{"text": "a"}\n{"text": "b"}\n', "`train.json` holds one object"),
    ],
)
def test_a_data_file_that_cannot_be_read_says_how(
    refuse: Refuse, workplace: Path, tiny_llama: Path, name: str, content: bytes, message: str
) -> None:
    (workplace / name).write_bytes(content)
    write_settings(workplace, tiny_llama, name, "text")
    assert message in refuse("finetune", "config.yaml")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "who", "class": "a"}], "`text`"),
        ([{"text": f"who is {i}", "label": "a"} for i in range(20)], "one label"),
        ([{"text": f"who {i}", "label": ["a", "b"][i % 2]} for i in range(20)] + [{"text": "?"}],
         "train.jsonl:21"),
        ([{"text": f"who {i}", "label": ["a", ""][i % 2]} for i in range(20)], "train.jsonl:2"),
        ([{"text": None, "label": "a"}, {"text": "b", "label": "b"}], "train.jsonl:1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_classified_are_refused(
    refuse: Refuse, workplace: Path, tiny_bert: Path, rows: list[dict[str, Any]], message: str
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workplace / "train.jsonl").write_text(text, encoding="utf-8")
    write_settings(workplace, tiny_bert, "train.jsonl", "classification")
    assert message in refuse("finetune", "config.yaml")


def test_a_column_that_is_not_there_names_those_that_are(
    refuse: Refuse, class_settings: Path
) -> None:
    said = refuse("finetune", class_settings, "task.columns={text: question}")
    assert "`question`" in said
    assert "`label`" in said


def test_a_label_that_training_never_sees_is_named(
    refuse: Refuse, workplace: Path, class_settings: Path
) -> None:
    row = {"text": "Which horse is it?", "label": "animal"}
    (workplace / "held.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    said = refuse("finetune", class_settings, "task.validation=held.jsonl")
    assert "animal" in said


def test_rows_cut_down_to_nothing_are_refused(refuse: Refuse, chat_settings: Path) -> None:
    said = refuse("finetune", chat_settings, "task.max_length=2", "task.too_long=truncate")
    assert "task.max_length" in said


def test_rows_that_do_not_fit_are_counted_before_they_are_refused(
    refuse: Refuse, chat_settings: Path
) -> None:
    said = refuse("finetune", chat_settings, "task.max_length=70")
    assert re.search(
        r"`train`: \d+ of \d+ examples .* do not fit; .* would remove [\d,]+ tokens", said
    )
    assert "`task.too_long` to `truncate` or `drop`" in said


def test_preview_shows_what_does_not_fit_and_ends_with_the_same_code(
    workplace: Path,
    chat_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fulltune", "preview", str(chat_settings), "task.max_length=70", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    shown = json.loads(capsys.readouterr().out)
    train = shown["facts"]["splits"][0]
    assert 0 < train["num_truncated"] < train["num_examples"]
    assert train["longest"][0]["length"] > 70
    assert shown["findings"][0]["level"] == "error"


# -- models ----------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model.safetensors"), "has no model.safetensors"),
        (remove("config.json"), "has no config.json"),
        (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
        (cut, "corrupt or cut short"),
        (overwrite("model.safetensors", b"not tensors at all"), "corrupt or cut short"),
        (overwrite("config.json", b"{"), "config.json"),
        (overwrite("config.json", b'{"model_type": "martian"}'), "martian"),
        (overwrite("tokenizer.json", b"{}"), "no tokenizer"),
    ],
)
@pytest.mark.parametrize("verb", ["finetune", "chat"])
def test_a_model_folder_that_is_not_whole_says_what_is_missing(
    refuse: Refuse,
    workplace: Path,
    tiny_llama: Path,
    chat_file: Path,
    change: Callable[[Path], None],
    message: str,
    verb: str,
) -> None:
    shutil.copytree(tiny_llama, workplace / "model")
    change(workplace / "model")
    settings = write_settings(workplace, Path("model"), chat_file, "chat")
    said = refuse(verb, settings if verb == "finetune" else "model")
    assert message in said
    assert "`model" in said


@pytest.mark.parametrize(
    "content",
    [b"GGUF", b"no gguf at all", b"", b"GGUF" + struct.pack("<IQQ", 3, 5, 9) + b"cut"],
)
def test_a_gguf_file_that_is_not_whole_is_refused(
    refuse: Refuse, workplace: Path, chat_file: Path, content: bytes
) -> None:
    (workplace / "model.gguf").write_bytes(content)
    write_settings(workplace, Path("model.gguf"), chat_file, "chat")
    assert "`model.gguf`" in refuse("finetune", "config.yaml")


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("asset:smollm", "unknown asset `smollm`", "asset:smollm2-135m-instruct"),
        ("asset:trec", "is data, not a model", "asset:smollm2-135m-instruct"),
        ("no/such/folder", "`no/such/folder` does not exist", "model folder"),
        ("nobody/nothing", "`nobody/nothing`", "asset:"),
        ("lost.gguf", "`lost.gguf` does not exist", "gguf"),
        ("", "`model`", "asset:"),
    ],
)
def test_a_model_that_cannot_be_found_says_where_it_was_looked_for(
    refuse: Refuse, chat_settings: Path, model: str, message: str, hint: str
) -> None:
    said = refuse("finetune", chat_settings, f"model='{model}'")
    assert message in said
    assert hint in said.partition("hint: ")[2]


def test_an_unknown_data_asset_names_the_nearest(refuse: Refuse, chat_settings: Path) -> None:
    said = refuse("finetune", chat_settings, "task.train=asset:alpaca")
    assert "unknown asset `alpaca`" in said
    assert "asset:alpaca-en" in said
    said = refuse("finetune", chat_settings, "task.train=asset:smollm2-135m-instruct")
    assert "is a model, not data" in said


def test_an_encoder_neither_chats_nor_generates(
    refuse: Refuse, workplace: Path, tiny_bert: Path, chat_file: Path
) -> None:
    assert "an encoder without a trained head" in refuse("chat", tiny_bert)
    write_settings(workplace, tiny_bert, chat_file, "chat")
    said = refuse("finetune", "config.yaml")
    assert "it can do `classification`" in said


def test_a_model_without_a_chat_template_is_told_of_chatml(
    refuse: Refuse, workplace: Path, tiny_gpt2: Path, chat_file: Path
) -> None:
    shutil.copytree(tiny_gpt2, workplace / "model")
    (workplace / "model" / "chat_template.jinja").unlink()
    write_settings(workplace, Path("model"), chat_file, "chat")
    assert "`task.template: chatml`" in refuse("finetune", "config.yaml")
    assert "no chat template" in refuse("chat", "model")


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    finetune.run(
        build_config(
            finetune.Config,
            {
                "model": str(tiny_llama), "duration": "2 steps", "batch": "4 examples",
                "task": {"kind": "chat", "train": str(chat_file)}, "precision": "fp32",
                "num_workers": 0, "run_dir": str(folder), "evaluate": {"num_samples": 0},
            },
        )
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_folder_of_another_run_or_of_other_files_is_left_alone(
    refuse: Refuse, workplace: Path, finished_run: Path, chat_settings: Path, resume: list[str]
) -> None:
    shutil.copytree(finished_run, workplace / "run")
    said = refuse("finetune", chat_settings, "seed=1", *resume)
    assert "holds a finished run" in said
    if not resume:
        assert "look at it by `fulltune evaluate run` or `fulltune report run`" in said
    (workplace / "foreign").mkdir()
    (workplace / "foreign" / "thesis.tex").write_text("precious")
    said = refuse("finetune", chat_settings, "run_dir=foreign", *resume)
    assert "is not empty, and holds no run" in said
    (workplace / "file").write_text("precious")
    assert "`file` is a file" in refuse("finetune", chat_settings, "run_dir=file", *resume)
    said = refuse("finetune", chat_settings, "run_dir=file/run", *resume)
    assert "file` is a file" in said


def test_an_unfinished_run_is_gone_on_with_by_resume(
    refuse: Refuse, workplace: Path, finished_run: Path, chat_settings: Path
) -> None:
    shutil.copytree(finished_run, workplace / "run")
    (workplace / "run" / "manifest.json").unlink()
    assert "`--resume`" in refuse("finetune", chat_settings)
    (workplace / "run" / "config.yaml").write_text("model: [torn", encoding="utf-8")
    assert "cannot read" in refuse("finetune", chat_settings, "--resume")


def test_a_checkpoint_of_another_model_is_refused(
    refuse: Refuse, workplace: Path, finished_run: Path, tiny_gpt2: Path
) -> None:
    shutil.copytree(finished_run, workplace / "run")
    (workplace / "run" / "manifest.json").unlink()
    config = load_config(
        finetune.Config, workplace / "run" / "config.yaml", [f"model={tiny_gpt2}", "run_dir=run"]
    )
    (workplace / "run" / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    said = refuse("finetune", "run/config.yaml", "--resume")
    assert "is a checkpoint of another model" in said


def test_a_folder_that_not_even_root_can_make_is_refused(
    refuse: Refuse, chat_settings: Path
) -> None:
    said = refuse("finetune", chat_settings, "run_dir=/proc/fulltune/run")
    assert "`/proc/fulltune/run` cannot be" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(
    refuse: Refuse, workplace: Path, chat_settings: Path
) -> None:
    (workplace / "closed").mkdir(mode=0o555)
    said = refuse("finetune", chat_settings, "run_dir=closed/run")
    assert "no permission to write in" in said


# -- what is used after training -------------------------------------------------------------------


def test_evaluate_without_data_needs_a_run(
    refuse: Refuse, tiny_llama: Path, finished_run: Path
) -> None:
    said = refuse("evaluate", tiny_llama)
    assert "is not a run" in said
    assert "`--data FILE`" in said
    assert "`lost.jsonl` does not exist" in refuse("evaluate", tiny_llama, "--data", "lost.jsonl")
    assert "`runs/lost` does not exist here" in refuse("evaluate", "runs/lost")
    Path("runs/losts").mkdir(parents=True)
    said = refuse("evaluate", "runs/lost")
    assert "there is no folder `runs/lost`" in said
    assert "did you mean `runs/losts`?" in said


def test_predict_never_overwrites(
    refuse: Refuse, workplace: Path, tiny_llama: Path, chat_file: Path
) -> None:
    (workplace / "answers.jsonl").write_text("precious\n")
    said = refuse("predict", tiny_llama, chat_file, "--output", "answers.jsonl")
    assert "`answers.jsonl` exists" in said
    said = refuse("predict", tiny_llama, chat_file, "--output", "answers.jsonl", "--resume")
    assert "answers.jsonl:1" in said
    said = refuse("predict", tiny_llama, chat_file, "--output", "lost/answers.jsonl")
    assert "no folder `lost`" in said
    assert "`--output FILE`" in refuse("predict", tiny_llama, chat_file, "--resume")
    assert "`lost.jsonl` does not exist" in refuse("predict", tiny_llama, "lost.jsonl")


def test_options_without_effect_on_a_model_are_refused(
    refuse: Refuse, workplace: Path, tiny_llama: Path, chat_file: Path
) -> None:
    said = refuse("predict", tiny_llama, chat_file, "--top-p", "0.5")
    assert "`top_p` has no effect with `temperature: 0`" in said
    said = refuse("predict", tiny_llama, chat_file, "--too-long", "truncate")
    assert "`--too-long truncate` has no effect on a model of `task.kind: chat`" in said
    assert "`temperature` cannot be" in refuse("chat", tiny_llama, "--temperature", "inf")


def test_a_page_without_a_folder_is_refused_before_the_data_is_read(
    refuse: Refuse, chat_settings: Path
) -> None:
    said = refuse("preview", chat_settings, "--html", "lost/page.html")
    assert "there is no folder `lost`" in said


@pytest.mark.parametrize("setting", ["model", "task.train", "run_dir"])
def test_a_path_that_the_system_cannot_take_is_named(
    refuse: Refuse, chat_settings: Path, setting: str
) -> None:
    said = refuse("finetune", chat_settings, f"{setting}={'long' * 100}.jsonl")
    assert "File name too long" in said
    assert "check how the path is written" in said


def test_report_needs_a_run(refuse: Refuse, workplace: Path, finished_run: Path) -> None:
    (workplace / "empty").mkdir()
    assert "`empty`" in refuse("report", "empty")
    assert "`lost`" in refuse("report", "lost")
    (workplace / "file").write_text("precious")
    assert "cannot be written" in refuse("report", finished_run, "--output", "file/page.html")


# -- pre-training ----------------------------------------------------------------------------------

DOCUMENTS = "".join(
    json.dumps({"text": f"The river runs past mill {day}. It rains. Two boats lie there."}) + "\n"
    for day in range(40)
)
SMALL_SIZES = {
    "gpt2-tiny": {"n_embd": 32, "n_positions": 128},
    "bert-tiny": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "xlnet-tiny": {"d_model": 32, "n_head": 4, "d_inner": 48},
    "t5-tiny": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4},
}


@pytest.fixture
def corpus(workplace: Path) -> Path:
    (workplace / "corpus.jsonl").write_text(DOCUMENTS, encoding="utf-8")
    return workplace / "corpus.jsonl"


@pytest.fixture
def new_model(workplace: Path, tiny_bert: Path) -> Callable[..., Path]:
    """Settings to pre-train a new model, its tokenizer that of the tests' BERT if not said."""

    def write(size: str, data: Path | str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "tokenizer": str(tiny_bert), "architecture": SMALL_SIZES[size],
            "objective": {"length": 32}, **changes,
        }  # fmt: skip
        return write_settings(workplace, Path(size), data, "text", **values)

    return write


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "`train.jsonl` is empty"),
        ("train.txt", b"\n \n\n", "`train.txt` is empty"),
        ("train.jsonl", b'{"text": ""}\n' * 30, "train.jsonl"),
        ("train.jsonl", b'{"text": " \\n"}\n' * 30, "train.jsonl"),
        ("train.txt", bytes(range(256)) * 20, "train.txt:2: not UTF-8"),
        ("train.txt", "天很好\n".encode() + "天很好\n".encode("gbk"), "train.txt:2: not UTF-8"),
        (
            "train.jsonl",
            DOCUMENTS.encode() + '{"text": "caf\u00e9"}\n'.encode("latin-1"),
            "train.jsonl:41: not UTF-8",
        ),
        ("train.jsonl", DOCUMENTS.encode("utf-16"), "train.jsonl:1: not UTF-8"),
    ],
)
def test_text_that_cannot_be_pretrained_on_is_named(
    refuse: Refuse, workplace: Path, new_model: Callable[..., Path], name: str, content: bytes,
    message: str,
) -> None:  # fmt: skip
    (workplace / name).write_bytes(content)
    settings = new_model("bert-tiny", name)
    assert message in refuse("pretrain", settings)
    assert message in refuse("preview", settings)
    said = refuse("tokenizer", "train", name, "--family", "bert", "--output", "words")
    assert name in said


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.tsv"])
def test_a_huge_line_is_refused_and_never_held(
    refuse: Refuse, workplace: Path, new_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("fulltune.data.files.LONGEST_LINE", 2**16)
    head = b"text\tid\n" if name.endswith("tsv") else b"text,id\n" * name.endswith("csv")
    (workplace / name).write_bytes(head + b'{"text": "' + b"word " * 2**21)  # 10 MiB and no end
    settings = new_model("bert-tiny", name)
    tracemalloc.start()
    said = refuse("pretrain", settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name}:{1 + bool(head)}: a line of more than 65,536" in said
    assert ".txt" in said.partition("hint: ")[2]
    # The content of the folder, which the test compares before and after, is held twice.
    assert peak < 2 * 10 * 2**20 + 8 * 2**20


def test_a_huge_line_of_plain_text_is_read_in_parts(
    workplace: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fulltune.data.plain_text.TEXT_DOCUMENT_CHARACTERS", 2**12)
    (workplace / "train.txt").write_text("river mill " * 2**14, encoding="utf-8")
    lengths = [len(record.fields["text"]) for record in read_records("train.txt")]
    assert sum(lengths) == 11 * 2**14
    assert max(lengths) <= 2**13


def test_a_vocabulary_larger_than_the_data_supports_says_how_many_there_are(
    refuse: Refuse, corpus: Path
) -> None:
    for family, algorithm in (("gpt", "bpe"), ("bert", "wordpiece"), ("t5", "unigram")):
        said = refuse(
            "tokenizer", "train", corpus, "--family", family, "--algorithm", algorithm,
            "--vocab-size", 30_000, "--output", "words",
        )  # fmt: skip
        assert "is larger than the data supports" in said
        assert "--vocab-size" in said.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("bert-tiny", "has no `mask_token`"),
        ("xlnet-tiny", "has no separator (`<sep>`) token"),
        ("t5-tiny", "has 0 sentinels"),
    ],
)
def test_a_tokenizer_of_another_family_names_the_token_it_lacks(
    refuse: Refuse, corpus: Path, new_model: Callable[..., Path], tiny_llama: Path, size: str,
    message: str,
) -> None:  # fmt: skip
    said = refuse("pretrain", new_model(size, corpus, tokenizer=str(tiny_llama)))
    assert message in said


def test_the_middle_cannot_be_moved_without_its_sentinels(
    refuse: Refuse, corpus: Path, new_model: Callable[..., Path], tiny_llama: Path
) -> None:
    objective = {"length": 32, "stream": True, "fim_rate": 0.5}
    settings = new_model("gpt2-tiny", corpus, tokenizer=str(tiny_llama), objective=objective)
    assert "<fim_prefix>" in refuse("pretrain", settings)


def test_documents_of_one_sentence_make_no_pairs(
    refuse: Refuse, workplace: Path, new_model: Callable[..., Path]
) -> None:
    rows = "".join(f'{{"text": "Mill {day} stands by the river"}}\n' for day in range(40))
    (workplace / "train.jsonl").write_text(rows, encoding="utf-8")
    objective = {"name": "sentence_pairs", "length": 32}
    said = refuse("pretrain", new_model("bert-tiny", "train.jsonl", objective=objective))
    assert "has two sentences to make a pair of" in said
    assert "without pairs" in said.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("size", "objective", "possible"),
    [
        ("gpt2-tiny", "masked_lm", "`causal_lm`"),
        ("bert-tiny", "causal_lm", "`masked_lm`, `sentence_pairs`"),
        ("xlnet-tiny", "span_corruption", "`permutation_lm`"),
        ("t5-tiny", "permutation_lm", "`span_corruption`"),
    ],
)
def test_an_objective_that_a_family_cannot_do_names_those_it_can(
    refuse: Refuse, corpus: Path, new_model: Callable[..., Path], size: str, objective: str,
    possible: str,
) -> None:  # fmt: skip
    settings = new_model(size, corpus, objective={"name": objective, "length": 32})
    said = refuse("pretrain", settings)
    assert f"model cannot do `objective.name: {objective}`" in said
    assert f"it can do {possible}" in said.partition("hint: ")[2]


def test_pairs_are_refused_for_a_model_without_a_head_for_them(
    refuse: Refuse, workplace: Path, corpus: Path, tiny_bert: Path
) -> None:
    from transformers import RobertaConfig

    RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        workplace
    )
    settings = write_settings(
        workplace, workplace / "config.json", corpus, "text", tokenizer=str(tiny_bert),
        objective={"name": "sentence_pairs", "length": 32},
    )  # fmt: skip
    said = refuse("pretrain", settings)
    assert "a `roberta` model cannot do `objective.name: sentence_pairs`" in said
    assert "`masked_lm`" in said.partition("hint: ")[2]


# -- in a process of its own -----------------------------------------------------------------------


def test_a_process_ends_with_code_two_and_no_traceback(
    workplace: Path, chat_settings: Path
) -> None:
    before = contents(workplace)
    done = subprocess.run(
        [sys.executable, "-m", "fulltune", "finetune", str(chat_settings), "task.train=no.jsonl"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = checked(done.stderr, done.stdout, done.returncode, 2, before, workplace)
    assert "`no.jsonl` does not exist" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_to_a_full_disk_ends_with_code_two_and_no_traceback(workplace: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fulltune", "settings", "finetune", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    said = checked(done.stderr, "", done.returncode, 2, {}, workplace)
    assert "the output cannot be written: No space left on device" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_cache_on_a_full_disk_is_named_and_nothing_half_built_stays(
    workplace: Path, error: Exception
) -> None:
    def build() -> None:
        with built_whole(workplace / "cache" / "model") as building:
            (building / "config.json").write_text("{}")
            raise error

    with pytest.raises(AssetError, match="the disk is full") as caught:
        build()
    assert "`FULLTUNE_CACHE`" in str(caught.value.hint)
    assert not list((workplace / "cache").iterdir())
