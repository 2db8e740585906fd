"""`preview` of a model that pads its batches shows how much, and where."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from fulltune.config import build_config
from fulltune.data.preview_facts import PreviewFacts
from fulltune.objectives.base import collate_tokens
from fulltune.recipes import finetune, preview
from fulltune.recipes.prepare import make_objective, open_base, prepare


@pytest.fixture(scope="module")
def tiny_roberta(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer RoBERTa, which cannot pack."""
    folder = tmp_path_factory.mktemp("tiny_roberta")
    for file in tiny_bert.glob("token*"):
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(4)
    RobertaModel(
        RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=130,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Questions of very different lengths."""
    lines = [
        json.dumps(
            {
                "text": "Where is the house? " * (1 + index % 5),
                "label": "ab"[index % 2],
                "id": index,
            }
        )
        for index in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_config(model: Path, rows: Path, device: str = "cpu") -> finetune.Config:
    values = {
        "model": str(model),
        "task": {"kind": "classification", "train": str(rows), "validation": "4 examples"},
        "batch": "8 examples",
        "device": device,
        "num_workers": 0,
        "run_dir": str(rows.parent / "run"),
    }
    return build_config(finetune.Config, values)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))


def shown(config: finetune.Config, *, colour: bool) -> str:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=colour, no_color=not colour,
        color_system="truecolor" if colour else None, legacy_windows=False,
    )  # fmt: skip
    preview.run(config, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_share_of_padding_is_that_of_the_batches_which_are_trained(
    tiny_roberta: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_roberta, rows)
    preview.run(config, as_json=True)
    facts = PreviewFacts.model_validate(json.loads(capsys.readouterr().out)["facts"])
    assert facts.padding is not None
    prepared = prepare(
        make_objective(open_base(config.model, config.task), config.task), config.task, seed=0,
        num_workers=0,
    )  # fmt: skip
    # A step of 8 of the 16 examples is one forward pass here; their order is the loader's.
    loader = preview.make_loader(prepared, config)
    masks = [
        collate_tokens(
            [prepared.dataset[int(index)] for index in members], packing=False, padding=0
        )[0]["attention_mask"]
        for plan, _ in zip(loader, range(2), strict=False)
        for members in plan.micro_batches
    ]
    padding = sum(int((mask == 0).sum()) for mask in masks)
    assert padding > 0
    assert facts.padding.num_padding == padding
    assert facts.padding.num_tokens == sum(int(mask.sum()) for mask in masks)
    assert facts.padding.share == pytest.approx(padding / sum(mask.numel() for mask in masks))


def test_padding_is_shown_in_its_own_colour_and_counted_in_the_table(
    tiny_roberta: Path, rows: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_roberta, rows)
    plain = shown(config, colour=False)
    assert "% of a forward pass" in plain
    assert "[PAD]" in plain
    assert "   padding   " in plain  # the legend
    assert "\x1b[2;3m[PAD]" in shown(config, colour=True)  # dim and slanted
    page = tmp_path / "page.html"
    preview.run(config, html=page, console=Console(file=io.StringIO()))
    assert '<span class="padding"><i>[PAD]</i>' in page.read_text(encoding="utf-8")


def test_a_model_that_packs_has_no_padding_to_show(tiny_bert: Path, rows: Path) -> None:
    plain = shown(make_config(tiny_bert, rows), colour=False)
    assert "padding" not in plain
    assert "[PAD]" not in plain


def test_a_run_for_a_gpu_can_be_looked_at_without_one(tiny_roberta: Path, rows: Path) -> None:
    assert "% of a forward pass" in shown(make_config(tiny_roberta, rows, "cuda:7"), colour=False)
