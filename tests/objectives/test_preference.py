"""Preference tuning is the loss of its paper, with its gradients, and learns what is preferred."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fulltune.config import build_config
from fulltune.data.encoding import EncodedExample
from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import Record
from fulltune.data.tasks import Message, PreferenceExample, TaskConfig
from fulltune.errors import ConfigError, DataError
from fulltune.models.loading import load_model, load_tokenizer
from fulltune.objectives.linear_cross_entropy import linear_cross_entropy
from fulltune.objectives.preference import REJECTED, Preference
from fulltune.recipes import evaluate, finetune
from fulltune.tracking import read_metrics


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pair(prompt: str, chosen: str, rejected: str) -> PreferenceExample:
    user = Message("user", prompt)
    sides = [(user, Message("assistant", answer)) for answer in (chosen, rejected)]
    return PreferenceExample(sides[0], sides[1], "rows.jsonl:1")


PAIRS = [
    pair("Hi", "Hello, how are you?", "No."),
    pair("Where is it?", "In Rome.", "In Rome, or in Oslo, or nowhere at all."),
    pair("法国的首都是哪里？", "巴黎。", "里昂。"),
]


def encoded(objective: Preference, reference: bool = True) -> list[EncodedExample]:
    examples = [objective.encode(example)[0] for example in PAIRS]
    for number, example in enumerate(examples):
        if reference:
            example["reference"] = json.dumps([-20.0 - number, -22.5 + number])
    return examples


def sides_of(example: EncodedExample) -> list[tuple[list[int], list[int]]]:
    start = example["token_type_ids"].index(REJECTED)
    return [
        (example["input_ids"][part], example["targets"][part])
        for part in (slice(0, start), slice(start, None))
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradients_are_those_of_the_paper(
    tiny_llama: Path, packing: bool, smoothing: float
) -> None:
    model = load_model(tiny_llama, head="causal_lm", dtype=torch.float32, attention="fulltune")
    objective = Preference(
        load_tokenizer(tiny_llama), 128, packing=packing, label_smoothing=smoothing, beta=0.3
    )
    examples = encoded(objective)
    ours = objective.loss_sum(model, objective.collate(examples))
    ours.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()

    total = torch.zeros(())
    for example in examples:
        found = []
        for ids, targets in sides_of(example):
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            own_T = logits_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            found.append((own_T * torch.tensor(targets[1:])).sum())
        reference = json.loads(example["reference"])
        margin = 0.3 * ((found[0] - reference[0]) - (found[1] - reference[1]))
        loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        total = total + loss
    total.backward()
    assert float(ours.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, atol=1e-5, rtol=1e-3)


def test_what_both_answers_begin_with_is_no_target(tiny_llama: Path) -> None:
    objective = Preference(load_tokenizer(tiny_llama), 128)
    example = objective.encode(PAIRS[1])[0]
    (chosen, targets), (rejected, others) = sides_of(example)
    shared = 0
    while chosen[shared] == rejected[shared]:
        shared += 1
    assert not any(targets[:shared])
    assert not any(others[:shared])
    assert all(targets[shared : shared + 2])
    assert all(others[shared : shared + 2])
    assert objective.num_targets(objective.collate([example])) == 1


def test_the_same_answer_twice_and_a_missing_prompt_are_errors(tiny_llama: Path) -> None:
    objective = Preference(load_tokenizer(tiny_llama), 128)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chosen and the rejected"):
        objective.encode(pair("Hi", "Hello", "Hello"))
    task = TaskConfig(kind="preference", train="rows.jsonl")
    for fields, message in (
        ({"chosen": "a", "rejected": "b"}, "there is no `prompt`"),
        ({"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}, "ends"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}],
                "rejected": [
                    {"role": "user", "content": "y"}, {"role": "assistant", "content": "b"},
                ],
            },
            "different prompts",
        ),
    ):  # fmt: skip
        record = Record(fields, "rows.jsonl:4")
        with pytest.raises(DataError, match=message) as caught:
            make_example(record, recognise_format([record], task), kind="preference")
        assert str(caught.value).startswith("rows.jsonl:4")


def test_the_formats_of_the_field_are_one_example() -> None:
    turns = [{"role": "user", "content": "Hi"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {
            "chosen": [*turns, {"role": "assistant", "content": "Hello"}],
            "rejected": [*turns, {"role": "assistant", "content": "No"}],
        },
        {
            "prompt": turns,
            "chosen": [*turns, {"role": "assistant", "content": "Hello"}],
            "rejected": [{"role": "assistant", "content": "No"}],
        },
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
    ]
    task = TaskConfig(kind="preference", train="rows.jsonl")
    for fields in rows:
        record = Record(fields, "rows.jsonl:1")
        layout = recognise_format([record], task)
        assert make_example(record, layout, kind="preference") == pair("Hi", "Hello", "No")


def test_weights_of_positions_multiply_losses_and_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets, counts = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    sums = linear_cross_entropy(hidden, weight, targets, weights_N=counts, chunk_bytes=200)
    own = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(sums.cross_entropy_N, own.detach())
    torch.testing.assert_close(sums.loss_sum, (own * counts).sum())
    ours = torch.autograd.grad(sums.loss_sum, (hidden, weight))
    for one, other in zip(ours, torch.autograd.grad((own * counts).sum(), (hidden, weight)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def config_of(run_dir: Path, model: Path, data: Path, **changes: Any) -> finetune.Config:
    values = {
        "model": str(model),
        "task": {"kind": "preference", "train": str(data), "validation": "4 examples"},
        "duration": "10 steps", "batch": "8 examples", "precision": "fp32", "dropout": 0.0,
        "optimizer": {"lr": 3e-3, "schedule": "constant"},
        "num_workers": 0, "save_every": "4 steps",
        "evaluate": {"every": "5 steps", "num_samples": 1}, "run_dir": str(run_dir),
    }  # fmt: skip
    return build_config(finetune.Config, {**values, **changes})


def test_a_run_learns_the_preference_becomes_a_chat_model_and_resumes_exactly(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"Question {number}?", "chosen": "Yes, gladly.", "rejected": f"No {number}!"}
        for number in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert finetune.run(config_of(tmp_path / "whole", tiny_llama, data)).ending == "finished"
    events = list(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    measured = [event for event in events if event["event"] == "evaluation"]
    # Nothing is gained before the first step: the model is its own reference.
    assert measured[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert measured[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert measured[-1]["preference_accuracy"] == 1.0
    assert measured[-1]["margin"] > 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert (tmp_path / "whole" / "samples.jsonl").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="in training only"):
        evaluate.run(str(tmp_path / "whole"))
    info = json.loads((tmp_path / "whole" / "model" / "fulltune.json").read_text(encoding="utf-8"))
    assert info["kind"] == "chat"

    # As after a kill in step 9: the end is gone, and what both answers had is computed again.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for name in ("model", "report.html", "manifest.json", "checkpoints/step-00000010"):
        target = tmp_path / "broken" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (tmp_path / "broken" / "config.yaml").write_text(
        (tmp_path / "whole" / "config.yaml").read_text(encoding="utf-8").replace("whole", "broken"),
        encoding="utf-8",
    )
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "other-cache"))
    resumed = config_of(tmp_path / "broken", tiny_llama, data)
    assert finetune.run(resumed, resume=True).step == 10
    one, other = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()
