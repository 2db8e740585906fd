"""Full fine-tuning on a CPU, paired: fulltune against Trainer, SFTTrainer and a plain loop.

    python benchmarks/cpu_finetune.py
    python benchmarks/cpu_finetune.py --kind text --data asset:shakespeare --json text.json
    python benchmarks/cpu_finetune.py --peers fulltune hf-bf16 --seeds 0

Every run is a process of its own. Peers run in turn, round after round, so that a busy machine
slows all of them alike; ratios are taken inside a round and the median over rounds is shown. All
peers get the same rows in the same order, the same targets, optimizer, clipping and warmup. How
each figure is made stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PEERS = (
    "fulltune",
    "hf-bf16",
    "hf-fp32",
    "hf-bf16-weights",
    "trl",
    "trl-padding-free",
    "trl-packed",
    "hand",
)
BASELINE = "hf-bf16"
USUAL = ("fulltune", "hf-bf16", "trl", "trl-packed")
DATA = {"chat": "asset:alpaca-en", "text": "asset:shakespeare"}
GIB = 1024**3


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options; every one has a default, so that no option is needed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--kind", choices=("chat", "text"), default="chat", help="what the rows are")
    add("--model", default="asset:smollm2-135m-instruct", help="a folder or asset:NAME")
    add("--data", help="JSON or JSONL (chat), plain text (text), or asset:NAME")
    add(
        "--peers", nargs="+", choices=PEERS, default=list(USUAL), metavar="PEER",
        help=f"of: {', '.join(PEERS)} (default: {' '.join(USUAL)})",
    )  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="orders of the data")
    add("--rounds", type=int, help="rounds; each takes the next seed (default: one per seed)")
    add("--batch", type=int, default=8, help="rows per optimizer step")
    add("--held-out", type=int, default=64, help="held-out rows")
    add("--max-length", type=int, default=1024, help="longer rows are left out for every peer")
    add("--keep", type=Path, metavar="FOLDER", help="keep rows and logs there")
    options = parse_with_shared_options(parser, argv, skip=2, lr=2e-5, warmup=3)
    options.rounds = options.rounds or len(options.seeds)
    options.data = options.data or DATA[options.kind]
    return options


def parse_with_shared_options(
    parser: argparse.ArgumentParser, argv: list[str] | None, *, skip: int, lr: float, warmup: int
) -> argparse.Namespace:
    """The options of a parser, and those of every paired benchmark; the defaults given differ."""
    add = parser.add_argument
    add("--steps", type=int, default=12, help="optimizer steps of a run")
    add("--skip", type=int, default=skip, help="first steps left out of the timing")
    add("--lr", type=float, default=lr)
    add("--betas", nargs=2, type=float, default=[0.9, 0.999])
    add("--weight-decay", type=float, default=0.0, help="as in the other trainers by default")
    add("--warmup", type=int, default=warmup, help="steps")
    add("--clip-norm", type=float, default=1.0)
    add("--threads", type=int, help="threads of every peer (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(argv)
    if options.skip >= options.steps:
        parser.error(f"--skip {options.skip} leaves nothing of --steps {options.steps}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Prepare the rows, run the rounds, judge the models, print and write the result."""
    options = parse_arguments(argv)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fulltune-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run_benchmark(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_result(result)


def run_benchmark(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; the return value is what ``--json`` writes."""
    say(f"rows of {options.data}")
    job = {
        "model": options.model,
        "data": options.data,
        "kind": options.kind,
        "folder": str(folder),
        "num_held_out": options.held_out,
        "max_length": options.max_length,
        "steps": options.steps,
        "batch": options.batch,
        "seeds": options.seeds,
    }
    run_script("rows", job, folder, options)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    model = facts.pop("model_folder")
    steps_of_seed = {int(seed): steps for seed, steps in facts.pop("steps_of_seed").items()}
    imports = {}
    for peer in options.peers:
        child = run_script("peers", {"peer": peer, "imports_only": True}, folder, options)
        imports[peer] = child["peak_bytes"]
    before = judge(model, folder, options)
    runs: list[dict[str, Any]] = []
    rates = []
    for round_index in range(options.rounds):
        rates.append(run_script("measure", {"what": "rate"}, folder, options)["bf16_flops"])
        seed = options.seeds[round_index % len(options.seeds)]
        # Each round starts with another peer, so that none is always first after the pause.
        turn = round_index % len(options.peers)
        for peer in options.peers[turn:] + options.peers[:turn]:
            say(f"round {round_index + 1}/{options.rounds}, seed {seed}: {peer}")
            run = run_peer(peer, model, steps_of_seed[seed], seed, folder, options)
            check_counts(run, facts)
            run |= {"round": round_index, "imports_bytes": imports[peer]}
            runs.append(run)
            with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")  # what is measured stays, whatever comes next
            say(
                f"    {run['tokens_per_second']:.0f} tokens/s, {run['peak_bytes'] / GIB:.2f} GiB, "
                f"held-out loss {run['held_out_loss']:.4f}"
            )
    rate = max(rates)
    for run in runs:
        flops = 6 * (
            facts["num_body_parameters"] * run["tokens_per_second"]
            + facts["num_head_parameters"] * run["targets_per_second"]
        )
        run["matmul_share"] = flops / rate
    return {
        **describe_run("cpu_finetune", options),
        "data": facts,
        "bf16_flops": rate,
        "bf16_flops_of_each_round": rates,
        "held_out_loss_before": before["held_out_loss"],
        "peers": {peer: summarize(peer, runs) for peer in options.peers},
        "runs": runs,
    }


def run_peer(
    peer: str,
    model: str,
    rows_of_steps: list[list[int]],
    seed: int,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train once in a process of its own; the saved model is judged in another and deleted."""
    if peer == "fulltune":
        child, model_out = run_fulltune(model, seed, folder, options)
    else:
        model_out = folder / "model"
        job = {
            "peer": peer,
            "model": model,
            "rows": str(folder / "train.jsonl"),
            "rows_of_steps": rows_of_steps,
            "model_out": str(model_out),
            "seed": seed,
            **{
                key: getattr(options, key)
                for key in ("steps", "batch", "lr", "betas", "weight_decay", "warmup", "clip_norm")
            },
        }
        child = run_script("peers", job, folder, options)
    run = {
        "peer": peer,
        "seed": seed,
        **judge(str(model_out), folder, options),
        "peak_bytes": child["peak_bytes"],
        "wall_seconds": child["wall_seconds"],
        "cpu_seconds": child["cpu_seconds"],
        **rates_of(child["steps"], options.skip),
        "steps": child["steps"],
    }
    shutil.rmtree(model_out)
    return run


def run_fulltune(
    model: str, seed: int, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], Path]:
    """Fine-tune; see `run_verb`."""
    task = {"kind": options.kind, "train": str(folder / "records.jsonl"), "validation": None}
    settings = {"model": model, "task": task, "batch": f"{options.batch} examples"}
    return run_verb("finetune", settings, seed, folder, options)


def run_verb(
    verb: str, settings: dict[str, Any], seed: int, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], Path]:
    """Train by the public command, with its defaults for all that the peers do not share."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    config = {
        **settings,
        "duration": f"{options.steps} steps",
        "optimizer": {
            "lr": options.lr,
            "betas": options.betas,
            "weight_decay": options.weight_decay,
            "schedule": "constant",
            "warmup": f"{options.warmup} steps",
            "clip_norm": options.clip_norm,
        },
        "run_dir": str(run_dir),
        "seed": seed,
    }
    config_file = folder / "fulltune.yaml"
    config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "fulltune", verb, str(config_file)]
    # Its own cache, so that the first round tokenizes the rows, and makes a new model, as a first
    # run does.
    cache = {"FULLTUNE_CACHE": str(folder / "cache")}
    child = run_child(command, folder / "fulltune.log", folder, options, cache)
    return child | {"steps": steps_of_log(run_dir / "metrics.jsonl")}, run_dir / "model"


def steps_of_log(log: Path) -> list[dict[str, float]]:
    """The steps in a run's metrics, from one step's end to the next: data and log included.

    That is how the clock of the other peers runs.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    last = next(event["time"] for event in events if event["event"] == "start")
    steps = []
    for event in events:
        if event["event"] == "step":
            steps.append(
                {
                    "seconds": event["time"] - last,
                    "tokens": event["num_tokens"],
                    "targets": event["num_targets"],
                    "loss": event["loss"],
                }
            )
            last = event["time"]
    return steps


def check_counts(run: dict[str, Any], facts: dict[str, Any]) -> None:
    """Stop where a peer saw other tokens or targets than were prepared: nothing would compare."""
    for key in ("num_tokens", "num_targets"):
        if run[key] != facts[key]:
            given = f"{facts[key]} {key.removeprefix('num_')}"
            sys.exit(f"{run['peer']} trained on {run[key]} where the rows hold {given}")


def rates_of(steps: list[dict[str, float]], skip: int) -> dict[str, float]:
    """Rates of the steady state, and totals of the whole run.

    What all steps trained over what all took: a padded step takes up to four times as long for a
    token as the next, so the median of a few steps is not the rate of a run.
    """
    steady = steps[skip:]
    seconds = sum(step["seconds"] for step in steady)
    return {
        "tokens_per_second": sum(step["tokens"] for step in steady) / seconds,
        "targets_per_second": sum(step["targets"] for step in steady) / seconds,
        "num_steps": len(steps),
        "num_tokens": sum(s["tokens"] for s in steps),
        "num_targets": sum(s["targets"] for s in steps),
    }


def judge(model: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Held-out loss of a model folder, by the same few lines for every peer."""
    job = {"what": "loss", "model": model, "rows": str(folder / "held_out.jsonl")}
    measured = run_script("measure", job, folder, options)
    return {
        "held_out_loss": measured["loss"],
        "held_out_loss_in_bf16": measured["loss_bf16"],
    }


def run_script(
    script: str, job: dict[str, Any], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one of the scripts beside this file on a job and read its result."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    command = [sys.executable, str(HERE / f"{script}.py"), str(job_file)]
    measured = run_child(command, folder / f"{script}.log", folder, options)
    if result.exists():
        measured |= json.loads(result.read_text(encoding="utf-8"))
    return measured


def run_child(
    command: list[str],
    log: Path,
    folder: Path,
    options: argparse.Namespace,
    variables: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a process to its end; its seconds and its peak memory as the kernel counted it.

    This process stays small and imports no torch: what the kernel counts as a child's peak starts
    at the size of the process that started it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(variables or {}),
    }
    if options.threads:
        environment |= {"OMP_NUM_THREADS": str(options.threads)}
    start = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"{tail}\n`{' '.join(command)}` ended with {child.returncode}")
    return {
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def summarize(peer: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, losses over seeds, ratios to the baseline of the same round."""
    own = [run for run in runs if run["peer"] == peer]
    baseline = {run["round"]: run for run in runs if run["peer"] == BASELINE}
    by_seed = {run["seed"]: run for run in own}.values()
    losses = [run["held_out_loss"] for run in by_seed]

    def median(key: str) -> float:
        return statistics.median(run[key] for run in own)

    def ratio(key: str) -> float | None:
        pairs = [(run[key], baseline[run["round"]][key]) for run in own if run["round"] in baseline]
        return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None

    return {
        "tokens_per_second": median("tokens_per_second"),
        "tokens_per_second_of_each_round": [run["tokens_per_second"] for run in own],
        "targets_per_second": median("targets_per_second"),
        "matmul_share": median("matmul_share"),
        "peak_bytes": max(run["peak_bytes"] for run in own),
        "imports_bytes": own[0]["imports_bytes"],
        "num_tokens": own[0]["num_tokens"],
        "num_targets": own[0]["num_targets"],
        "held_out_loss_mean": statistics.mean(losses),
        "held_out_loss_spread": max(losses) - min(losses),
        "held_out_loss_of_each_seed": losses,
        "held_out_loss_in_bf16_mean": statistics.mean(
            run["held_out_loss_in_bf16"] for run in by_seed
        ),
        "speed_ratio": ratio("tokens_per_second"),
        "memory_ratio": ratio("peak_bytes"),
    }


def print_result(result: dict[str, Any]) -> None:
    """The table, with all that is needed to judge it."""
    data, machine = result["data"], result["machine"]
    table = Table(title=f"{result['settings']['kind']} rows, {result['settings']['model']}")
    for name in (
        "peer", "tokens/s", "targets/s", "peak GiB", "above imports", "held-out loss", "spread",
        "loss in bf16", "bf16 rate used", "speed", "memory",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "peer" else "right")
    for peer, row in result["peers"].items():
        table.add_row(
            peer,
            f"{row['tokens_per_second']:.0f}",
            f"{row['targets_per_second']:.0f}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{(row['peak_bytes'] - row['imports_bytes']) / GIB:.2f}",
            f"{row['held_out_loss_mean']:.4f}",
            f"{row['held_out_loss_spread']:.4f}",
            f"{row['held_out_loss_in_bf16_mean']:.4f}",
            f"{row['matmul_share']:.0%}",
            "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f} x",
            "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f} x",
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}; "
        f"bf16 products {result['bf16_flops'] / 1e9:,.0f} GFLOP/s; commit {result['commit']}\n"
        f"every peer: {data['num_train_rows']} rows, {data['num_tokens']:,} tokens (mean "
        f"{data['mean_tokens']:.0f}, longest {data['longest_tokens']}), {data['num_targets']:,} "
        f"targets; {data['num_held_out_targets']:,} held out, loss before "
        f"{result['held_out_loss_before']:.4f}; speed and memory against {BASELINE}",
        highlight=False,
    )


def describe_run(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was run, where, on which versions and when."""
    return {
        "command": ["python", f"benchmarks/{script}.py", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": versions(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "keep")},
    }


def describe_machine() -> dict[str, Any]:
    """The processor, how much of it is free, and how busy it was."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of everything whose speed is compared."""
    names = ("fulltune", "torch", "transformers", "trl", "accelerate", "datasets")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the repository, `+` appended when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def say(message: str) -> None:
    """Progress goes to stderr; the table is the only thing on stdout."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
