"""`finetune` end to end on tiny real models: it learns, its folder is whole, it resumes exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fulltune.config import build_config, dump_config, load_config
from fulltune.errors import CheckpointError, ConfigError, FulltuneError, RunFolderError
from fulltune.recipes import evaluate, finetune
from fulltune.tracking import read_metrics
from fulltune.train.checkpoint import last_checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_config(
    run_dir: Path, model: Path, data: Path, kind: str = "chat", **changes: Any
) -> finetune.Config:
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": kind, "train": str(data), "validation": "4 examples"},
        "duration": "6 steps",
        "batch": "8 examples",
        "precision": "fp32",
        "optimizer": {"lr": 1e-3},
        "evaluate": {"every": "3 steps", "num_samples": 1 if kind == "chat" else 0},
        "save_every": "2 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(finetune.Config, {**values, **changes})


def losses(run_dir: Path) -> list[float]:
    return [
        event["loss"]
        for event in read_metrics(run_dir / "metrics.jsonl")
        if event["event"] == "step"
    ]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    exported = load_file(run_dir / "model" / "model.safetensors")
    return {**checkpoint.tensors("weights"), **checkpoint.tensors("optimizer"), **exported}


@pytest.mark.parametrize(
    ("model", "kind", "data"),
    [
        ("tiny_llama", "chat", "chat_file"),
        ("tiny_gpt2", "chat", "chat_file"),
        ("tiny_llama", "text", "text_file"),
        ("tiny_bert", "classification", "classification_file"),
        ("tiny_llama", "classification", "classification_file"),
        ("tiny_gpt2", "classification", "classification_file"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_task_overfits_eight_examples_on_every_family(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, kind: str, data: str, precision: str
) -> None:
    source = request.getfixturevalue(data)
    few = tmp_path / f"few{source.suffix}"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    few.write_text("".join(lines), encoding="utf-8")
    config = make_config(
        tmp_path / "run", request.getfixturevalue(model), few, kind,
        task={"kind": kind, "train": str(few), "validation": None},
        duration="80 steps", optimizer={"lr": 1e-2, "schedule": "constant"}, precision=precision,
        dropout=0.0, save_every="1000 steps", evaluate={},
    )  # fmt: skip
    result = finetune.run(config)
    assert result.ending == "finished"
    course = losses(tmp_path / "run")
    assert len(course) == 80
    assert course[-1] < 0.1 * course[0]


def test_a_run_folder_is_whole_and_its_model_is_plain_hugging_face(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, tiny_llama, chat_file)
    finetune.run(config)
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "data.json",
        "samples.jsonl",
        "report.html",
    ):
        assert (run_dir / name).is_file(), name
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert model.generation_config is not None
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert (
        model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1]
        > ids["input_ids"].shape[1]
    )
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["finished"]
    assert manifest["num_trained_parameters"] == manifest["num_parameters"]
    assert all(group["relative_change"] > 0 for group in manifest["weight_change"])
    assert "# " in (run_dir / "model" / "README.md").read_text(encoding="utf-8")


def test_the_settings_written_into_a_run_run_again_to_the_same_weights(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    finetune.run(make_config(tmp_path / "first", tiny_bert, classification_file, "classification"))
    again = load_config(
        finetune.Config, tmp_path / "first" / "config.yaml", [f"run_dir={tmp_path / 'second'}"]
    )
    finetune.run(again)
    first, second = final_tensors(tmp_path / "first"), final_tensors(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second" / "model")
    assert sorted(model.config.label2id) == sorted(set(model.config.id2label.values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, precision: str, optimizer: str
) -> None:
    changes: dict[str, Any] = {
        "precision": precision,
        "optimizer": {"lr": 1e-3, "name": optimizer},
        "dropout": 0.1,
        "keep_checkpoints": 10,
    }
    finetune.run(make_config(tmp_path / "unbroken", tiny_llama, chat_file, **changes))
    broken = make_config(tmp_path / "broken", tiny_llama, chat_file, **changes)
    finetune.run(broken)
    # As after a kill in step 5: the end is gone, and the newest checkpoint is torn.
    for path in ("model", "report.html", "manifest.json", "checkpoints/step-00000006"):
        target = tmp_path / "broken" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    torn = tmp_path / "broken" / "checkpoints" / "step-00000004" / "weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    result = finetune.run(broken, resume=True)
    assert result.step == 6
    unbroken, resumed = final_tensors(tmp_path / "unbroken"), final_tensors(tmp_path / "broken")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "broken")


def test_resume_starts_where_there_is_nothing_and_says_finished_at_the_end(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = make_config(tmp_path / "run", tiny_llama, chat_file)
    assert not finetune.run(config, resume=True).already_finished
    assert finetune.run(config, resume=True).already_finished


def test_a_folder_with_another_run_is_left_alone(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = make_config(tmp_path / "run", tiny_llama, chat_file)
    finetune.run(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="holds a finished run"):
        finetune.run(config)
    other = make_config(tmp_path / "run", tiny_llama, chat_file, optimizer={"lr": 2e-3})
    with pytest.raises(RunFolderError, match=r"differs in `optimizer\.lr`"):
        finetune.run(other, resume=True)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, tiny_llama: Path, tiny_gpt2: Path, chat_file: Path
) -> None:
    finetune.run(make_config(tmp_path / "llama", tiny_llama, chat_file))
    finetune.run(make_config(tmp_path / "gpt2", tiny_gpt2, chat_file))
    (tmp_path / "gpt2" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "gpt2" / "checkpoints")
    shutil.copytree(tmp_path / "llama" / "checkpoints", tmp_path / "gpt2" / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        finetune.run(make_config(tmp_path / "gpt2", tiny_gpt2, chat_file), resume=True)


def test_a_base_model_that_changed_under_its_frozen_layers_is_refused(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = make_config(tmp_path / "run", base, chat_file, scope="last 1 layer")
    finetune.run(config)
    (tmp_path / "run" / "manifest.json").unlink()
    finetune.run(config, resume=True)
    (tmp_path / "run" / "manifest.json").unlink()
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on top of other weights"):
        finetune.run(config, resume=True)


def test_early_stopping_keeps_the_best_model_and_the_last(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = make_config(
        tmp_path / "run", tiny_llama, chat_file, duration="60 steps",
        optimizer={"lr": 0.3, "schedule": "constant", "clip_norm": None},
        evaluate={"every": "1 step", "stop_after": 2, "num_samples": 0},
    )  # fmt: skip
    result = finetune.run(config)
    assert result.ending == "stopped early"
    assert result.step < 60
    measured = {
        event["step"]: event["loss"]
        for event in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if event["event"] == "evaluation"
    }
    best = min(measured, key=measured.__getitem__)
    assert result.step == best + 2
    if best > 0:
        assert result.metrics["loss"] == measured[best]
        assert (tmp_path / "run" / "model-last").is_dir()


def test_best_weights_that_are_gone_are_not_replaced_by_the_last(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    run_dir = tmp_path / "run"
    config = make_config(
        run_dir, tiny_llama, chat_file, duration="60 steps",
        optimizer={"lr": 0.02, "schedule": "constant", "clip_norm": None},
        evaluate={"every": "1 step", "stop_after": 2, "num_samples": 0},
    )  # fmt: skip
    result = finetune.run(config)
    best = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["best_step"]
    assert 0 < best < result.step
    (run_dir / "manifest.json").unlink()  # as if killed before its end
    shutil.rmtree(run_dir / "checkpoints" / f"best-{best:08d}")
    with pytest.raises(CheckpointError, match="the best weights"):
        finetune.run(config, resume=True)


def test_the_written_model_stops_where_the_template_ends_a_turn(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"  # as in a base model that was given a chat template
    tokenizer.save_pretrained(base)
    path = base / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    run_dir = tmp_path / "run"
    finetune.run(make_config(run_dir, base, chat_file, duration="1 step"))
    written = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {tokenizer.eos_token_id, end_of_turn}


@pytest.mark.parametrize(
    ("scope", "moving"), [("head", {"head"}), ("last 1 layers", {"head", "layer 1"})]
)
def test_scope_trains_only_what_it_names(
    tmp_path: Path, tiny_bert: Path, classification_file: Path, scope: str, moving: set[str]
) -> None:
    config = make_config(
        tmp_path / "run", tiny_bert, classification_file, "classification", scope=scope
    )
    finetune.run(config)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert {group["group"] for group in manifest["weight_change"]} == moving
    base = load_file(tiny_bert / "model.safetensors")
    tuned = load_file(tmp_path / "run" / "model" / "model.safetensors")
    frozen = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(base[frozen], tuned[f"bert.{frozen}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_exits_130(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, number: signal.Signals
) -> None:
    config = make_config(
        tmp_path / "run", tiny_llama, chat_file, duration="5000 steps", save_every="5000 steps",
        evaluate={"every": "5000 steps", "num_samples": 0},
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "fulltune", "finetune", str(file)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        metrics.exists() and '"step", ' in metrics.read_text()
    ):
        assert process.poll() is None, process.communicate()[1]
        if metrics.exists() and '"event": "step"' in metrics.read_text(encoding="utf-8"):
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"{number.name}: saved after step" in errors
    checkpoint, problems = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert not problems
    assert read_metrics(metrics)[-1]["event"] == "interrupted"


def test_two_processes_cannot_train_in_one_folder(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    from fulltune.train.run_folder import locked

    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        script = (
            "import sys; from pathlib import Path; from fulltune.train.run_folder import locked\n"
            f"with locked(Path({str(folder)!r})): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
    assert "another process is training" in done.stderr


def test_tokens_that_are_not_in_the_data_are_said_not_to_move(
    tiny_bert: Path, classification_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = make_config(run, tiny_bert, classification_file, "classification")
    finetune.run(config)
    before = load_file(tiny_bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = load_file(run / "model" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    num_still = int((before == after).all(dim=1).sum())
    assert 0 < num_still < len(before)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{num_still:,} of {len(before):,} rows of the embedding did not" in said


def test_retention_is_measured_on_a_text_of_its_own(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, text_file: Path
) -> None:
    config = make_config(
        tmp_path / "run", tiny_llama, chat_file,
        evaluate={"every": "3 steps", "retention": str(text_file), "num_samples": 0},
    )  # fmt: skip
    result = finetune.run(config)
    assert result.metrics["retention_loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "10 MiB"}, "are allowed by `memory`"),
        ({"memory": "L4"}, "`memory` cannot be `L4`"),
        ({"scope": "last 9 layers"}, "the model has 2 layers"),
        ({"device": "cuda:7"}, "that GPU is not there"),
        ({"evaluate": {"metric": "acuracy"}}, "acuracy"),
        ({"task.validation": None, "evaluate": {"stop_after": 2}}, "`evaluate.stop_after` has no"),
        ({"task.validation": None, "evaluate": {"metric": "loss"}}, "`evaluate.metric` has no"),
        ({"task.validation": None, "evaluate": {"every": "2 steps"}}, "`evaluate.every` has no"),
        ({"task.validation": None, "evaluate": {"num_samples": 1}}, "`evaluate.num_samples` has"),
        (
            {"task.kind": "text", "task.too_long": "drop", "evaluate": {"num_samples": 0}},
            "`task.too_long` has no effect",
        ),
        ({"optimizer": {"schedule": "constant", "final_lr": 0.1}}, "`optimizer.final_lr` has no"),
        ({"task.kind": "text", "evaluate": {"num_samples": 5}}, "`evaluate.num_samples` has no"),
        (
            {"scope": "head", "optimizer": {"layer_lr_decay": 0.9}},
            "`optimizer.layer_lr_decay` has no effect with `scope: head`",
        ),
        ({"optimizer": {"warmup": "7 steps"}}, "`optimizer.warmup` is 7 steps, .* has 6 steps"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, changes: dict[str, Any], message: str
) -> None:
    task = {"kind": "chat", "train": str(chat_file)}
    for key in [key for key in changes if key.startswith("task.")]:
        task[key.removeprefix("task.")] = changes[key]
    others = {key: value for key, value in changes.items() if not key.startswith("task.")}
    with pytest.raises(FulltuneError, match=message) as caught:
        finetune.run(make_config(tmp_path / "run", tiny_llama, chat_file, task=task, **others))
    assert isinstance(caught.value, ConfigError) or caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("save_as", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_written_model_is_exact_or_rounded_as_asked_and_results_are_its_own(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, save_as: str, dtype: torch.dtype
) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, tiny_llama, chat_file, precision="bf16", save_as=save_as)
    result = finetune.run(config)
    best = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["best_step"]
    masters = load_file(run_dir / "checkpoints" / f"best-{best:08d}" / "weights.safetensors")
    written = load_file(run_dir / "model" / "model.safetensors")
    assert all(torch.equal(written[name], masters[name].to(dtype)) for name in masters)
    report = evaluate.run(str(run_dir))
    assert report.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
