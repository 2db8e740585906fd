"""Every benchmark is run for real on something tiny; the commands shown for them are checked in
`test_repository.py`, and `kills.py` is run in `recipes/test_kill.py`.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
pretrain_rows = importlib.import_module("pretrain_rows")


def run_benchmark(
    *options: str, folder: Path, script: str = "cpu_finetune"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module", params=["chat", "text"])
def result(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    chat_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Two steps of fulltune and of Trainer on a tiny model, for real."""
    pytest.importorskip("accelerate", reason="needs fulltune[bench]")
    pytest.importorskip("datasets", reason="needs fulltune[bench]")
    folder = tmp_path_factory.mktemp("benchmark")
    text_file = folder / "text.txt"
    words = ("The", "quick", "brown", "fox", "sleeps", "on", "the", "river", "and", "the", "dog.")
    text_file.write_text(" ".join(random.Random(0).choices(words, k=6000)), encoding="utf-8")
    data = {"chat": chat_file, "text": text_file}[request.param]
    options = f"--kind {request.param} --model {tiny_llama} --data {data}"
    options += " --peers fulltune hf-bf16 --seeds 0 --max-length 200"
    sizes = "--steps 2 --skip 1 --batch 4 --held-out 4 --warmup 1 --lr 1e-3 --threads 1"
    ended = run_benchmark(*options.split(), *sizes.split(), "--json", "out.json", folder=folder)
    assert ended.returncode == 0, ended.stderr
    assert "fulltune" in ended.stdout
    written: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return written


@pytest.mark.slow
def test_peers_see_the_same_tokens_and_targets_in_every_step(result: dict[str, Any]) -> None:
    ours, theirs = result["runs"]
    assert [ours["peer"], theirs["peer"]] == ["fulltune", "hf-bf16"]
    seen = [[(step["tokens"], step["targets"]) for step in run["steps"]] for run in (ours, theirs)]
    assert seen[0] == seen[1]
    assert ours["num_targets"] == result["data"]["num_targets"]


@pytest.mark.slow
def test_peers_learn_the_same_from_the_same_steps(result: dict[str, Any]) -> None:
    ours, theirs = (result["peers"][peer] for peer in ("fulltune", "hf-bf16"))
    before = result["held_out_loss_before"]
    # Two bf16 roundings of one trajectory: far closer to each other than to where they began.
    difference = abs(ours["held_out_loss_mean"] - theirs["held_out_loss_mean"])
    assert difference < 0.1 * (before - theirs["held_out_loss_mean"])


@pytest.mark.slow
def test_the_result_says_what_was_measured_and_where(result: dict[str, Any]) -> None:
    for peer in result["peers"].values():
        assert peer["peak_bytes"] > peer["imports_bytes"] > 0
        assert math.isfinite(peer["tokens_per_second"])
        assert 0 < peer["matmul_share"] < 1
    assert result["peers"]["hf-bf16"]["speed_ratio"] == 1
    assert result["machine"]["cores"] > 0
    assert result["versions"]["transformers"] != "not installed"
    assert {"commit", "command", "settings"} <= result.keys()


def test_a_benchmark_without_a_step_left_to_time_is_refused(tmp_path: Path) -> None:
    ended = run_benchmark("--steps", "4", "--skip", "4", folder=tmp_path)
    assert ended.returncode == 2
    assert "--skip 4 leaves nothing of --steps 4" in ended.stderr


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps of both objectives on a small text of ragged paragraphs, for real."""
    pytest.importorskip("accelerate", reason="needs fulltune[bench]")
    pytest.importorskip("datasets", reason="needs fulltune[bench]")
    folder = tmp_path_factory.mktemp("pretraining")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklm", k=draw.randint(2, 6))) for _ in range(400)]
    paragraphs = [" ".join(draw.choices(words, k=draw.randint(1, 15))) for _ in range(300)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    models = "--clm-model gpt2-tiny --mlm-model bert-tiny --vocab-size 300 --length 32"
    sizes = "--blocks 2 --rows 4 --rounds 1 --steps 2 --skip 1 --held-out 20 --warmup 1 --threads 1"
    options = [*models.split(), *sizes.split(), "--data", "text.txt", "--json", "out.json"]
    ended = run_benchmark(*options, folder=folder, script="cpu_pretrain")
    assert ended.returncode == 0, ended.stderr
    assert "a new gpt2-tiny" in ended.stdout
    written: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return written


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_peers_pretrain_on_the_same_number_of_real_tokens(
    pretrained: dict[str, Any], objective: str
) -> None:
    measured = pretrained["objectives"][objective]
    ours, theirs = measured["runs"]
    assert [ours["peer"], theirs["peer"]] == ["fulltune", "hf-bf16"]
    assert ours["num_tokens"] == theirs["num_tokens"] == measured["data"]["num_tokens"]
    assert len(ours["steps"]) == len(theirs["steps"]) == 2
    # Two steps are few: a sane start lies at a uniform guess, and nobody may be far above it.
    for run in (ours, theirs):
        assert run["held_out_loss"] < math.log(measured["data"]["vocabulary"]) + 0.1


@pytest.mark.slow
def test_a_warm_start_is_measured_at_the_same_steps_as_a_new_model(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklm", k=draw.randint(2, 6))) for _ in range(200)]
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 15))) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sizes = "--vocab-size 300 --bert-steps 2 --steps 2 --every 1 --batch-tokens 256 --length 32"
    options = [*sizes.split(), "--data", "text.txt", "--held-out", "0.2", "--seeds", "0", "1"]
    ended = run_benchmark(*options, "--json", "out.json", folder=tmp_path, script="warm_start")
    assert ended.returncode == 0, ended.stderr
    assert "XLNet after a bert-tiny of 2 steps" in ended.stdout
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [(run["start"], run["seed"]) for run in written["runs"]] == [
        ("from the BERT", 0), ("new", 0), ("from the BERT", 1), ("new", 1),
    ]  # fmt: skip
    for rows in written["starts"].values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        # Two steps are few: a sane start lies near a uniform guess.
        assert all(row["loss_mean"] < math.log(300) + 1 for row in rows)
        assert all(0 <= row["accuracy_mean"] <= 1 for row in rows)
    assert {"commit", "command", "settings", "machine"} <= written.keys()


@pytest.mark.slow
def test_pretraining_is_compared_in_speed_and_memory(pretrained: dict[str, Any]) -> None:
    for measured in pretrained["objectives"].values():
        ours, theirs = (measured["peers"][peer] for peer in ("fulltune", "hf-bf16"))
        assert theirs["speed_ratio"] == theirs["memory_ratio"] == 1
        assert math.isfinite(ours["speed_ratio"])
        assert ours["peak_bytes"] > ours["imports_bytes"] > 0


def test_the_memory_of_a_corpus_is_measured_on_two_sizes(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="needs fulltune[corpus]")
    ended = run_benchmark("--megabytes", "1", "3", folder=tmp_path, script="corpus_memory")
    assert ended.returncode == 0, ended.stderr
    small, large, grown = map(json.loads, ended.stdout.splitlines())
    assert 1 <= small["megabytes"] < 3 <= large["megabytes"]
    assert 0 < small["documents"] < large["documents"]
    assert 0 < large["removed"]["near duplicates"] < large["documents"]
    assert small["parent_mib"] > 0
    assert math.isfinite(grown["bytes_per_document"])


def test_the_judge_asks_for_no_unknown_token() -> None:
    """What training never masks is nothing to be judged by."""
    row = [2, *[1, 7, 8] * 500, 3]
    judged = pretrain_rows.mask(row, 4, [5, 6, 7, 8], {0, 1, 2, 3, 4}, random.Random(0))
    asked = [label for label in judged["labels"] if label != pretrain_rows.IGNORED]
    assert 100 < len(asked) < 200
    assert set(asked) == {7, 8}


def test_what_steadies_small_data_is_measured_over_seeds(
    tiny_bert: Path, classification_file: Path, tmp_path: Path
) -> None:
    options = f"--model {tiny_bert} --questions {classification_file} --held-out 20 --labelled 30"
    ended = run_benchmark(
        *options.split(), "--variants", "0", "2", "--seeds", "2", "--json", "out.json",
        folder=tmp_path, script="small_data",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| short: 3 epochs", "| longer, the top layer new (Zhang et al.)",
    ]  # fmt: skip
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    for outcome in written["outcomes"]:
        low, high = min(outcome["accuracies"]), max(outcome["accuracies"])
        assert low <= outcome["mean"] <= high
        assert len(outcome["accuracies"]) == 2
