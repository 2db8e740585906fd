"""A decoder that nothing is known of is tried before it is trained, and what it cannot is said."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.config import build_config
from fulltune.errors import FulltuneError, ModelError
from fulltune.recipes import pretrain

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STATE_SPACE = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_config(
    folder: Path, tokenizer: Path, values: dict[str, Any], **changes: Any
) -> pretrain.Config:
    rows = (json.dumps({"text": f"Day {day}. The river runs. 她看书。"}) for day in range(40))
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(values))
    return build_config(
        pretrain.Config,
        {
            "model": str(folder / "config.json"), "tokenizer": str(tokenizer),
            "task": {"kind": "text", "train": str(folder / "text.jsonl"), "validation": "10%"},
            "objective": {"length": 32}, "duration": "2 steps", "batch": "4 examples",
            "num_workers": 0, "run_dir": str(folder / "run"), **changes,
        },
    )  # fmt: skip


def test_a_state_space_model_is_trained_in_the_precision_that_it_can(
    tmp_path: Path, tiny_gpt2: Path
) -> None:
    with pytest.raises(ModelError, match="type `mamba` cannot be trained in bfloat16") as caught:
        pretrain.run(make_config(tmp_path, tiny_gpt2, STATE_SPACE, precision="bf16"))
    assert "`precision: fp32`" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
    result = pretrain.run(make_config(tmp_path, tiny_gpt2, STATE_SPACE, precision="fp32"))
    assert result.step == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "olmoe", **SMALL, "intermediate_size": 48, "num_experts": 4},
            "two short rows: RuntimeError: ",
        ),
        (
            {"model_type": "bert-generation", **SMALL, "intermediate_size": 48},
            "sees those that come after it.*`is_decoder: false`",
        ),
        (
            {"model_type": "cpmant", **SMALL, "dim_head": 8, "dim_ff": 48},
            "a row of a batch changes with the rows beside it",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_the_first_step(
    tmp_path: Path, tiny_gpt2: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(FulltuneError, match=message) as caught:
        pretrain.run(make_config(tmp_path, tiny_gpt2, values, precision="fp32"))
    assert "config.json" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


@pytest.fixture(params=["highest", "medium"])
def arithmetic(request: pytest.FixtureRequest) -> Generator[str]:
    """Float32 products as they are, and with bf16 in their place where the device has that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_a_token_that_sees_what_came_before_alone_is_trained_in_any_arithmetic(
    tmp_path: Path, tiny_gpt2: Path, arithmetic: str
) -> None:
    values = {
        "model_type": "bert-generation", **SMALL, "intermediate_size": 48, "is_decoder": True
    }  # fmt: skip
    assert pretrain.run(make_config(tmp_path, tiny_gpt2, values, precision="fp32")).step == 2
