"""`pretrain` end to end: new models of every objective learn and resume exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fulltune.config import build_config
from fulltune.data.tasks import TaskConfig
from fulltune.data.tokenizers import FIM_TOKENS
from fulltune.errors import ConfigError, FulltuneError, ModelError
from fulltune.recipes import evaluate, finetune, prepare, pretrain
from fulltune.tracking import read_metrics
from fulltune.train.checkpoint import last_checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred documents of a few sentences, one a row."""
    lines = (
        "The river runs past the old mill.", "Nobody has seen the miller since spring.",
        "Two boats lie at the pier.", "A boy counts the ducks on the water.", "It begins to rain.",
        "The bells ring for the evening.", "她在河边看书。", "今天的天气很好。",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        {"text": f"Day {day}. " + "\n".join(lines[(day * step + step) % 8] for step in range(1, 7))}
        for day in range(100)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_sentinels(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of the tests' decoders, with the sentinels of T5, UL2 and fill-in-the-middle."""
    backend = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(32))]
    added = ["[NLU]", "[NLG]", "[S2S]", *FIM_TOKENS, *sentinels]
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    folder = tmp_path_factory.mktemp("sentinels")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=256,
    ).save_pretrained(folder)
    return folder


SMALL: dict[str, dict[str, Any]] = {
    "gpt2-tiny": {"n_embd": 32, "n_positions": 128},
    "llama-tiny": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2,
    },
    "bert-tiny": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "xlnet-tiny": {"d_model": 32, "n_head": 4, "d_inner": 48},
    "t5-tiny": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4},
}  # fmt: skip


def make_config(
    run_dir: Path, corpus: Path, folder: Path, model: str, **changes: Any
) -> pretrain.Config:
    values: dict[str, Any] = {
        "model": model,
        "tokenizer": str(folder),
        "architecture": SMALL[model],
        "task": {"kind": "text", "train": str(corpus), "validation": "10 examples"},
        "objective": {"length": 32},
        "duration": "6 steps",
        "batch": "8 examples",
        "precision": "fp32",
        "optimizer": {"name": "adamw_scaled", "lr": 0.02} if model == "t5-tiny" else {"lr": 3e-3},
        "evaluate": {"every": "3 steps"},
        "save_every": "2 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(pretrain.Config, {**values, **changes})


@pytest.mark.parametrize("is_new", [True, False])
def test_the_task_of_a_run_is_checked_once(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[TaskConfig] = []
    check = prepare.check_task_settings

    def check_and_count(task: TaskConfig) -> None:
        checked.append(task)
        check(task)

    monkeypatch.setattr(prepare, "check_task_settings", check_and_count)
    config = make_config(tmp_path / "run", corpus, tiny_gpt2, "gpt2-tiny", duration="1 steps")
    if not is_new:
        start: dict[str, Any] = {"model": str(tiny_gpt2), "tokenizer": None, "architecture": {}}
        config = config.model_copy(update=start)
    assert pretrain.run(config).step == 1
    assert checked == [config.task]


def step_losses(run_dir: Path) -> list[float]:
    events = read_metrics(run_dir / "metrics.jsonl")
    return [event["loss"] for event in events if event["event"] == "step"]


CASES = [
    ("gpt2-tiny", "tiny_gpt2", {"length": 32}),
    ("gpt2-tiny", "tiny_gpt2", {"length": 32, "stream": True}),
    ("gpt2-tiny", "tiny_sentinels", {"length": 32, "stream": True, "fim_rate": 0.5}),
    ("llama-tiny", "tiny_llama", {"length": 32, "stream": True}),
    ("bert-tiny", "tiny_bert", {"length": 32}),
    (
        "bert-tiny", "tiny_bert",
        {"length": 32, "masking": {"rate": 0.3, "whole_words": True, "max_ngram": 3}},
    ),
    ("bert-tiny", "tiny_bert", {"name": "sentence_pairs", "length": 48}),
    ("xlnet-tiny", "tiny_bert", {"length": 32}),
    ("xlnet-tiny", "tiny_bert", {"length": 32, "permutation": {"memory_length": 16}}),
    (
        "xlnet-tiny", "tiny_bert",
        {
            "length": 32,
            "permutation": {
                "memory_length": 24, "reuse_length": 16, "pairs": True, "backward": True,
            },
        },
    ),
    ("t5-tiny", "tiny_sentinels", {"length": 48}),
    ("t5-tiny", "tiny_sentinels", {"length": 48, "spans": {"mixture": "ul2"}}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "tokenizer", "objective"), CASES)
def test_a_new_model_learns_and_evaluate_finds_the_result_of_the_run(
    request: pytest.FixtureRequest, tmp_path: Path, corpus: Path, model: str, tokenizer: str,
    objective: dict[str, Any],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    config = make_config(
        run_dir, corpus, request.getfixturevalue(tokenizer), model, objective=objective,
        duration="40 steps",
    )  # fmt: skip
    result = pretrain.run(config)
    course = step_losses(run_dir)
    assert course[-1] < 0.75 * course[0]
    measured = evaluate.run(str(run_dir))
    assert measured.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    assert (run_dir / "report.html").is_file()


@pytest.mark.parametrize(("model", "tokenizer", "objective"), CASES)
def test_a_resumed_pretraining_equals_an_unbroken_one_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, corpus: Path, model: str, tokenizer: str,
    objective: dict[str, Any],
) -> None:  # fmt: skip
    folder = request.getfixturevalue(tokenizer)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.run(make_config(whole, corpus, folder, model, objective=objective))
    config = make_config(broken, corpus, folder, model, objective=objective)
    pretrain.run(config)
    # Back to the second checkpoint, as after a kill in the fifth step.
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    shutil.rmtree(broken / "model")
    (broken / "manifest.json").unlink()
    assert pretrain.run(config, resume=True).ending == "finished"
    expected = load_file(whole / "model" / "model.safetensors")
    found = load_file(broken / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    checkpoint, _ = last_checkpoint(broken / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 6


def test_documents_without_tokens_are_left_out_and_it_is_said(
    tmp_path: Path, corpus: Path, tiny_bert: Path
) -> None:
    data = tmp_path / "corpus.jsonl"
    data.write_text(corpus.read_text(encoding="utf-8") + '{"text": "\\u200b"}\n', encoding="utf-8")
    config = make_config(tmp_path / "run", data, tiny_bert, "bert-tiny")
    _, objective = pretrain.open_start(config)
    prepared = pretrain.prepare(config, objective, lambda _: None)
    assert "1 of 101 rows left out: without any token" in prepared.notes


def test_a_new_model_is_the_same_for_the_same_seed(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path
) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        config = make_config(tmp_path / "run", corpus, tiny_gpt2, "gpt2-tiny", seed=seed)
        base, _ = pretrain.open_start(config)
        return load_file(base.path / "model.safetensors")

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])
    # GPT-2 divides residual projections by the root of twice the layers.
    deviation = float(first["transformer.h.0.mlp.c_proj.weight"].std())
    assert deviation == pytest.approx(0.02 / 2, rel=0.05)


def test_a_pretrained_run_is_fine_tuned_by_its_name(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path, classification_file: Path
) -> None:
    config = make_config(tmp_path / "pretrained", corpus, tiny_gpt2, "gpt2-tiny")
    pretrain.run(config)
    values = {
        "model": str(tmp_path / "pretrained"),
        "task": {"kind": "classification", "train": str(classification_file)},
        "duration": "2 steps", "batch": "8 examples", "num_workers": 0,
        "run_dir": str(tmp_path / "finetuned"),
    }  # fmt: skip
    result = finetune.run(build_config(finetune.Config, values))
    assert result.ending == "finished"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": None}, "has no tokenizer"),
        ({"architecture": {"num_wheels": 4}}, "architecture.num_wheels"),
        ({"architecture": {"vocab_size": 50}}, "is taken from the tokenizer"),
        ({"architecture": {"n_embd": 33}}, "`architecture` does not fit together: .*divisible"),
        ({"architecture": {"activation_function": "swush"}}, "`architecture` names 'swush'"),
        ({"objective": {"length": 4096}}, "context is 128 tokens"),
        ({"task": {"kind": "classification", "train": "x"}}, "reads documents"),
        ({"tokenizer": "nowhere"}, "no folder of a tokenizer"),
        ({"task": {"kind": "text", "train": "x", "max_length": 64}}, "`task.max_length` has no"),
        ({"task": {"kind": "text", "train": "x", "too_long": "drop"}}, "`task.too_long` has no"),
        ({"task": {"kind": "text", "train": "x", "template": "chatml"}}, "`task.template` has no"),
    ],
)
def test_what_cannot_be_pretrained_is_said_before_anything_is_written(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path, changes: dict[str, Any], named: str
) -> None:
    config = make_config(tmp_path / "run", corpus, tiny_gpt2, "gpt2-tiny", **changes)
    with pytest.raises((ConfigError, ModelError), match=named):
        pretrain.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label_smoothing": 0.1}, "`label_smoothing` has no effect"),
        ({"z_loss": 1e-4}, "`z_loss` has no effect"),
        ({"evaluate": {"retention": True}}, "no head that predicts the next token"),
    ],
)
def test_what_only_next_token_prediction_has_is_refused_by_others(
    tmp_path: Path, corpus: Path, tiny_bert: Path, changes: dict[str, Any], named: str
) -> None:
    config = make_config(tmp_path / "run", corpus, tiny_bert, "bert-tiny", **changes)
    with pytest.raises(ConfigError, match=named):
        pretrain.run(config)
    assert not (tmp_path / "run").exists()


ACCURACIES = {"masked_accuracy", "target_accuracy", "sentence_accuracy"}


@pytest.mark.parametrize(
    ("model", "tokenizer", "name", "measured"),
    [
        ("gpt2-tiny", "tiny_gpt2", "causal_lm", set()),
        ("bert-tiny", "tiny_bert", "masked_lm", {"masked_accuracy"}),
        ("bert-tiny", "tiny_bert", "sentence_pairs", {"masked_accuracy", "sentence_accuracy"}),
        ("xlnet-tiny", "tiny_bert", "permutation_lm", {"target_accuracy"}),
        ("t5-tiny", "tiny_sentinels", "span_corruption", {"target_accuracy"}),
    ],
)
def test_what_an_objective_measures_is_called_what_it_is(
    request: pytest.FixtureRequest, tmp_path: Path, corpus: Path, model: str, tokenizer: str,
    name: str, measured: set[str],
) -> None:  # fmt: skip
    def config(folder: str, **evaluation: Any) -> pretrain.Config:
        return make_config(
            tmp_path / folder, corpus, request.getfixturevalue(tokenizer), model,
            objective={"name": name, "length": 48}, duration="2 steps",
            evaluate={"every": "2 steps", **evaluation},
        )  # fmt: skip

    result = pretrain.run(config("run", **({"metric": min(measured)} if measured else {})))
    assert ACCURACIES & set(result.metrics) == measured
    for other in ACCURACIES - measured:
        with pytest.raises(ConfigError, match=f": {name}` does not measure") as caught:
            pretrain.run(config("other", metric=other))
        assert "`loss`, `perplexity`" in str(caught.value.hint)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("stream", [False, True])
def test_label_smoothing_z_loss_and_retention_have_their_effect_on_gpt(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path, stream: bool
) -> None:
    losses = []
    for number, changes in enumerate(({}, {"label_smoothing": 0.1}, {"z_loss": 0.1})):
        config = make_config(
            tmp_path / f"run-{number}", corpus, tiny_gpt2, "gpt2-tiny",
            objective={"length": 32, "stream": stream}, duration="1 steps",
            evaluate={"retention": str(corpus)}, **changes,
        )  # fmt: skip
        result = pretrain.run(config)
        assert result.metrics["retention_loss"] > 0
        losses += step_losses(tmp_path / f"run-{number}")
    plain, smoothed, bounded = losses
    assert smoothed != plain
    assert bounded > plain


def test_label_smoothing_and_z_loss_have_their_effect_on_t5(
    tmp_path: Path, corpus: Path, tiny_sentinels: Path
) -> None:
    losses = []
    for number, changes in enumerate(({}, {"label_smoothing": 0.1}, {"z_loss": 0.1})):
        config = make_config(
            tmp_path / f"run-{number}", corpus, tiny_sentinels, "t5-tiny",
            objective={"length": 48}, duration="1 steps", **changes,
        )  # fmt: skip
        pretrain.run(config)
        losses += step_losses(tmp_path / f"run-{number}")
    plain, smoothed, bounded = losses
    assert smoothed != plain
    assert bounded > plain


def test_a_trained_model_takes_no_other_tokenizer(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path
) -> None:
    values = {
        "model": str(tiny_gpt2), "tokenizer": str(tiny_gpt2),
        "task": {"kind": "text", "train": str(corpus)}, "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="`tokenizer` has no effect"):
        pretrain.run(build_config(pretrain.Config, values))


@pytest.fixture
def without_end(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A GPT whose tokenizer pads, and ends no text."""
    folder = tmp_path / "without-end"
    shutil.copytree(tiny_gpt2, folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["eos_token"]
    path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_new_gpt_needs_a_tokenizer_that_ends_texts_and_a_trained_one_warns(
    tmp_path: Path, corpus: Path, without_end: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream in (False, True):
        config = make_config(
            tmp_path / "run", corpus, without_end, "gpt2-tiny",
            objective={"length": 32, "stream": stream},
        )  # fmt: skip
        with pytest.raises(ModelError, match=r"without-end` has no `eos_token`") as caught:
            pretrain.run(config)
        assert "--family gpt" in str(caught.value.hint)
        assert not (tmp_path / "run").exists()
    trained: dict[str, Any] = {"model": str(without_end), "tokenizer": None, "architecture": {}}
    values = make_config(tmp_path / "run", corpus, without_end, "gpt2-tiny", duration="1 steps")
    assert pretrain.run(values.model_copy(update=trained)).ending == "finished"
    said = capsys.readouterr().err
    assert "warning: the tokenizer has no `eos_token`, so that the model does not learn" in said


def test_a_mistyped_size_is_named(tmp_path: Path, corpus: Path, tiny_gpt2: Path) -> None:
    config = make_config(tmp_path / "run", corpus, tiny_gpt2, "gpt2-tiny")
    config = config.model_copy(update={"model": "gpt2-tinny"})
    with pytest.raises(FulltuneError) as caught:
        pretrain.run(config)
    assert "did you mean the size `gpt2-tiny`?" in str(caught.value.hint)


def test_the_perplexity_of_pairs_is_that_of_their_tokens(
    tmp_path: Path, corpus: Path, tiny_bert: Path
) -> None:
    measured = {}
    for weight in (0.0, 3.0):
        config = make_config(
            tmp_path / f"run-{weight}", corpus, tiny_bert, "bert-tiny",
            objective={"name": "sentence_pairs", "length": 48, "pairs": {"weight": weight}},
        )  # fmt: skip
        pretrain.run(config)
        events = read_metrics(tmp_path / f"run-{weight}" / "metrics.jsonl")
        measured[weight] = next(e for e in events if e["event"] == "evaluation" and not e["step"])
    alone, joined = measured[0.0], measured[3.0]
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))
    assert joined["perplexity"] == pytest.approx(alone["perplexity"])
    assert joined["loss"] - alone["loss"] == pytest.approx(3 * math.log(2), rel=0.1)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"fim_rate": 0.5}, "`objective.fim_rate` has no effect without"),
        ({"spans": {"mixture": "ul2", "mean_length": 5}}, "`objective.spans.mean_length` has no"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path, objective: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(tmp_path / "run", corpus, tiny_gpt2, "t5-tiny", objective=objective)


def test_a_tokenizer_without_sentinels_is_refused_before_anything_is_written(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path
) -> None:
    config = make_config(tmp_path / "run", corpus, tiny_gpt2, "t5-tiny", objective={"length": 48})
    with pytest.raises(ModelError, match="0 sentinels"):
        pretrain.run(config)
    assert not (tmp_path / "run").exists()
