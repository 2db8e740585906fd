"""Does pre-training help? A classifier from pre-trained weights against one from new weights.

    python benchmarks/pretraining_helps.py
    python benchmarks/pretraining_helps.py --families bert --seeds 0 --json helps.json

Writes a text of TREC's training questions without their labels and of other modern English,
trains a tokenizer on it and pre-trains a small model of each family with it. Then a few of the
questions, with their labels, fine-tune a classifier from two starts: the pre-trained weights, and
new ones as the pre-training began with. Everything else is the same: tokenizer, examples and their
order, steps, new head, optimizer. Each seed has its own order, head, and new weights.

No held-out question is in the text. Each start has the learning rate that is best for it on 500
validation questions, on average over the seeds; the accuracies are of 500 other questions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from question_text import OTHER_TEXT, Questions, write_questions

from fulltune.config import build_config
from fulltune.data.tokenizers import TokenizerConfig
from fulltune.errors import FulltuneError
from fulltune.recipes import evaluate, finetune, pretrain, tokenizer
from fulltune.runtime import describe_machine, git_commit, versions
from fulltune.tracking import read_metrics

STARTS = ("pre-trained", "new")

PRETRAINING: dict[str, dict[str, Any]] = {
    "bert": {
        "model": "modernbert-tiny",
        "objective": {"length": 64, "masking": {"rate": 0.3}},
        "duration": "4000 steps",
        "optimizer": {"lr": 3e-3, "warmup": "10%", "schedule": "cosine"},
    },
    "xlnet": {
        "model": "xlnet-tiny",
        "architecture": {"initializer_range": 0.1},
        "objective": {"length": 64, "permutation": {"perm_size": 64}},
        "duration": "4000 steps",
        "optimizer": {"lr": 2e-3, "warmup": "10%", "schedule": "cosine"},
    },
    "t5": {
        "model": "t5-tiny",
        "objective": {"length": 64, "spans": {"noise_density": 0.5, "mean_length": 8}},
        "duration": "4000 steps",
        "optimizer": {"name": "adamw_scaled", "lr": 2e-2, "warmup": "10%", "schedule": "cosine"},
    },
}
"""What differs between the families."""

FINE_TUNING: dict[str, dict[str, tuple[float, ...]]] = {
    "bert": {"adamw": (5e-4, 1e-3, 2e-3, 4e-3)},
    "xlnet": {"adamw": (5e-4, 1e-3, 2e-3, 4e-3)},
    "t5": {"adamw": (5e-4, 1e-3, 2e-3), "adamw_scaled": (1e-2, 3e-2)},
}
"""Optimizers and their learning rates, all of which are tried with both starts."""


@dataclass(frozen=True)
class Plan:
    """What all families and both starts have in common."""

    vocab_size: int
    steps: int
    """Of each fine-tuning."""
    batch: int
    """Questions of a step."""
    lrs: tuple[float, ...]
    """Instead of each family's own, if there are any."""
    seeds: tuple[int, ...]
    pretraining: dict[str, Any]
    """Settings that differ from those of `PRETRAINING`."""


@dataclass(frozen=True)
class Outcome:
    """One start with one learning rate: accuracies of each seed after the last step."""

    start: str
    optimizer: str
    lr: float
    validation: list[float]
    test: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        """The largest less the smallest."""
        return max(self.test) - min(self.test)


@dataclass(frozen=True)
class Comparison:
    """Both starts of one family, each with the learning rate that its validation chose."""

    family: str
    model: str
    pretraining: dict[str, float]
    """Seconds, and the loss on the text that was held out of it."""
    pretrained: Outcome
    new: Outcome
    all: list[Outcome]

    @property
    def margins(self) -> list[float]:
        """What pre-training adds to the accuracy, seed by seed."""
        pairs = zip(self.pretrained.test, self.new.test, strict=True)
        return [before - without for before, without in pairs]


def pretraining_config(
    family: str, plan: Plan, questions: Questions, folder: Path
) -> pretrain.Config:
    """The settings of a family's pre-training; its tokenizer is trained where there is none."""
    words = folder / f"tokenizer-{family}"
    if not words.is_dir():
        wanted = {"family": family, "vocab_size": plan.vocab_size, "lowercase": True}
        tokenizer.train([str(questions.text)], words, build_config(TokenizerConfig, wanted))
    values = {
        "tokenizer": str(words),
        "task": {"kind": "text", "train": str(questions.text), "validation": "2%"},
        "dropout": 0,
        "batch": "4096 tokens",
        "num_workers": 0,
        "evaluate": {"every": "100000 steps"},
        "save_every": "100000 steps",
        "run_dir": str(folder / f"pretrain-{family}"),
        **PRETRAINING[family],
        **plan.pretraining,
    }
    return build_config(pretrain.Config, values)


def new_start(config: pretrain.Config, seed: int) -> Path:
    """A folder with weights as the pre-training began with, but of another seed."""
    base, _ = pretrain.open_start(config.model_copy(update={"seed": seed}))
    return base.path


def accuracies(
    start: Path,
    folder: Path,
    plan: Plan,
    questions: Questions,
    *,
    optimizer: dict[str, Any],
    seed: int,
) -> tuple[float, float]:
    """Of validation and of test after the last step."""
    config = build_config(
        finetune.Config,
        {
            "model": str(start),
            "task": {
                "kind": "classification", "train": str(questions.train),
                "validation": str(questions.validation),
            },
            "dropout": 0,
            "duration": f"{plan.steps} steps",
            "batch": f"{plan.batch} examples",
            "precision": "fp32",
            "num_workers": 0,
            "optimizer": {**optimizer, "warmup": "10%"},
            # The last weights are those that count, not the best of several looks at the answers.
            "evaluate": {"every": f"{plan.steps} steps", "metric": "accuracy"},
            "save_every": f"{plan.steps} steps",
            "keep_checkpoints": 1,
            "seed": seed,
            "run_dir": str(folder),
        },
    )  # fmt: skip
    validation = finetune.run(config).metrics["accuracy"]
    tested = evaluate.run(str(folder / "model"), data=str(questions.test))
    return validation, tested.metrics["accuracy"]


def rates_of(family: str, plan: Plan) -> list[tuple[str, float]]:
    """Every optimizer of a family with every rate."""
    tried = FINE_TUNING[family].items()
    return [(name, lr) for name, usual in tried for lr in plan.lrs or usual]


def compare(
    family: str, plan: Plan, questions: Questions, folder: Path, fine_tuning: Path
) -> Comparison:
    """Pre-train one model, and fine-tune from both starts with every learning rate and seed."""
    config = pretraining_config(family, plan, questions, folder)
    source = Path(config.run_dir)
    pretrain.run(config, resume=source.is_dir())
    events = read_metrics(source / "metrics.jsonl")
    end = [event for event in events if event["event"] == "end"][-1]
    outcomes: list[Outcome] = []
    for name, lr in rates_of(family, plan):
        optimizer = {"name": name, "lr": lr}
        found: dict[str, list[tuple[float, float]]] = {start: [] for start in STARTS}
        for seed in plan.seeds:
            paths = (source / "model", new_start(config, seed))
            for start, path in zip(STARTS, paths, strict=True):
                place = fine_tuning / f"{family}-{start}-{name}-{lr}-{seed}"
                found[start].append(
                    accuracies(path, place, plan, questions, optimizer=optimizer, seed=seed)
                )
        outcomes += [
            Outcome(start, name, lr, [seen for seen, _ in each], [test for _, test in each])
            for start, each in found.items()
        ]
    best = {
        start: max(
            (each for each in outcomes if each.start == start),
            key=lambda each: statistics.mean(each.validation),
        )
        for start in STARTS
    }
    facts = {"seconds": end["seconds"], "loss": end["loss"]}
    return Comparison(family, config.model, facts, best["pre-trained"], best["new"], outcomes)


COLUMNS = ("model", "pre-training", "pre-trained", "rate", "new", "rate", "margin of each seed")


def table(comparisons: Sequence[Comparison]) -> str:
    """One row a family, in Markdown: means, and the spread of the seeds."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for found in comparisons:
        facts = found.pretraining
        cells = [found.model, f"{facts['seconds']:.0f} s, loss {facts['loss']:.3f}"]
        for outcome in (found.pretrained, found.new):
            rate = f"{outcome.optimizer} {outcome.lr:g}"
            cells += [f"{outcome.mean:.3f} (spread {outcome.spread:.3f})", rate]
        cells.append(", ".join(f"{margin:+.3f}" for margin in found.margins))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--families", nargs="+", choices=tuple(PRETRAINING), default=list(PRETRAINING))
    add("--questions", default="asset:trec", help="labelled questions")
    add("--held-out", type=int, default=500, help="for validation, and as many to test on")
    add("--other-text", nargs="*", default=OTHER_TEXT, help="what else the models read before")
    add("--labelled", type=int, default=200, help="questions to fine-tune on")
    add("--copies", type=int, default=5, help="of each question in the text")
    add("--vocab-size", type=int, default=2000)
    add("--pretraining-steps", type=int, help="instead of each family's own")
    add("--steps", type=int, default=80, help="of each fine-tuning")
    add("--batch", type=int, default=32, help="questions of a step")
    add("--lrs", type=float, nargs="*", default=[], help="instead of each family's own")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning")
    add("--threads", type=int, default=1)
    add("--folder", type=Path, help="where the pre-trained models are kept, and found again")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args()


@contextmanager
def workplace(chosen: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the pre-trained models go, and where the fine-tuned ones do, which are not kept."""
    with tempfile.TemporaryDirectory(prefix="fulltune-pretraining-helps-") as temporary:
        place = Path(temporary)
        yield chosen or place / "pretraining", place / "fine-tuning"


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    steps = arguments.pretraining_steps
    plan = Plan(
        arguments.vocab_size, arguments.steps, arguments.batch, tuple(arguments.lrs),
        tuple(arguments.seeds), {"duration": f"{steps} steps"} if steps else {},
    )  # fmt: skip
    started = time.perf_counter()
    try:
        with workplace(arguments.folder) as (folder, fine_tuning):
            questions = write_questions(
                arguments.questions, folder / "questions", num_held_out=arguments.held_out,
                num_labelled=arguments.labelled, copies=arguments.copies,
                other_text=arguments.other_text,
            )  # fmt: skip
            # What is made of these questions goes with them; the assets were the user's own.
            os.environ["FULLTUNE_CACHE"] = str(fine_tuning / "cache")
            comparisons = [
                compare(family, plan, questions, folder, fine_tuning)
                for family in arguments.families
            ]
    except FulltuneError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(table(comparisons))
    print(
        f"{plan.steps} steps of {plan.batch}, {questions.num_questions[0]:,} labelled questions; "
        f"text of {questions.num_documents:,} documents, {questions.num_left_out} with a held-out "
        f"question left out; {seconds:.0f} s in all"
    )
    if arguments.json:
        written = {
            "machine": describe_machine(torch.device("cpu")),
            "versions": versions(),
            "commit": git_commit(Path(__file__).parent),
            "seconds": round(seconds, 1),
            "plan": asdict(plan),
            "num_questions": questions.num_questions,
            "num_documents": questions.num_documents,
            "num_left_out": questions.num_left_out,
            "comparisons": [{**asdict(found), "margins": found.margins} for found in comparisons],
        }
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(min(found.margins) > 0 for found in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
