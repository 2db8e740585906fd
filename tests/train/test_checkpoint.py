"""Checkpoints are whole or not there, and the last whole one is found."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from fulltune.errors import CheckpointError
from fulltune.train.checkpoint import (
    find_damage,
    last_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def save(folder: Path, step: int, *, size: int = 64) -> Path:
    tensors = {"weights": {"w": torch.full((size,), float(step))}}
    return save_checkpoint(
        folder, f"step-{step:08d}", step=step, tensors=tensors, state={"n": step}
    )


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    checkpoint, problems = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert problems == []
    assert checkpoint.step == 2
    assert checkpoint.state == {"n": 2}
    assert checkpoint.tensors("weights")["w"].tolist() == [2.0] * 64


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    weights, manifest = path / "weights.safetensors", path / "manifest.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text(encoding="utf-8")[:20], encoding="utf-8")
    checkpoint, problems = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(problems) == 1
    assert problems[0].startswith("step-00000002: ")


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") == (None, [])
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole.*state\.json"):
        last_checkpoint(tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, step=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_a_damaged_checkpoint_does_not_push_out_the_whole_ones_before_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (save(tmp_path, 9) / "state.json").unlink()  # the run goes on from 4, and saves again
    save(tmp_path, 6)
    prune_checkpoints(tmp_path, keep=1, step=6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_best_weights_stay_while_a_checkpoint_names_them_and_no_longer(tmp_path: Path) -> None:
    def save_named(name: str, step: int, best_step: int) -> None:
        tensors = {"weights": {"w": torch.zeros(4)}}
        state = {"best": {"best_step": best_step}}
        save_checkpoint(tmp_path, name, step=step, tensors=tensors, state=state)

    save_named("best-00000001", 1, 1)
    save_named("step-00000002", 2, 1)
    for step in (3, 4, 5):  # better each time, without a checkpoint between
        save_named(f"best-{step:08d}", step, step)
        prune_checkpoints(tmp_path, keep=2, step=step, best_step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000001", "best-00000005", "step-00000002",
    ]  # fmt: skip


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, size=4)
    path = save(tmp_path, 1, size=8)
    assert find_damage(path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.rename(tmp_path / ".step-00000001.123.old")  # where a replacing save was killed
    checkpoint, _ = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


@pytest.fixture
def no_room() -> Generator[None]:
    """The kernel refuses files above 64 KiB in this process, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_a_disk_without_room_loses_no_earlier_checkpoint(tmp_path: Path, no_room: None) -> None:
    save(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match="checkpoint of step 2 could not be written"
    ) as caught:
        save(tmp_path, 2, size=100_000)
    assert "earlier checkpoints are intact" in str(caught.value.hint)
    checkpoint, problems = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, problems) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(blocked / "checkpoints", 1)
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path / "checkpoints", 1)
        tmp_path.chmod(0o700)


def test_the_manifest_holds_a_hash_of_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"weights.safetensors", "state.json"}
    assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())
