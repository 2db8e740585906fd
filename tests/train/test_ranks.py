"""Two processes under `torchrun` train as one does, stop together, and none waits for ever."""

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

from fulltune.config import build_config, dump_config
from fulltune.recipes import finetune
from fulltune.tracking import read_metrics
from fulltune.train.checkpoint import last_checkpoint
from fulltune.train.run_folder import locked

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch's gloo")

SECONDS = 180
"""No launch may take longer: a hang is a failure."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_config(run_dir: Path, model: Path, data: Path, **changes: Any) -> finetune.Config:
    """Six steps over 36 examples: the last one holds a single example, for two ranks."""
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": "chat", "train": str(data), "validation": "4 examples"},
        "duration": "6 steps",
        "batch": "7 examples",
        "precision": "fp32",
        "device": "cpu",
        "optimizer": {"lr": 1e-3},
        "evaluate": {"every": "3 steps", "num_samples": 1},
        "save_every": "2 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(finetune.Config, {**values, **changes})


def write_config(config: finetune.Config, path: Path) -> Path:
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def start_two_ranks(*program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            *program,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
    )  # fmt: skip


def end_of(process: subprocess.Popen[str]) -> str:
    """What was printed; a launch that hangs is ended, with all its ranks, and fails the test."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"two ranks hung; they printed {process.communicate()[0]}")


def finetune_on_two_ranks(config: Path, *options: str) -> tuple[int, str]:
    process = start_two_ranks("-m", "fulltune", "finetune", str(config), *options)
    printed = end_of(process)
    return process.returncode, printed


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint, problems = last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    assert not problems
    exported = load_file(run_dir / "model" / "model.safetensors")
    weights = {f"master {name}": tensor for name, tensor in checkpoint.tensors("weights").items()}
    return {**weights, **checkpoint.tensors("optimizer"), **exported}


def logged(run_dir: Path, *names: str) -> list[tuple[Any, ...]]:
    return [
        tuple(event[name] for name in names)
        for event in read_metrics(run_dir / "metrics.jsonl")
        if event["event"] == "step"
    ]


def files(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path) -> Path:
    """Folder with the same runs on one rank and on two: `fp32`, `bf16`, and `dropout` on two."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "dropout": {"precision": "bf16", "dropout": 0.1, "keep_checkpoints": 3},
    }
    files = []
    for name, changes in kinds.items():
        two = make_config(folder / f"{name}-two", tiny_llama, chat_file, **changes)
        files.append(write_config(two, folder / f"{name}.yaml"))
        if name != "dropout":
            finetune.run(make_config(folder / f"{name}-one", tiny_llama, chat_file, **changes))
    program = folder / "train.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from fulltune.config import load_config\n"
        "from fulltune.recipes import finetune\n"
        "for file in sys.argv[1:]:\n"
        "    finetune.run(load_config(finetune.Config, Path(file), []))\n",
        encoding="utf-8",
    )
    process = start_two_ranks(str(program), *map(str, files))
    printed = end_of(process)
    assert process.returncode == 0, printed
    return folder


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_two_ranks_learn_what_one_learns(runs: Path, precision: str, tolerance: float) -> None:
    """Sums of gradients are taken in another order, so the last bits may differ and no more."""
    one, two = runs / f"{precision}-one", runs / f"{precision}-two"
    same = ("step", "num_targets", "num_tokens", "epoch", "lr")
    assert logged(one, *same) == logged(two, *same)
    assert len(logged(two, "step")) == 6
    for (loss_of_one,), (loss_of_two,) in zip(
        logged(one, "loss"), logged(two, "loss"), strict=True
    ):
        assert loss_of_two == pytest.approx(loss_of_one, rel=tolerance)
    base = final_tensors(one)
    for name, tensor in final_tensors(two).items():
        difference = torch.linalg.vector_norm(tensor.double() - base[name].double())
        assert difference <= tolerance * torch.linalg.vector_norm(base[name].double()), name


def test_only_the_first_rank_writes(runs: Path) -> None:
    assert files(runs / "fp32-two") == files(runs / "fp32-one")
    for run_dir in (runs / "fp32-one", runs / "fp32-two"):
        events = [event["event"] for event in read_metrics(run_dir / "metrics.jsonl")]
        assert events.count("start") == 1
        assert events.count("end") == 1
        samples = (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in samples] == [0, 6]


def copy_as_after_a_kill(finished: Path, run_dir: Path, config: finetune.Config) -> None:
    """The run as it was between its checkpoint of step 4 and that of step 6."""
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    shutil.rmtree(run_dir / "model")
    (run_dir / "manifest.json").unlink()
    write_config(config, run_dir / "config.yaml")


def test_a_run_of_two_ranks_resumes_on_two_bit_for_bit_and_on_one(
    runs: Path, tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    unbroken = runs / "dropout-two"
    changes: dict[str, Any] = {"precision": "bf16", "dropout": 0.1, "keep_checkpoints": 3}
    on_two = make_config(tmp_path / "two", tiny_llama, chat_file, **changes)
    copy_as_after_a_kill(unbroken, tmp_path / "two", on_two)
    code, printed = finetune_on_two_ranks(write_config(on_two, tmp_path / "two.yaml"), "--resume")
    assert code == 0, printed
    assert "resumed after step 4" in printed
    expected, found = final_tensors(unbroken), final_tensors(tmp_path / "two")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    what = ("step", "loss", "grad_norm", "num_tokens")
    assert logged(tmp_path / "two", *what) == logged(unbroken, *what)

    on_one = make_config(tmp_path / "one", tiny_llama, chat_file, **changes)
    copy_as_after_a_kill(unbroken, tmp_path / "one", on_one)
    assert finetune.run(on_one, resume=True).step == 6
    same = ("step", "num_targets", "num_tokens", "epoch", "lr")
    assert logged(tmp_path / "one", *same) == logged(unbroken, *same)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_its_row(
    tmp_path: Path, tiny_llama: Path
) -> None:
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    rare = AutoTokenizer.from_pretrained(model)("^", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][rare] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = [
        {
            "messages": [
                {"role": "user", "content": "And ^?" if number == 9 else f"What is {number}?"},
                {"role": "assistant", "content": f"It is {number}."},
            ]
        }
        for number in range(16)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make_config(
        tmp_path / "run", model, data, batch="16 examples",
        task={"kind": "chat", "train": str(data), "validation": None}, evaluate={},
    )  # fmt: skip
    code, printed = finetune_on_two_ranks(write_config(config, tmp_path / "run.yaml"))
    assert code != 0
    assert printed.count("step 1: loss is nan; the update was not made") == 1
    assert f"rows: {data}:10;" in printed
    event = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (event["event"], event["rows"]) == ("nonfinite", [f"{data}:10"])
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_sigterm_to_torchrun_saves_on_all_ranks_and_ends_them(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = make_config(
        tmp_path / "run", tiny_llama, chat_file, duration="5000 steps", save_every="5000 steps",
        evaluate={"every": "5000 steps", "num_samples": 0},
    )  # fmt: skip
    file = write_config(config, tmp_path / "run.yaml")
    process = start_two_ranks("-m", "fulltune", "finetune", str(file))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and '"event": "step"' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = end_of(process)
    assert process.returncode != 0
    assert printed.count("SIGTERM: saved after step") == 1
    event = read_metrics(metrics)[-1]
    assert event["event"] == "interrupted"
    checkpoint, problems = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, problems) == (event["step"], [])


def test_a_mistake_in_the_settings_is_said_once(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = write_config(make_config(tmp_path / "run", tiny_llama, chat_file), tmp_path / "c.yaml")
    code, printed = finetune_on_two_ranks(config, "optimizer.lrr=1")
    assert code != 0
    assert printed.count("`optimizer.lrr`") == 1, printed
    assert "exitcode  : 2" in printed


def test_what_only_the_first_rank_finds_wrong_ends_both(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = write_config(make_config(tmp_path / "run", tiny_llama, chat_file), tmp_path / "c.yaml")
    with locked(tmp_path / "run"):
        code, printed = finetune_on_two_ranks(config)
    assert code != 0
    assert printed.count("another process is training in") == 1
    assert "exitcode  : 2" in printed
    assert "Connection closed" not in printed
