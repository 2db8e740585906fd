"""What `kills.py` trains: each case is one kind of run, with the moments that it announces.

A run is short, has dropout, evaluations and a checkpoint after every step, and either ends after
its last step or stops early, in which case it takes the best weights, which are not the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fulltune.config import build_config
from fulltune.data.tokenizers import TokenizerConfig
from fulltune.models.chat_template import CHAT_TEMPLATES
from fulltune.recipes import (
    corpus,
    finetune,
    finish,
    measuring,
    pretrain,
    resume,
    tokenizer,
    trainer,
)
from fulltune.train import checkpoint as checkpoints

Moments = dict[str, tuple[Any, str]]

OF_EVERY_RUN: Moments = {
    "beginning": (finetune, "create_run_folder"),
    "restoring": (resume, "last_checkpoint"),
    "opening the log": (trainer, "Tracker"),
    "step": (trainer, "train_step"),
    "evaluating": (measuring, "evaluate_model"),
    "saving": (resume, "save_checkpoint"),
    "hashing a save": (checkpoints, "_flushed_sha256"),
    "pruning": (resume, "prune_checkpoints"),
    "exporting": (finish, "save_model"),
    "replacing the model": (finish, "replace_folder"),
    "writing small files": (finish, "write_atomically"),
    "writing the report": (finish, "write_report"),
    "writing the manifest": (finish, "write_manifest"),
}
"""What a child announces, and the function in which it is done."""
OF_FINE_TUNING: Moments = {
    "reading data": (finetune, "prepare"),
    **OF_EVERY_RUN,
    "sampling": (measuring, "sample_examples"),
}
OF_PRE_TRAINING: Moments = {
    "making the model": (pretrain, "make_model"),
    "reading data": (pretrain, "prepare"),
    **OF_EVERY_RUN,
}
CACHED = {"making the model", "reading data"}
"""What a later life of the same run finds in the cache, unless that is emptied."""


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    name: str
    train: Callable[..., Any]
    """The verb: settings and whether to resume -> its result."""
    make_settings: Callable[[Path, bool], finetune.Config]
    """The run's folder and whether it stops early -> settings."""
    moments: Moments


def fine_tuning(folder: Path, model: Path | None, data: Path | None) -> Case:
    """A tiny Llama on conversations; what is not given is made in ``folder``."""
    model = model or make_model(folder / "base")
    data = data or make_conversations(folder / "chat.jsonl")

    def make_settings(run_dir: Path, stops_early: bool) -> finetune.Config:
        return build_config(
            finetune.Config,
            {
                **of_every_run(run_dir, stops_early, lr=1e-3, excessive_rate=0.2, num_samples=1),
                "model": str(model),
                "task": {"kind": "chat", "train": str(data), "validation": "4 examples"},
                "batch": "6 examples",
            },
        )

    return Case("chat", finetune.run, make_settings, OF_FINE_TUNING)


@dataclass(frozen=True)
class NewModel:
    """A small new model and its tokenizer."""

    preset: str
    family: str
    algorithm: str
    vocab_size: int
    """No more than the few documents support."""
    excessive_rate: float
    """At which a warmup of eight steps makes the model better, and soon worse."""
    architecture: Mapping[str, Any]


GPT = NewModel("gpt2-tiny", "gpt", "bpe", 380, 0.1, {"n_embd": 32, "n_positions": 128})
BERT = NewModel(
    "bert-tiny", "bert", "wordpiece", 240, 0.1,
    {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
)  # fmt: skip
XLNET = NewModel(
    "xlnet-tiny", "xlnet", "bpe", 380, 0.1, {"d_model": 32, "n_head": 4, "d_inner": 48}
)
T5 = NewModel(
    "t5-tiny", "t5", "bpe", 380, 2.0, {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}
)

OBJECTIVES: dict[str, tuple[NewModel, dict[str, Any]]] = {
    "causal_lm": (GPT, {"stream": True, "length": 32}),
    "masked_lm": (BERT, {"length": 32}),
    "sentence_pairs": (BERT, {"length": 48}),
    "permutation_lm": (XLNET, {"length": 32}),
    "span_corruption": (T5, {"length": 48}),
}


def pre_training(folder: Path, objectives: list[str]) -> list[Case]:
    """A tiny new model of each objective, on a corpus prepared by `fulltune corpus`."""
    documents = make_documents(folder / "documents.jsonl")
    prepared = folder / "corpus"
    settings = {
        "sources": str(documents), "output": str(prepared), "validation": "10%",
        "shard_bytes": 8192, "num_workers": 0,
    }  # fmt: skip
    corpus.run(build_config(corpus.Config, settings))
    cases = []
    for name in objectives:
        new, objective = OBJECTIVES[name]
        vocabulary = folder / f"tokenizer-{new.family}"
        if not vocabulary.exists():
            values = {
                "family": new.family, "algorithm": new.algorithm, "vocab_size": new.vocab_size
            }  # fmt: skip
            tokenizer.train(
                [str(prepared / "train")], vocabulary, build_config(TokenizerConfig, values)
            )
        cases.append(_pre_training(name, prepared, vocabulary, new, objective))
    return cases


def _pre_training(
    name: str, prepared: Path, vocabulary: Path, new: NewModel, objective: dict[str, Any]
) -> Case:
    def make_settings(run_dir: Path, stops_early: bool) -> finetune.Config:
        return build_config(
            pretrain.Config,
            {
                **of_every_run(run_dir, stops_early, lr=3e-3, excessive_rate=new.excessive_rate),
                "model": new.preset,
                "architecture": dict(new.architecture),
                "tokenizer": str(vocabulary),
                "objective": {"name": name, **objective},
                "task": {
                    "kind": "text",
                    "train": str(prepared / "train"),
                    "validation": str(prepared / "validation"),
                },
                "batch": "8 examples",
            },
        )

    return Case(name, pretrain.run, make_settings, OF_PRE_TRAINING)


def of_every_run(
    run_dir: Path, stops_early: bool, *, lr: float, excessive_rate: float, **evaluate: Any
) -> dict[str, Any]:
    """What the settings of all cases have in common."""
    # Better first and then worse, so that the best weights are neither the first nor the last.
    rate = {"lr": excessive_rate, "warmup": "8 steps"} if stops_early else {"lr": lr}
    return {
        "optimizer": {"schedule": "constant", **rate},
        "duration": "8 steps",
        "dropout": 0.1,
        "precision": "bf16",
        "evaluate": {"every": "2 steps", "stop_after": 1 if stops_early else None, **evaluate},
        "save_every": "1 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }


def make_conversations(path: Path) -> Path:
    """Forty short conversations."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            question = {"role": "user", "content": f"What is {number} and {number % 7}?"}
            answer = {"role": "assistant", "content": f"It is {number + number % 7}, I think."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def make_documents(path: Path) -> Path:
    """A hundred documents of six sentences, one of them in Chinese."""
    lines = (
        "The river runs past the old mill.", "Nobody has seen the miller since spring.",
        "Two boats lie at the pier.", "A boy counts the ducks on the water.", "It begins to rain.",
        "The bells ring for the evening.", "Somebody left a lamp in the window.",
    )  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        for day in range(100):
            said = [lines[(day * step + step) % len(lines)] for step in range(1, 5)]
            text = " ".join([f"Day {day}.", *said, f"第{day}天，她在河边看书。"])
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def make_model(folder: Path) -> Path:
    """A Llama of two layers with a tokenizer of bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is it, I think?"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATES["chatml"],
        model_max_length=256,
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
