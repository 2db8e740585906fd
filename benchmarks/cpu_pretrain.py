"""Pre-training on a CPU, paired: `fulltune pretrain` against transformers' own examples.

    python benchmarks/cpu_pretrain.py
    python benchmarks/cpu_pretrain.py --objectives mlm --rounds 1 --json mlm.json

Next tokens in joined blocks (`clm`, as run_clm.py) and masked tokens in documents of ragged length
(`mlm`, as run_mlm.py), each from a new model and a tokenizer trained here. Every run is a process
of its own; peers run in turn, round after round, and ratios are taken inside a round. How each
figure is made stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_finetune import (
    BASELINE,
    GIB,
    check_counts,
    describe_run,
    parse_with_shared_options,
    rates_of,
    run_child,
    run_script,
    run_verb,
    say,
)
from rich.console import Console
from rich.table import Table

PEERS = ("fulltune", "hf-bf16", "hf-fp32")
FAMILIES = {"clm": "gpt", "mlm": "bert"}
HEADS = {"clm": "causal", "mlm": "masked"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--objectives", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    add("--peers", nargs="+", choices=PEERS, default=["fulltune", BASELINE])
    add("--data", default="asset:shakespeare", help="plain text: a path or asset:NAME")
    add("--documents", type=int, default=10_000, help="paragraphs read, beside the held-out ones")
    add("--held-out", type=int, default=200, help="held-out paragraphs")
    add("--vocab-size", type=int, default=8000)
    add("--clm-model", default="gpt2-small", help="a size of `fulltune models`")
    add("--mlm-model", default="bert-mini", help="a size of `fulltune models`")
    add("--length", type=int, help="tokens of a block (default 1024); longest of mlm (256)")
    add("--blocks", type=int, default=2, help="clm: blocks of a step")
    add("--rows", type=int, default=64, help="mlm: documents of a step")
    add("--rounds", type=int, default=3, help="rounds; each takes the next seed")
    return parse_with_shared_options(parser, argv, skip=3, lr=1e-3, warmup=4)


def main(argv: list[str] | None = None) -> None:
    """Run every objective, print the tables and write the result."""
    options = parse_arguments(argv)
    objectives = {}
    for objective in options.objectives:
        folder = Path(tempfile.mkdtemp(prefix="fulltune-benchmark-"))
        try:
            objectives[objective] = run_objective(objective, folder, options)
        finally:
            shutil.rmtree(folder)
    result = {
        **describe_run("cpu_pretrain", options),
        "objectives": objectives,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_result(result)


def run_objective(objective: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Text, tokenizer, and the rounds of one objective."""
    say(f"{objective}: text and tokenizer of {options.data}")
    job = {
        "what": "split",
        "objective": objective,
        "data": options.data,
        "folder": str(folder),
        "num_documents": options.documents,
        "num_held_out": options.held_out,
        "model": getattr(options, f"{objective}_model"),
        "length": length_of(objective, options),
        "batch": batch_of(objective, options),
        "steps": options.steps,
    }
    run_script("pretrain_rows", job, folder, options)
    command = [sys.executable, "-m", "fulltune", "tokenizer", "train"]
    command += [str(folder / "documents.jsonl"), "--family", FAMILIES[objective]]
    command += ["--vocab-size", str(options.vocab_size), "--output", str(folder / "tokenizer")]
    run_child(command, folder / "tokenizer.log", folder, options)
    run_script("pretrain_rows", {**job, "what": "encode"}, folder, options)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    imports = {
        peer: run_script("peers", {"peer": peer, "imports_only": True}, folder, options)
        for peer in options.peers
    }
    runs = []
    for round_index in range(options.rounds):
        # Each round starts with another peer, so that none is always first after the pause.
        turn = round_index % len(options.peers)
        for peer in options.peers[turn:] + options.peers[:turn]:
            say(f"{objective}, round {round_index + 1}/{options.rounds}: {peer}")
            run = run_peer(peer, objective, round_index, folder, options)
            run |= {"round": round_index, "imports_bytes": imports[peer]["peak_bytes"]}
            # The same text for all: only which tokens are masked is each peer's own draw.
            check_counts(run, {**facts, "num_targets": run["num_targets"]})
            runs.append(run)
            say(
                f"    {run['tokens_per_second']:.0f} tokens/s, {run['peak_bytes'] / GIB:.2f} GiB, "
                f"held-out loss {run['held_out_loss']:.4f}"
            )
    peers = {peer: summarize(peer, runs) for peer in options.peers}
    return {"model": job["model"], "data": facts, "peers": peers, "runs": runs}


def batch_of(objective: str, options: argparse.Namespace) -> int:
    """Examples of a step."""
    batch: int = options.blocks if objective == "clm" else options.rows
    return batch


def length_of(objective: str, options: argparse.Namespace) -> int:
    """Tokens of a block, which is run_clm.py's own choice for GPT-2, or of the longest document."""
    length: int = options.length or {"clm": 1024, "mlm": 256}[objective]
    return length


def run_peer(
    peer: str, objective: str, seed: int, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once in a process of its own; the saved model is judged in another and deleted."""
    if peer == "fulltune":
        child, model = run_fulltune(objective, seed, folder, options)
    else:
        model = folder / "model"
        shared = ("steps", "lr", "betas", "weight_decay", "warmup", "clip_norm")
        job = {
            "peer": peer,
            "objective": objective,
            "config": str(folder / "config"),
            "rows": str(folder / "train.jsonl"),
            "model_out": str(model),
            "seed": seed,
            "batch": batch_of(objective, options),
            "length": length_of(objective, options),
            **{key: getattr(options, key) for key in shared},
        }
        child = run_script("pretrain_peers", job, folder, options)
    judged = {
        "what": "loss",
        "head": HEADS[objective],
        "model": str(model),
        "rows": str(folder / "held_out.jsonl"),
    }
    loss = run_script("measure", judged, folder, options)["loss"]
    shutil.rmtree(model)
    return {
        "peer": peer,
        "seed": seed,
        "held_out_loss": loss,
        **{key: child[key] for key in ("peak_bytes", "wall_seconds", "cpu_seconds", "steps")},
        **rates_of(child["steps"], options.skip),
    }


def run_fulltune(
    objective: str, seed: int, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], Path]:
    """Pre-train; see `run_verb`."""
    task = {"kind": "text", "train": str(folder / "train_documents.jsonl"), "validation": None}
    windows: dict[str, Any] = {"length": length_of(objective, options)}
    if objective == "clm":
        windows["stream"] = True
    settings = {
        "model": getattr(options, f"{objective}_model"),
        "tokenizer": str(folder / "tokenizer"),
        "task": task,
        "objective": windows,
        "batch": f"{batch_of(objective, options)} examples",
    }
    return run_verb("pretrain", settings, seed, folder, options)


def summarize(peer: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and ratios to the baseline of the same round."""
    own = [run for run in runs if run["peer"] == peer]
    baseline = {run["round"]: run for run in runs if run["peer"] == BASELINE}

    def ratios(key: str) -> list[float]:
        pairs = [(run[key], baseline[run["round"]][key]) for run in own if baseline]
        return [mine / theirs for mine, theirs in pairs]

    speed, memory = ratios("tokens_per_second"), ratios("peak_bytes")
    losses = [run["held_out_loss"] for run in own]
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in own),
        "peak_bytes": max(run["peak_bytes"] for run in own),
        "imports_bytes": own[0]["imports_bytes"],
        "num_tokens": own[0]["num_tokens"],
        "held_out_loss_mean": statistics.mean(losses),
        "held_out_loss_spread": max(losses) - min(losses),
        "speed_ratio": statistics.median(speed) if speed else None,
        "speed_ratio_of_each_round": speed,
        "memory_ratio": statistics.median(memory) if memory else None,
    }


def print_result(result: dict[str, Any]) -> None:
    """A table for each objective, with all that is needed to judge it."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    settings, machine = result["settings"], result["machine"]
    for objective, measured in result["objectives"].items():
        data = measured["data"]
        table = Table(title=f"{objective}, a new {measured['model']}")
        for name in (
            "peer", "tokens/s", "peak GiB", "above imports", "held-out loss", "spread", "speed",
            "of each round", "memory",
        ):  # fmt: skip
            table.add_column(name, justify="left" if name == "peer" else "right")
        for peer, row in measured["peers"].items():
            table.add_row(
                peer,
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak_bytes'] / GIB:.2f}",
                f"{(row['peak_bytes'] - row['imports_bytes']) / GIB:.2f}",
                f"{row['held_out_loss_mean']:.4f}",
                f"{row['held_out_loss_spread']:.4f}",
                "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f} x",
                " ".join(f"{ratio:.2f}" for ratio in row["speed_ratio_of_each_round"]) or "-",
                "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f} x",
            )
        console.print(table)
        console.print(
            f"every peer: {settings['steps']} steps of {data['num_tokens'] / settings['steps']:.0f}"
            f" tokens ({data['num_documents']} documents; examples of {data['mean_tokens']:.0f} "
            f"tokens, longest {data['longest_tokens']}), vocabulary {data['vocabulary']}; "
            f"{data['num_held_out_targets']:,} targets held out",
            highlight=False,
        )
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}; commit "
        f"{result['commit']}; speed and memory against {BASELINE}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
