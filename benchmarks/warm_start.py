"""What an XLNet gains by starting from a BERT: the same steps from a BERT and from nothing.

    python benchmarks/warm_start.py
    python benchmarks/warm_start.py --bert-steps 200 --steps 100 --seeds 0 1 2 --json warm.json

Trains a tokenizer and a BERT on a text, then XLNets of one size, one tokenizer and one seed after
another: with `convert_to: xlnet`, and new. Both see the same text in the same order with the same
noise, and predict the same tokens of the same held-out text, the last part of it, which neither the
BERT nor the tokenizer has seen. The BERT's own steps are not counted: it is what one has already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fulltune.config import build_config
from fulltune.data.documents import read_documents
from fulltune.data.tokenizers import TokenizerConfig
from fulltune.models.sources import resolve_model
from fulltune.models.warm_start import converted_xlnet
from fulltune.recipes import pretrain, tokenizer
from fulltune.runtime import describe_machine, git_commit, versions
from fulltune.tracking import read_metrics

STARTS = ("from the BERT", "new")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--data", default="asset:shakespeare", help="plain text: a path or asset:NAME")
    add("--held-out", type=float, default=0.02, help="share of the text, at its end")
    add("--vocab-size", type=int, default=8000)
    add("--bert-model", default="bert-tiny", help="a size of `fulltune models`")
    add("--bert-steps", type=int, default=1500)
    add("--steps", type=int, default=150, help="of each XLNet")
    add("--every", type=int, default=50, help="steps between evaluations")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--batch-tokens", type=int, default=4096)
    add("--length", type=int, default=128)
    add("--lr", type=float, default=1e-3, help="of all runs, with 10%% warmup and linear decay")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train all runs, print the table and write the result."""
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fulltune-warm-start-") as place:
        texts = split_text(options.data, options.held_out, Path(place))
        # From here on everything is made of these texts alone, and goes with them.
        os.environ["FULLTUNE_CACHE"] = str(Path(place) / "cache")
        measured = run(Path(place), *texts, options)
    result = {
        "command": ["python", "benchmarks/warm_start.py", *sys.argv[1:]],
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "seconds": round(time.monotonic() - started, 1),
        **measured,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_result(result)
    return result


def run(folder: Path, train: Path, held_out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A BERT, and XLNets from it and from nothing."""
    config = {"family": "bert", "vocab_size": options.vocab_size, "lowercase": True}
    tokenizer.train([str(train)], folder / "words", build_config(TokenizerConfig, config))

    def pretrained(name: str, **values: Any) -> dict[str, Any]:
        settings = {
            "task": {"kind": "text", "train": str(train), "validation": str(held_out)},
            "batch": f"{options.batch_tokens} tokens",
            "optimizer": {"lr": options.lr, "warmup": "10%"},
            "objective": {"length": options.length},
            "save_every": "100000 steps",
            "run_dir": str(folder / name),
            **values,
        }
        before = time.monotonic()
        pretrain.run(build_config(pretrain.Config, settings))
        events = read_metrics(folder / name / "metrics.jsonl")
        return {
            "seconds": round(time.monotonic() - before, 1),
            "evaluations": [
                {
                    "step": event["step"], "loss": event["loss"],
                    "accuracy": event.get("target_accuracy", event.get("masked_accuracy")),
                }
                for event in events
                if event["event"] == "evaluation"
            ],
        }  # fmt: skip

    bert = pretrained(
        "bert", model=options.bert_model, tokenizer=str(folder / "words"),
        duration=f"{options.bert_steps} steps", evaluate={"every": f"{options.bert_steps} steps"},
    )  # fmt: skip
    shared = {
        "duration": f"{options.steps} steps",
        "evaluate": {"every": f"{options.every} steps"},
    }
    # The new ones have the config and the tokenizer of those from the BERT, and no weight.
    like = converted_xlnet(resolve_model(str(folder / "bert")))
    starts: dict[str, dict[str, Any]] = {
        STARTS[0]: {"model": str(folder / "bert"), "convert_to": "xlnet"},
        STARTS[1]: {"model": str(like / "config.json"), "tokenizer": str(like)},
    }
    runs = [
        {"start": start, "seed": seed}
        | pretrained(f"{start}-{seed}".replace(" ", "-"), seed=seed, **values, **shared)
        for seed in options.seeds
        for start, values in starts.items()
    ]
    return {"bert": bert, "runs": runs, "starts": summarize(runs)}


def split_text(source: str, share: float, folder: Path) -> tuple[Path, Path]:
    """Two files: the text, and its end, cut between two lines."""
    lines = "\n".join(read_documents([source])).splitlines(keepends=True)
    cut = max(1, round((1 - share) * len(lines)))
    paths = folder / "train.txt", folder / "held_out.txt"
    for path, part in zip(paths, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def summarize(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Mean and spread over the seeds at each evaluated step."""
    summary = {}
    for start in STARTS:
        courses = [run["evaluations"] for run in runs if run["start"] == start]
        summary[start] = [
            {
                "step": each[0]["step"],
                "loss_mean": statistics.mean(one["loss"] for one in each),
                "loss_spread": max(one["loss"] for one in each) - min(one["loss"] for one in each),
                "accuracy_mean": statistics.mean(one["accuracy"] for one in each),
            }
            for each in zip(*courses, strict=True)
        ]
    return summary


def print_result(result: dict[str, Any]) -> None:
    """A row a start and step, with all that is needed to judge it."""
    settings, machine = result["settings"], result["machine"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    bert = result["bert"]["evaluations"][-1]
    table = Table(title=f"XLNet after a {settings['bert_model']} of {bert['step']:,} steps")
    for name in ("step", "start", "held-out loss", "spread", "accuracy"):
        table.add_column(name, justify="left" if name == "start" else "right")
    for rows in zip(*result["starts"].values(), strict=True):
        for start, row in zip(result["starts"], rows, strict=True):
            table.add_row(
                f"{row['step']:,}", start, f"{row['loss_mean']:.3f}", f"{row['loss_spread']:.3f}",
                f"{row['accuracy_mean']:.3f}",
            )  # fmt: skip
    console.print(table)
    console.print(
        f"{len(settings['seeds'])} seeds; the BERT: loss {bert['loss']:.3f} on masked tokens in "
        f"{result['bert']['seconds']:.0f} s; all in {result['seconds']:.0f} s on {machine['cpu']}, "
        f"{settings['threads']} threads; commit {result['commit']}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
