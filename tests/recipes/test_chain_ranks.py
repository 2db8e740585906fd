"""A chain under `torchrun`: all ranks train, and what is no training is done once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.recipes.test_chain import with_corpus, write_chain
from tests.train.test_ranks import end_of, start_two_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch's gloo")


def test_what_is_no_training_is_done_by_the_first_rank_while_the_others_wait(
    tmp_path: Path, classification_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    path = write_chain(tmp_path, classification_file, with_corpus)
    process = start_two_ranks("-m", "fulltune", "chain", str(path), "--json")
    printed = end_of(process)
    assert process.returncode == 0, printed
    for number, verb in enumerate(("corpus", "tokenizer", "pretrain", "finetune", "evaluate"), 1):
        assert printed.count(f"step {number} of 5: {verb}") == 1, printed
    assert printed.count("cleaning and hashing documents") == 1
    assert printed.count("evaluating 120 examples") == 1
    results, _ = json.JSONDecoder().raw_decode(printed[printed.index("[\n") :])
    assert [result["verb"] for result in results][0::4] == ["corpus", "evaluate"]
    assert results[-1]["metrics"]["accuracy"] >= 0
    start = (tmp_path / "finetuned" / "metrics.jsonl").read_text("utf-8").splitlines()[0]
    assert json.loads(start)["world_size"] == 2
