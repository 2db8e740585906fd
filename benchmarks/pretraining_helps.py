"""Does pre-training help? A classifier from pre-trained weights against one from new weights.

    python benchmarks/pretraining_helps.py runs/pretrain-bert runs/pretrain-xlnet runs/pretrain-t5

For each run of `fulltune pretrain` the same architecture is fine-tuned on the questions of TREC
from two starts: the run's model, and new weights as its pre-training began with. Everything else is
the same: tokenizer, examples and their order, steps, new head, optimizer. Each seed has its own
held-out questions, order, head, and new weights. Both starts are tried with the same learning
rates, and each is reported with the one that is better for it on average.

Shakespeare holds no question of TREC. Of a run that has read TREC itself the benchmark says so,
since its text then may hold the questions that are held out here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fulltune.config import build_config, read_yaml
from fulltune.errors import ConfigError, FulltuneError
from fulltune.recipes import finetune, pretrain
from fulltune.train.run_folder import CONFIG

STARTS = ("pre-trained", "new")


@dataclass(frozen=True)
class Outcome:
    """The held-out accuracies of one start with one learning rate, one for each seed."""

    run: str
    start: str
    lr: float
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The largest less the smallest."""
        return max(self.accuracies) - min(self.accuracies)


@dataclass(frozen=True)
class Comparison:
    """Both starts of one run, each with its better learning rate."""

    run: str
    model: str
    pretrained: Outcome
    new: Outcome
    all: list[Outcome]

    @property
    def margins(self) -> list[float]:
        """What pre-training adds to the accuracy, seed by seed."""
        pairs = zip(self.pretrained.accuracies, self.new.accuracies, strict=True)
        return [before - without for before, without in pairs]


@dataclass(frozen=True)
class Plan:
    """What both starts have in common."""

    train: str
    validation: str
    steps: int
    batch: int
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]


def open_config(folder: Path) -> pretrain.Config:
    """The settings of a run that began with new weights.

    Raises:
        ConfigError: the folder is none.
    """
    values = read_yaml(folder / CONFIG)
    if "objective" not in values or not (folder / "model").is_dir():
        raise ConfigError(
            f"`{folder}` is no finished run of pre-training",
            hint="name a run of `fulltune pretrain`",
        )
    config = build_config(pretrain.Config, values)
    if config.tokenizer is None:
        raise ConfigError(
            f"the run in `{folder}` went on with `{config.model}`, so its start was not new",
            hint="name a run that began with a size",
        )
    return config


def new_start(config: pretrain.Config, tokenizer: Path, seed: int) -> Path:
    """A folder with weights as the run's pre-training began with, but of another seed."""
    update = {"seed": seed, "tokenizer": str(tokenizer)}
    base, _ = pretrain.open_start(config.model_copy(update=update))
    return base.path


def accuracy(start: Path, folder: Path, plan: Plan, lr: float, seed: int) -> float:
    """Held-out accuracy after the last step."""
    config = build_config(
        finetune.Config,
        {
            "model": str(start),
            "task": {
                "kind": "classification", "train": plan.train, "validation": plan.validation,
                "deduplicate": True, "max_length": 64, "too_long": "truncate",
            },
            "duration": f"{plan.steps} steps",
            "batch": f"{plan.batch} examples",
            "precision": "fp32",
            "optimizer": {"lr": lr, "warmup": "10%"},
            # The last weights are those that count, not the best of several looks at the answers.
            "evaluate": {"every": f"{plan.steps} steps", "metric": "accuracy"},
            "save_every": f"{plan.steps} steps",
            "keep_checkpoints": 1,
            "seed": seed,
            "run_dir": str(folder),
        },
    )  # fmt: skip
    return finetune.run(config).metrics["accuracy"]


def compare(run: str, plan: Plan, folder: Path) -> Comparison:
    """Fine-tune both starts of a run with every learning rate and seed.

    Raises:
        ConfigError: the folder is no finished run of a new model.
    """
    source = Path(run)
    config = open_config(source)
    outcomes: list[Outcome] = []
    for lr in plan.lrs:
        found: dict[str, list[float]] = {start: [] for start in STARTS}
        for seed in plan.seeds:
            paths = (source / "model", new_start(config, source / "model", seed))
            for start, path in zip(STARTS, paths, strict=True):
                place = folder / f"{source.name}-{start}-{lr}-{seed}"
                found[start].append(accuracy(path, place, plan, lr, seed))
        outcomes += [Outcome(run, start, lr, values) for start, values in found.items()]
    best = {
        start: max((each for each in outcomes if each.start == start), key=lambda each: each.mean)
        for start in STARTS
    }
    return Comparison(run, config.model, best["pre-trained"], best["new"], outcomes)


def warnings_of(run: str, plan: Plan) -> list[str]:
    """What a reader must know of the text that a run was trained on."""
    task = open_config(Path(run)).task
    sources = (task.train,) if isinstance(task.train, str) else tuple(task.train)
    if plan.train not in sources:
        return []
    return [f"{run} was pre-trained on `{plan.train}`: it may have read questions held out here"]


COLUMNS = ("run", "model", "pre-trained", "rate", "new", "rate", "margin of each seed")


def table(comparisons: Sequence[Comparison]) -> str:
    """One row a run, in Markdown: means, and the spread of the seeds."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for found in comparisons:
        cells = [found.run, found.model]
        for outcome in (found.pretrained, found.new):
            cells += [f"{outcome.mean:.3f} (spread {outcome.spread:.3f})", f"{outcome.lr:g}"]
        cells.append(", ".join(f"{margin:+.3f}" for margin in found.margins))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs of `fulltune pretrain`")
    parser.add_argument("--train", default="asset:trec", help="labelled texts")
    parser.add_argument("--validation", default="500 examples", help="how many are held out")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    plan = Plan(
        arguments.train, arguments.validation, arguments.steps, arguments.batch,
        tuple(arguments.lrs), tuple(arguments.seeds),
    )  # fmt: skip
    started = time.perf_counter()
    try:
        notes = [note for run in arguments.runs for note in warnings_of(run, plan)]
        with tempfile.TemporaryDirectory() as folder:
            comparisons = [compare(run, plan, Path(folder)) for run in arguments.runs]
    except FulltuneError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    print(table(comparisons))
    print(f"{plan.steps} steps of {plan.batch}, {time.perf_counter() - started:.0f} s in all")
    for note in notes:
        print(f"note: {note}")
    if arguments.json:
        rows = [{**asdict(found), "margins": found.margins} for found in comparisons]
        written = {"plan": asdict(plan), "notes": notes, "comparisons": rows}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0 if all(min(found.margins) > 0 for found in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
