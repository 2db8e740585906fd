"""`chain`: text to a measured classifier in one file."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.cli import main
from fulltune.errors import ConfigError, DataError, FulltuneError
from fulltune.recipes import chain
from fulltune.recipes.chain_checks import naming
from fulltune.train.health import NonFiniteError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_text(folder: Path, classification_file: Path) -> Path:
    rows = [json.loads(line) for line in classification_file.read_text("utf-8").splitlines()]
    path = folder / "corpus.jsonl"
    text = "".join(json.dumps({"text": f"{row['text']} 你好。"}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_chain(
    folder: Path,
    classification_file: Path,
    change: Callable[[list[dict[str, Any]]], object] = lambda steps: None,
) -> Path:
    """Tokenizer, pretrain, finetune and evaluate, changed in place."""
    corpus = write_text(folder, classification_file)
    run = {"batch": "8 examples", "num_workers": 0, "precision": "fp32"}
    steps: list[dict[str, Any]] = [
        {
            "tokenizer": {
                "train": str(corpus), "family": "bert", "vocab_size": 120,
                "output": str(folder / "tokenizer"),
            }
        },
        {
            "pretrain": {
                "model": "bert-tiny", "tokenizer": str(folder / "tokenizer"),
                "architecture": {"hidden_size": 32, "num_attention_heads": 4},
                "task": {"kind": "text", "train": str(corpus)},
                "duration": "4 steps", "run_dir": str(folder / "pretrained"), **run,
            }
        },
        {
            "finetune": {
                "model": str(folder / "pretrained"),
                "task": {"kind": "classification", "train": str(classification_file)},
                "duration": "4 steps", "run_dir": str(folder / "finetuned"), **run,
            }
        },
        {"evaluate": {"model": str(folder / "finetuned"), "data": str(classification_file)}},
    ]  # fmt: skip
    change(steps)
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}), encoding="utf-8")
    return path


def test_every_step_starts_from_the_folder_of_another_and_is_not_taken_twice(
    tmp_path: Path, classification_file: Path
) -> None:
    config = chain.load(write_chain(tmp_path, classification_file))
    results = chain.run(config)
    assert [result.verb for result in results] == ["tokenizer", "pretrain", "finetune", "evaluate"]
    assert results[-1].metrics["accuracy"] >= 0
    with pytest.raises(FulltuneError, match=r"step 1, tokenizer: .* exists already") as caught:
        chain.run(config)
    assert "`--resume`" in str(caught.value.hint)
    written = (tmp_path / "finetuned" / "model" / "model.safetensors").stat().st_mtime_ns
    again = chain.run(config, resume=True)
    assert [result.done_before for result in again] == [True, True, True, False]
    assert again[-1].metrics == results[-1].metrics
    assert (tmp_path / "finetuned" / "model" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["vocab_size", "train"])
def test_a_tokenizer_of_other_settings_or_text_is_not_taken_for_the_step_s(
    tmp_path: Path, classification_file: Path, change: str
) -> None:
    path = write_chain(tmp_path, classification_file)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["steps"][1:]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    chain.run(chain.load(path))
    if change == "train":
        with (tmp_path / "corpus.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": "One more."}) + "\n")
    else:
        values["steps"][0]["tokenizer"]["vocab_size"] = 119
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"other settings or text \\(differs in `{change}`\\)"):
        chain.run(chain.load(path), resume=True)


def settings_of(steps: list[dict[str, Any]], number: int) -> dict[str, Any]:
    (settings,) = steps[number - 1].values()
    assert isinstance(settings, dict)
    return settings


WRONG: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "an unknown setting": (
        lambda steps: settings_of(steps, 3).update(durration="1 epoch"),
        "step 3, finetune: unknown setting `durration`",
    ),
    "a value that cannot be": (
        lambda steps: settings_of(steps, 2).update(duration="4 bananas"),
        "step 2, pretrain: `duration` cannot be `4 bananas`",
    ),
    "a number beyond its limits": (
        lambda steps: settings_of(steps, 3).update(label_smoothing=2),
        "step 3, finetune: `label_smoothing` cannot be `2`",
    ),
    "settings that contradict each other": (
        lambda steps: settings_of(steps, 3).update(evaluate={"metric": "perplexity"}),
        "step 3, finetune: .*perplexity",
    ),
    "a task that is not pre-training's": (
        lambda steps: settings_of(steps, 2)["task"].update(kind="chat"),
        "step 2, pretrain: `task.kind` is `chat`",
    ),
    "a vocabulary of special tokens alone": (
        lambda steps: settings_of(steps, 1).update(vocab_size=5),
        "step 1, tokenizer: a vocabulary of 5 leaves no room",
    ),
    "a tokenizer of another family": (
        lambda steps: settings_of(steps, 1).update(family="gpt", vocab_size=300),
        "step 2, pretrain: the tokenizer of `.*tokenizer` has no",
    ),
    "an objective of another family": (
        lambda steps: settings_of(steps, 2).update(objective={"name": "span_corruption"}),
        "step 2, pretrain: a `bert` model cannot do `objective.name: span_corruption`",
    ),
    "a field that the model has not": (
        lambda steps: settings_of(steps, 2)["architecture"].update(num_wheels=4),
        "step 2, pretrain: `architecture.num_wheels` is no field",
    ),
    "windows longer than the context": (
        lambda steps: settings_of(steps, 2).update(objective={"length": 4096}),
        "step 2, pretrain: `objective.length` is 4,096",
    ),
    "a task that the model cannot do": (
        lambda steps: settings_of(steps, 3)["task"].update(kind="text"),
        "step 3, finetune: a model of type `bert` does not predict the next token",
    ),
    "examples longer than the context": (
        lambda steps: settings_of(steps, 3)["task"].update(max_length=4096),
        "step 3, finetune: `task.max_length` is 4,096",
    ),
    "a model that no step makes": (
        lambda steps: settings_of(steps, 3).update(model="runs/nowhere/at-all"),
        "step 3, finetune: `model`: `runs/nowhere/at-all` does not exist",
    ),
    "a tokenizer that no step makes": (
        lambda steps: settings_of(steps, 2).update(tokenizer="nowhere"),
        "step 2, pretrain: `tokenizer`: `nowhere` is no folder of a tokenizer",
    ),
    "data that is not there": (
        lambda steps: settings_of(steps, 4).update(data="nowhere.jsonl"),
        "step 4, evaluate: `data`: `nowhere.jsonl` does not exist",
    ),
    "an asset that there is not": (
        lambda steps: settings_of(steps, 3).update(model="asset:nothing"),
        "step 3, finetune: `model`: unknown asset",
    ),
    "a model where a tokenizer is made": (
        lambda steps: settings_of(steps, 3).update(model=settings_of(steps, 1)["output"]),
        r"step 3, finetune: `model` is `.*tokenizer`, which step 1 \(tokenizer\) makes, and which "
        "is a tokenizer, not a model",
    ),
    "steps in the wrong order": (
        lambda steps: steps.reverse(),
        r"step 1, evaluate: `model` is `.*finetuned`, which step 2 \(finetune\) makes only after",
    ),
    "two steps with one folder": (
        lambda steps: settings_of(steps, 3).update(run_dir=settings_of(steps, 2)["run_dir"]),
        r"step 3, finetune: `run_dir` is .* which is the folder of step 2 \(pretrain\) already",
    ),
    "a folder in that of another": (
        lambda steps: settings_of(steps, 3).update(
            run_dir=settings_of(steps, 2)["run_dir"] + "/finetuned"
        ),
        r"step 3, finetune: .* lies in the folder of step 2 \(pretrain\)",
    ),
    "nothing held out to measure on": (
        lambda steps: (
            settings_of(steps, 4).update(data=None),
            settings_of(steps, 3)["task"].update(validation=None),
        ),
        r"step 4, evaluate: `data` is not set, and step 3 \(finetune\) holds nothing out",
    ),
    "a model that holds nothing out": (
        lambda steps: settings_of(steps, 4).update(model="asset:all-minilm-l6-v2", data=None),
        "step 4, evaluate: `data` is not set, and `asset:all-minilm-l6-v2` is no run",
    ),
    "a tokenizer beside a trained model": (
        lambda steps: settings_of(steps, 2).update(model="asset:all-minilm-l6-v2"),
        "step 2, pretrain: `tokenizer` has no effect with the trained model",
    ),
    "a chat without a template": (
        lambda steps: (
            settings_of(steps, 1).update(family="gpt", vocab_size=300),
            settings_of(steps, 2).update(model="gpt2-tiny", architecture={}),
            settings_of(steps, 3)["task"].update(kind="chat"),
        ),
        "step 3, finetune: the model has no chat template",
    ),
    "a device that there is not": (
        lambda steps: settings_of(steps, 3).update(device="cuda:99"),
        "step 3, finetune: .*cuda:99",
    ),
    "a size where a trained model is wanted": (
        lambda steps: settings_of(steps, 3).update(model="bert-tiny"),
        "step 3, finetune: `model`: `bert-tiny` is a new model, which has no trained weights",
    ),
    "a size that is to be measured": (
        lambda steps: settings_of(steps, 4).update(model="bert-tiny"),
        "step 4, evaluate: `model`: `bert-tiny` is a new model, which has no trained weights",
    ),
    "a part of a run that there will not be": (
        lambda steps: settings_of(steps, 4).update(model=settings_of(steps, 3)["run_dir"] + "/mod"),
        r"step 4, evaluate: .* which is no part of what step 3 \(finetune\) makes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_any_step_is_said_with_its_number_and_kind_before_the_first(
    tmp_path: Path, classification_file: Path, name: str
) -> None:
    change, said = WRONG[name]
    path = write_chain(tmp_path, classification_file, change)
    with pytest.raises(FulltuneError, match=said) as caught:
        chain.run(chain.load(path))
    assert caught.value.hint
    assert "`--" not in caught.value.hint.replace("`--resume`", "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chain.yaml", "corpus.jsonl"]


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        (
            lambda steps: settings_of(steps, 1).update(vocab_size=30_000),
            "step 1, tokenizer: a vocabulary of 30,000 tokens is larger",
            r"`vocab_size: \d+` or less",
        ),
        (
            lambda steps: settings_of(steps, 1).update(vocab_size=20),
            "step 1, tokenizer: a vocabulary of 20 tokens is too small",
            r"`vocab_size: \d+` or more, or a lower `character_coverage`",
        ),
        (
            lambda steps: settings_of(steps, 1).update(columns={"text": "body"}),
            "step 1, tokenizer: .*no column `body`",
            r"`columns: \{text: COLUMN\}`",
        ),
        (
            lambda steps: settings_of(steps, 4).update(columns={"text": "body"}),
            "step 4, evaluate: .*no column `body`",
            "correct `columns`",
        ),
    ],
)
def test_what_fails_when_a_step_runs_names_its_settings_and_no_options(
    tmp_path: Path,
    classification_file: Path,
    change: Callable[[list[dict[str, Any]]], object],
    said: str,
    hint: str,
) -> None:
    path = write_chain(tmp_path, classification_file, change)
    with pytest.raises(FulltuneError, match=said) as caught:
        chain.run(chain.load(path))
    assert re.search(hint, str(caught.value.hint)), caught.value.hint
    assert "--" not in f"{caught.value}{caught.value.hint}"
    assert "task.columns" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize(
    ("advice", "in_a_chain"),
    [
        ("name the data with `--data FILE`", "name the data with `data: FILE`"),
        ("`--column text=body --column label=kind`", "`columns: {text: body, label: kind}`"),
        ("`--column` and `--too-long`", "`columns` and `too_long`"),
        ("go on by `--resume`", "go on by `--resume`"),
        ("by `--resume num_workers=1`", "by `--resume` and `num_workers: 1`"),
        ("train one with `--family t5`", "train one with `family: t5`"),
        (
            "by `fulltune tokenizer train --family gpt --fill-in-the-middle`",
            "by a step `tokenizer: {family: gpt, fill_in_the_middle: true}`",
        ),
        ("set `task.columns={text: 正文}`", "set `columns: {text: 正文}`"),
    ],
)
def test_options_in_an_advice_are_settings_in_a_chain(advice: str, in_a_chain: str) -> None:
    with pytest.raises(DataError, match="step 4, evaluate: ") as caught, naming(4, "evaluate"):
        raise DataError("a row is wrong", hint=advice)
    assert caught.value.hint == in_a_chain


def test_a_name_that_is_nearly_an_earlier_folder_is_suggested(
    tmp_path: Path, classification_file: Path
) -> None:
    wrong = str(tmp_path / "pretraind")
    path = write_chain(
        tmp_path, classification_file, lambda steps: settings_of(steps, 3).update(model=wrong)
    )
    with pytest.raises(FulltuneError, match="does not exist") as caught:
        chain.run(chain.load(path))
    assert caught.value.hint == (
        f"did you mean `{tmp_path / 'pretrained'}`, which step 2 (pretrain) makes?"
    )


def test_a_folder_that_a_late_step_may_not_write_is_said_before_the_first(
    tmp_path: Path, classification_file: Path
) -> None:
    steps = chain.load(write_chain(tmp_path, classification_file))
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "notes.txt").write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(FulltuneError, match=r"step 3, finetune: .* is not empty"):
            chain.run(steps, resume=resume)
    assert not (tmp_path / "tokenizer").exists()


def with_corpus(steps: list[dict[str, Any]]) -> None:
    """The first step prepares the text that the others read."""
    output = str(Path(settings_of(steps, 1)["output"]).with_name("prepared"))
    sources = settings_of(steps, 1)["train"]
    settings_of(steps, 1)["train"] = f"{output}/train"
    settings_of(steps, 2)["task"] = {
        "kind": "text", "train": f"{output}/train", "validation": f"{output}/validation",
    }  # fmt: skip
    steps.insert(
        0,
        {
            "corpus": {
                "sources": sources, "output": output, "validation": "20%", "num_workers": 0,
                "near_duplicates": {"threshold": None},
            }
        },
    )  # fmt: skip


def test_a_chain_begins_with_raw_text_and_its_corpus_is_not_prepared_twice(
    tmp_path: Path, classification_file: Path
) -> None:
    steps = chain.load(write_chain(tmp_path, classification_file, with_corpus))
    results = chain.run(steps)
    verbs = ["corpus", "tokenizer", "pretrain", "finetune", "evaluate"]
    assert [result.verb for result in results] == verbs
    assert results[0].metrics["train_documents"] > results[0].metrics["validation_documents"] > 0
    (tmp_path / "corpus.jsonl").unlink()  # raw text may go once its corpus is prepared
    again = chain.run(steps, resume=True)
    assert [result.done_before for result in again] == [True, True, True, True, False]
    assert again[-1].metrics == results[-1].metrics


def test_an_error_of_a_step_keeps_all_that_it_knows() -> None:
    said = "step 2, pretrain: step 7: loss is nan"
    with pytest.raises(NonFiniteError, match=said) as caught, naming(2, "pretrain"):
        raise NonFiniteError(7, math.nan, 1.0, [3])
    assert caught.value.micro_batches == (3,)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda steps: settings_of(steps, 2).update(train=settings_of(steps, 1)["output"]),
            r"step 2, tokenizer: .* the corpus of step 1 \(corpus\) holds training and validation",
        ),
        (
            lambda steps: settings_of(steps, 1).update(validation=None),
            r"step 3, pretrain: .* the corpus of step 1 \(corpus\) has no `validation`",
        ),
        (
            lambda steps: settings_of(steps, 1).update(validation="lots"),
            "step 1, corpus: .*lots",
        ),
    ],
)
def test_a_corpus_is_named_by_one_of_its_sides(
    tmp_path: Path,
    classification_file: Path,
    change: Callable[[list[dict[str, Any]]], object],
    said: str,
) -> None:
    def changed(steps: list[dict[str, Any]]) -> None:
        with_corpus(steps)
        change(steps)

    path = write_chain(tmp_path, classification_file, changed)
    with pytest.raises(FulltuneError, match=said):
        chain.run(chain.load(path))
    assert not (tmp_path / "prepared").exists()


def test_a_dry_run_says_what_each_step_starts_from_and_takes_none(
    tmp_path: Path,
    classification_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_chain(tmp_path, classification_file, with_corpus)
    monkeypatch.setattr(sys, "argv", ["fulltune", "chain", str(path), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    steps = json.loads(capsys.readouterr().out)
    assert not caught.value.code
    made = [step["makes"] for step in steps]
    assert [Path(folder).name for folder in made if folder] == [
        "prepared", "tokenizer", "pretrained", "finetuned",
    ]  # fmt: skip
    assert f"tokenizer {made[1]}" in steps[2]["starts_from"]
    assert f"model {made[3]}" in steps[4]["starts_from"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chain.yaml", "corpus.jsonl"]


def test_a_step_is_one_kind_with_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    for wrong in ("[{}]", "[{dance: {}}]", "[{evaluate: model}]", "[evaluate]"):
        path.write_text(f"steps: {wrong}", encoding="utf-8")
        with pytest.raises(ConfigError, match="step 1 is not one kind of step"):
            chain.load(path)
    for empty in ("stairs: []", "steps: []", "steps: 3"):
        path.write_text(empty, encoding="utf-8")
        with pytest.raises(ConfigError, match="not a list of steps"):
            chain.load(path)
    path.write_text("steps: [{evaluate: {model: a}}]\nseed: 3", encoding="utf-8")
    with pytest.raises(ConfigError, match="`seed` beside `steps`"):
        chain.load(path)
