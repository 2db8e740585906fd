"""Kill a training process at chosen moments, resume it, and compare what it leaves bit for bit.

    python benchmarks/kills.py --kills 200
    python benchmarks/kills.py --verb pretrain --kills 100 --kills-per-run 10

Trains a tiny model in child processes that save a checkpoint after every step: a Llama on
conversations, or new models of each objective of pre-training on a corpus made by `fulltune corpus`
(`kill_cases.py`). A child says over a pipe what it is about to do (read data, take a step,
evaluate, save, write the best, export, write the report, ...). The parent aims at one such moment,
waits a random part of the time it usually takes, kills the child with SIGKILL, and starts another
with `--resume`. When the run comes to its end, its weights, optimizer state, exported model, logged
steps and samples and the names of its files must be those of a run that was never disturbed. Each
kind of run in turn also stops early and takes its best weights. Prints a line a run, and a summary
as JSON.

A SIGKILL leaves the operating system's cache alone: this says nothing about a power failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
import transformers
from kill_cases import CACHED, OBJECTIVES, Case, fine_tuning, pre_training

from fulltune.recipes import finetune
from fulltune.tracking import read_metrics
from fulltune.train.checkpoint import find_damage, last_checkpoint

SAVING_THE_BEST = "saving the best"
"""What a save of the best weights is announced as."""
STARTING = "starting"
"""Everything before the first announcement."""
AT_THE_END = {
    "exporting", "replacing the model", "writing small files", "writing the report",
    "writing the manifest",
}  # fmt: skip
REPEATED = {"step", "evaluating", "saving", SAVING_THE_BEST, "hashing a save", "pruning"}


@dataclass
class Tally:
    """What happened over all runs."""

    runs: Counter[str] = field(default_factory=Counter)
    """Runs that came to their end, by case."""
    aimed: Counter[str] = field(default_factory=Counter)
    """Kills by the moment at which the child stood, as far as it had said so."""
    kills_in_unfinished_saves: int = 0
    """Kills that left a hidden, half-made checkpoint."""
    lost_checkpoints: int = 0
    faults: list[str] = field(default_factory=list)
    """Runs that did not end as the undisturbed one."""

    @property
    def kills(self) -> int:
        """All kills."""
        return self.aimed.total()


def main(arguments: list[str] | None = None) -> Tally:
    """Run until the wanted number of kills is reached and every run has finished."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=("finetune", "pretrain"), default="finetune")
    parser.add_argument("--model", type=Path, help="finetune: a small model; else one is made")
    parser.add_argument("--data", type=Path, help="finetune: conversations; else some are made")
    parser.add_argument(
        "--objectives", nargs="+", choices=tuple(OBJECTIVES), help="pretrain: else all of them"
    )
    options = parser.parse_args(arguments)
    of_the_other = ("objectives",) if options.verb == "finetune" else ("model", "data")
    for name in of_the_other:
        if getattr(options, name) is not None:
            parser.error(f"--{name} has no effect with --verb {options.verb}")
    torch.set_num_threads(1)  # a fork must not inherit threads
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        tally = Harness(Path(place), options).run()
    summary = {
        "verb": options.verb, "kills": tally.kills, "runs": tally.runs.total(),
        "runs_by_case": dict(tally.runs), "lost_checkpoints": tally.lost_checkpoints,
        "faults": tally.faults, "kills_in_unfinished_saves": tally.kills_in_unfinished_saves,
        "kills_by_moment": dict(sorted(tally.aimed.items())),
        "seconds": round(time.monotonic() - started, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip
    print(json.dumps(summary))
    return tally


class Harness:
    """One undisturbed run, then runs through kills that are compared with it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.chance = random.Random(options.seed)
        self.tally = Tally()
        self.log = folder / "log"
        self.seconds: dict[str, list[float]] = {}
        """How long each moment took in children that were not killed in it."""

    def run(self) -> Tally:
        """Kill and compare until there were enough kills."""
        os.environ["FULLTUNE_CACHE"] = str(self.folder / "cache")
        cases = self.make_cases()
        references = {}
        for case in cases:
            # The children start from a process that has imported and used everything.
            case.train(case.make_settings(self.folder / f"warm-{case.name}", True))
            for stops_early in (False, True):
                unbroken = self.folder / f"unbroken-{case.name}-{stops_early}"
                self.live(case, case.make_settings(unbroken, stops_early), aim=None)
                references[case.name, stops_early] = left_behind(unbroken)
                took_the_best = (unbroken / "model-last").is_dir()
                assert took_the_best == stops_early, f"{unbroken} does not end as it is meant to"
        while self.tally.kills < self.options.kills:
            round_number, number = divmod(self.tally.runs.total(), len(cases))
            case = cases[number]
            stops_early = (round_number + number) % 2 == 1
            self.compare(case, stops_early, references[case.name, stops_early])
        return self.tally

    def make_cases(self) -> list[Case]:
        """What is trained in turn."""
        if self.options.verb == "pretrain":
            return pre_training(self.folder, self.options.objectives or list(OBJECTIVES))
        return [fine_tuning(self.folder, self.options.model, self.options.data)]

    def compare(self, case: Case, stops_early: bool, expected: dict[str, Any]) -> None:
        """Train one run through kills, and see that it left what is expected."""
        start, before = time.monotonic(), self.tally.kills
        run_dir = self.folder / "run"
        self.torture(case, case.make_settings(run_dir, stops_early), num_steps=expected["step"])
        found = left_behind(run_dir)
        fault = "; ".join(
            f"{name} differs" for name in expected if not same(expected[name], found[name])
        )
        self.tally.runs[case.name] += 1
        number = self.tally.runs.total()
        if fault:
            self.tally.faults.append(f"run {number} ({case.name}): {fault}")
            shutil.copytree(run_dir, Path(tempfile.mkdtemp(prefix="fulltune-kills-")) / "run")
        shutil.rmtree(run_dir)
        print(
            f"run {number}, {case.name}: {self.tally.kills - before} kills, "
            f"{time.monotonic() - start:.1f} s, {fault or 'as the undisturbed run'}",
            file=sys.stderr,
            flush=True,
        )

    def torture(self, case: Case, config: finetune.Config, num_steps: int) -> None:
        """Train one run to its end through kills."""
        run_dir = Path(config.run_dir)
        everything = (STARTING, *case.moments, SAVING_THE_BEST)
        saved = 0
        kills = min(self.options.kills_per_run, self.options.kills - self.tally.kills)
        for number in range(kills):
            if saved == num_steps:  # only the end is left to disturb
                names = [name for name in everything if name not in REPEATED]
            else:  # not yet the end, or there would be nothing left to disturb
                late = number >= kills / 2
                passed = {"sampling"} if saved else {"restoring"}
                names = [name for name in everything if late or name not in AT_THE_END | passed]
            rarest = min(self.tally.aimed[name] for name in names)
            aim = self.chance.choice(
                [name for name in names if self.tally.aimed[name] <= rarest + 1]
            )
            if aim in CACHED:
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
            if not self.live(case, config, aim=aim):
                return  # the moment did not come any more
            folder = run_dir / "checkpoints"
            self.tally.kills_in_unfinished_saves += any(folder.glob(".*.tmp"))
            steps = [path for path in folder.glob("step-*") if path.is_dir()]
            whole = [path for path in steps if find_damage(path) is None]
            newest = max((int(path.name[5:]) for path in whole), default=0)
            self.tally.lost_checkpoints += len(steps) - len(whole) + (newest < saved)
            saved = max(saved, newest)
        self.live(case, config, aim=None)

    def live(self, case: Case, config: finetune.Config, *, aim: str | None) -> bool:
        """One life of a training process; whether it was killed."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            train(case, config, writer, self.log)
        os.close(writer)
        occurrence = self.chance.choice((1, 1, 1, 2)) if aim in REPEATED else 1
        deadline = float("inf")
        if aim == STARTING:
            deadline = time.monotonic() + self.delay(STARTING)
        open_moments: list[tuple[str, float]] = [(STARTING, time.monotonic())]
        while True:
            now = time.monotonic()
            ready, _, _ = select.select([reader], [], [], max(0.0, min(deadline - now, 300.0)))
            if not ready:
                assert deadline < float("inf"), "a child has said nothing for five minutes"
                break
            said = os.read(reader, 4096).decode()
            if not said:
                break
            now = time.monotonic()
            for line in said.splitlines():
                if len(open_moments) == 1 and open_moments[0][0] == STARTING:
                    self.seconds.setdefault(STARTING, []).append(now - open_moments[0][1])
                    open_moments.clear()
                if line == ".":
                    name, since = open_moments.pop()
                    self.seconds.setdefault(name, []).append(now - since)
                    continue
                open_moments.append((line, now))
                if line == aim:
                    occurrence -= 1
                    if occurrence == 0:
                        deadline = now + self.delay(aim)
        if deadline < float("inf"):
            os.kill(child, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            self.tally.aimed[open_moments[-1][0] if open_moments else "between"] += 1
            return True
        assert status == 0, self.log.read_text(encoding="utf-8")[-4000:]
        return False

    def delay(self, name: str) -> float:
        """A random part of the time that a moment usually takes."""
        usual = self.seconds.get(name, [0.01])[-20:]
        return self.chance.uniform(0, sorted(usual)[len(usual) // 2])


def train(case: Case, config: finetune.Config, writer: int, log: Path) -> None:
    """The life of a child: train, saying over the pipe where it stands."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name, (owner, attribute) in case.moments.items():
        setattr(owner, attribute, announced(getattr(owner, attribute), name, writer))
    code = 1
    try:
        case.train(config, resume=True)
        code = 0
    except BaseException:  # whatever it is belongs into the log: this process ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def announced(function: Callable[..., Any], name: str, writer: int) -> Callable[..., Any]:
    """The same function; says its name before, and a dot after."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        best = name == "saving" and args[1].startswith("best-")
        os.write(writer, f"{SAVING_THE_BEST if best else name}\n".encode())
        try:
            return function(*args, **kwargs)
        finally:
            os.write(writer, b".\n")

    return wrapped


def left_behind(run_dir: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on where it was killed."""
    checkpoint, problems = last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None, f"{run_dir} has no checkpoint"
    events = read_metrics(run_dir / "metrics.jsonl")
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    model, samples = run_dir / "model", run_dir / "samples.jsonl"
    return {
        "damage of checkpoints": problems,
        "step": checkpoint.step,
        "weights": checkpoint.tensors("weights"),
        "optimizer": checkpoint.tensors("optimizer"),
        "exported model": {
            path.name: path.read_bytes()
            for path in model.iterdir()
            if path.name not in ("README.md", "fulltune.json")  # name the run folder and the time
        },
        "logged steps": [
            (event["step"], event["loss"], event["grad_norm"], event["lr"], event["epoch"])
            for event in events
            if event["event"] == "step"
        ],
        "logged evaluations": [
            {**event, "time": None} for event in events if event["event"] == "evaluation"
        ],
        "logged samples and changes": [
            {**event, "time": None}
            for event in events
            if event["event"] in ("sample", "weight_change")
        ],
        "logged ends": [event["step"] for event in events if event["event"] == "end"],
        "samples": samples.read_text(encoding="utf-8") if samples.is_file() else None,
        "results": (manifest["finished"], manifest["results"], manifest["best_step"]),
        "data.json": (run_dir / "data.json").read_text(encoding="utf-8"),
        "end of the report": (run_dir / "report.html").read_text(encoding="utf-8")[-20:],
        "names of files": sorted(
            str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()
        ),
    }


def same(expected: Any, found: Any) -> bool:
    """Whether two values are equal; tensors bit for bit."""
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            same(value, found[name]) for name, value in expected.items()
        )
    if isinstance(expected, torch.Tensor):
        return expected.dtype == found.dtype and torch.equal(expected, found)
    return bool(expected == found)


if __name__ == "__main__":
    outcome = main()
    sys.exit(1 if outcome.lost_checkpoints or outcome.faults else 0)
