"""How quickly 10,000 rows are labelled: fulltune against transformers' own pipeline.

    python benchmarks/evaluate_speed.py
    python benchmarks/evaluate_speed.py --rounds 3 --json speed.json
    python benchmarks/evaluate_speed.py --model runs/trec-minilm/model --rows 2000

Fine-tunes MiniLM-L6 on the question classes of TREC for a few steps, unless a model is given. Then
each peer labels the same rows with it, in a process of its own and in turn, round after round:
TREC's questions and sentences of film reviews, none of them twice. The clock runs from texts in
memory to labels and probabilities in memory; loading is not in it. All labels are compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_finetune import GIB, HERE, describe_run, run_script, say
from rich.console import Console
from rich.table import Table

PEERS = ("fulltune", "fulltune-quick", "pipeline", "pipeline-batched")
DATA = ("asset:trec", "asset:movie-sentences")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model", help="a classifier's folder (default: MiniLM-L6, fine-tuned on TREC here)")
    add("--data", nargs="+", default=list(DATA), help="rows with a text: files or asset:NAME")
    add("--rows", type=int, default=10_000, help="rows that are labelled")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--rounds", type=int, default=1)
    add("--batch", type=int, default=32, help="rows of a batch of pipeline-batched")
    add("--steps", type=int, default=150, help="of the fine-tuning, 32 rows each")
    add("--threads", type=int, help="threads of every peer (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prepare model and rows, run the rounds, compare the labels, print and write the result."""
    options = parse_arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="fulltune-benchmark-"))
    try:
        result = run_benchmark(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_result(result)


def run_benchmark(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; the return value is what ``--json`` writes."""
    model = options.model or finetune(folder, options.steps)
    rows = folder / "texts.json"
    job = {"what": "rows", "data": options.data, "num_rows": options.rows, "rows": str(rows)}
    facts = run_script("evaluate_speed_peers", job, folder, options)
    runs: list[dict[str, Any]] = []
    labels: dict[str, list[str]] = {}
    for number in range(options.rounds):
        # Each round starts with another peer, so that none is always first after the pause.
        turn = number % len(options.peers)
        for peer in options.peers[turn:] + options.peers[:turn]:
            say(f"round {number + 1}/{options.rounds}: {peer}")
            job = {
                "what": peer, "model": str(model), "rows": str(rows), "batch": options.batch,
            }  # fmt: skip
            run = run_script("evaluate_speed_peers", job, folder, options)
            labels[peer] = run.pop("labels")
            runs.append({"peer": peer, "round": number, **run})
            say(f"    {len(labels[peer]) / run['seconds']:,.0f} rows/s")
    first = labels[options.peers[0]]
    return {
        **describe_run("evaluate_speed", options),
        "num_rows": facts["num_rows"],
        "mean_characters": facts["mean_characters"],
        "peers": {
            peer: {
                **summarize(peer, runs, options.peers),
                "labels_that_differ": sum(
                    mine != theirs for mine, theirs in zip(first, labels[peer], strict=True)
                ),
            }
            for peer in options.peers
        },
        "runs": runs,
    }


def finetune(folder: Path, steps: int) -> Path:
    """MiniLM-L6 on TREC by the settings of `configs/trec-minilm.yaml`, for a few steps."""
    say(f"fine-tuning MiniLM-L6 on TREC, {steps} steps")
    run = folder / "run"
    config = HERE.parent / "configs" / "trec-minilm.yaml"
    command = [
        sys.executable, "-m", "fulltune", "finetune", str(config), f"duration={steps} steps",
        "evaluate.every=100000 steps", "evaluate.stop_after=null", "save_every=100000 steps",
        f"run_dir={run}",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{ended.stderr[-3000:]}\nthe fine-tuning ended with {ended.returncode}")
    return run / "model"


def summarize(peer: str, runs: list[dict[str, Any]], others: list[str]) -> dict[str, Any]:
    """Medians over rounds; ratios to the others are taken inside a round."""
    own = [run for run in runs if run["peer"] == peer]

    def times_as_fast_as(other: str) -> float:
        theirs = {run["round"]: run for run in runs if run["peer"] == other}
        return statistics.median(theirs[run["round"]]["seconds"] / run["seconds"] for run in own)

    return {
        "seconds": statistics.median(run["seconds"] for run in own),
        "wall_seconds": statistics.median(run["wall_seconds"] for run in own),
        "peak_bytes": max(run["peak_bytes"] for run in own),
        "times_as_fast_as": {other: times_as_fast_as(other) for other in others},
    }


def print_result(result: dict[str, Any]) -> None:
    """The table, with all that is needed to judge it."""
    machine, settings, rows = result["machine"], result["settings"], result["num_rows"]
    baselines = [peer for peer in result["peers"] if peer.startswith("pipeline")]
    table = Table(title=f"{rows:,} rows, {result['mean_characters']:.0f} characters on the mean")
    names = [f"against {peer.removeprefix('pipeline-')}" for peer in baselines]
    for name in ("peer", "seconds", "rows/s", *names, "other labels", "peak GiB"):
        is_peer = name == "peer"
        table.add_column(name, justify="left" if is_peer else "right", no_wrap=is_peer)
    for peer, row in result["peers"].items():
        table.add_row(
            peer, f"{row['seconds']:.1f}", f"{rows / row['seconds']:,.0f}",
            *(f"{row['times_as_fast_as'][other]:.2f} x" for other in baselines),
            f"{row['labels_that_differ']:,}", f"{row['peak_bytes'] / GIB:.2f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}; commit "
        f"{result['commit']}; median of {settings['rounds']} round(s)",
        highlight=False,
    )


if __name__ == "__main__":
    main()
