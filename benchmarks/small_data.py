"""What steadies fine-tuning on little data? The published options, each against training as it is.

    python benchmarks/small_data.py
    python benchmarks/small_data.py --variants 0 3 --seeds 3 --json small.json

A few labelled questions of TREC fine-tune an encoder, with several seeds of its new head and of the
order of the examples; the accuracies are of 500 other questions, with the weights of the last step.
AdamW corrects the bias of its moments in all of them, as Zhang et al. (2021) and Mosbach et al.
(2021) ask. Each later row changes one thing against the row "longer".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from question_text import write_questions

from fulltune.config import build_config
from fulltune.errors import FulltuneError
from fulltune.models.sources import resolve_model
from fulltune.recipes import finetune, seeds
from fulltune.recipes.search_space import with_values
from fulltune.report.seeds_page import SeedsRecord
from fulltune.runtime import describe_machine, git_commit, versions

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("short: 3 epochs", {"duration": "3 epochs"}),
    ("longer: 10 epochs (Mosbach et al.: 20)", {}),
    ("longer, the top layer new (Zhang et al.)", {"reinitialize_layers": 1}),
    ("longer, the top 2 layers new", {"reinitialize_layers": 2}),
    ("longer, rates fall by 0.8 a layer", {"optimizer.layer_lr_decay": 0.8}),
    ("longer, the head at ten times the rate", {"optimizer.head_lr": 1e-3}),
)
"""Name -> settings that differ from `base`."""


@dataclass(frozen=True)
class Outcome:
    """One variant: the accuracy of each seed."""

    name: str
    settings: dict[str, Any]
    accuracies: list[float]
    mean: float
    deviation: float
    low: float
    high: float
    seconds: float


def base(model: str, train: Path, test: Path) -> dict[str, Any]:
    """The settings of all variants."""
    return {
        "model": model,
        "task": {"kind": "classification", "train": str(train), "validation": str(test)},
        "dropout": 0.1,
        "duration": "10 epochs",
        "batch": "16 examples",
        "num_workers": 0,
        "optimizer": {"lr": 1e-4, "warmup": "10%"},
        # The last weights are those that count, not the best of several looks at the answers.
        "evaluate": {"every": "1000 epochs", "metric": "accuracy"},
        "save_every": "1000 epochs",
        "keep_checkpoints": 1,
    }


def outcome_of(name: str, settings: dict[str, Any], record: SeedsRecord) -> Outcome:
    """What the seeds of a variant gave."""
    spread = record.spreads["accuracy"]
    return Outcome(
        name, settings, [run.metrics["accuracy"] for run in record.runs], spread.mean,
        spread.deviation, spread.low, spread.high, sum(run.seconds for run in record.runs),
    )  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """One row a variant, in Markdown."""
    lines = [
        "| training | accuracy | standard deviation | lowest | highest | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in outcomes:
        lines.append(
            f"| {each.name} | {each.mean:.3f} | {each.deviation:.3f} | {each.low:.3f} | "
            f"{each.high:.3f} | {each.seconds:.0f} |"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model", default="asset:all-minilm-l6-v2")
    add("--questions", default="asset:trec", help="labelled questions")
    add("--held-out", type=int, default=500)
    add("--labelled", type=int, default=200, help="questions to fine-tune on")
    add("--variants", type=int, nargs="+", default=list(range(len(VARIANTS))), help="rows, from 0")
    add("--seeds", type=int, default=5, help="how many")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    outcomes = []
    try:
        with tempfile.TemporaryDirectory(prefix="fulltune-small-data-") as temporary:
            folder = Path(temporary)
            questions = write_questions(
                arguments.questions, folder / "questions", num_held_out=arguments.held_out,
                num_labelled=arguments.labelled, other_text=(),
            )  # fmt: skip
            model = str(resolve_model(arguments.model))
            # What is made of these questions goes with them; the assets were the user's own.
            os.environ["FULLTUNE_CACHE"] = str(folder / "cache")
            for number in arguments.variants:
                name, settings = VARIANTS[number]
                values = with_values(base(model, questions.train, questions.test), settings)
                values["run_dir"] = str(folder / f"runs-{number}")
                record, interrupted = seeds.run(
                    build_config(finetune.Config, values), arguments.seeds
                )
                if interrupted:
                    return 130
                outcomes.append(outcome_of(name, settings, record))
                print(table(outcomes[-1:]).splitlines()[-1], file=sys.stderr)
    except FulltuneError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(table(outcomes))
    print(
        f"{arguments.labelled} labelled questions, {arguments.seeds} seeds; {seconds:.0f} s in all"
    )
    if arguments.json:
        written = {
            "machine": describe_machine(torch.device("cpu")),
            "versions": versions(),
            "commit": git_commit(Path(__file__).parent),
            "seconds": round(seconds, 1),
            "outcomes": [asdict(each) for each in outcomes],
        }
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
