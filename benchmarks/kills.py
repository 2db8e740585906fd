"""Kill a training process at chosen moments, resume it, and compare what it leaves bit for bit.

    python benchmarks/kills.py --kills 200

Trains a tiny Llama on conversations in child processes that save a checkpoint after every step. A
child says over a pipe what it is about to do (read data, take a step, evaluate, save, write the
best, export, write the report, ...). The parent aims at one such moment, waits a random part of the
time it usually takes, kills the child with SIGKILL, and starts another with `--resume`. When the
run comes to its end, its weights, optimizer state, exported model, logged steps and samples and the
names of its files must be those of a run that was never disturbed. Every second run stops early and
takes its best weights. Prints a line a run, and a summary as JSON.

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fulltune.config import build_config
from fulltune.recipes import finetune, finish, resume, trainer
from fulltune.tracking import read_metrics
from fulltune.train import checkpoint as checkpoints
from fulltune.train.checkpoint import find_damage, last_checkpoint

MOMENTS: dict[str, tuple[Any, str]] = {
    "reading data": (finetune, "prepare"),
    "beginning": (finetune, "create_run_folder"),
    "restoring": (resume, "last_checkpoint"),
    "opening the log": (trainer, "Tracker"),
    "sampling": (trainer, "sample_answers"),
    "step": (trainer, "train_step"),
    "evaluating": (trainer, "evaluate_model"),
    "saving": (resume, "save_checkpoint"),
    "hashing a save": (checkpoints, "_flushed_sha256"),
    "pruning": (finish, "prune_checkpoints"),
    "exporting": (finish, "save_model"),
    "replacing the model": (finish, "replace_folder"),
    "writing small files": (finish, "write_atomically"),
    "writing the report": (finish, "write_report"),
    "writing the manifest": (finish, "write_manifest"),
}
"""What a child announces, and the function in which it is done. A save of the best weights is
called `saving the best`; `starting` is everything before the first announcement."""
AT_THE_END = {
    "exporting", "replacing the model", "writing small files", "writing the report",
    "writing the manifest",
}  # fmt: skip
REPEATED = {"step", "evaluating", "saving", "saving the best", "hashing a save", "pruning"}
NAMES = ("starting", *MOMENTS, "saving the best")


@dataclass
class Tally:
    """What happened over all runs."""

    runs: int = 0
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
    parser.add_argument("--model", type=Path, help="a small model folder; without it, one is made")
    parser.add_argument("--data", type=Path, help="conversations, JSONL; without it, some are made")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork must not inherit threads
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        tally = Harness(Path(place), options).run()
    summary = {
        "kills": tally.kills, "runs": tally.runs, "lost_checkpoints": tally.lost_checkpoints,
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
        self.model = options.model or make_model(folder / "base")
        self.data = options.data or make_conversations(folder / "chat.jsonl")
        self.log = folder / "log"
        self.seconds: dict[str, list[float]] = {}
        """How long each moment took in children that were not killed in it."""

    def run(self) -> Tally:
        """Kill and compare until there were enough kills."""
        os.environ["FULLTUNE_CACHE"] = str(self.folder / "cache")
        # The children start from a process that has imported and used everything.
        finetune.run(self.settings(self.folder / "warm", stops_early=True))
        references = []
        for stops_early in (False, True):
            self.live(self.settings(self.folder / f"unbroken-{stops_early}", stops_early), aim=None)
            references.append(left_behind(self.folder / f"unbroken-{stops_early}"))
        while self.tally.kills < self.options.kills:
            start = time.monotonic()
            before = self.tally.kills
            run_dir = self.folder / "run"
            stops_early = self.tally.runs % 2 == 1
            expected = references[stops_early]
            self.torture(self.settings(run_dir, stops_early), num_steps=expected["step"])
            found = left_behind(run_dir)
            fault = "; ".join(
                f"{name} differs" for name in expected if not same(expected[name], found[name])
            )
            self.tally.runs += 1
            if fault:
                self.tally.faults.append(f"run {self.tally.runs}: {fault}")
                shutil.copytree(run_dir, Path(tempfile.mkdtemp(prefix="fulltune-kills-")) / "run")
            shutil.rmtree(run_dir)
            print(
                f"run {self.tally.runs}: {self.tally.kills - before} kills, "
                f"{time.monotonic() - start:.1f} s, {fault or 'as the undisturbed run'}",
                file=sys.stderr,
                flush=True,
            )
        return self.tally

    def torture(self, config: finetune.Config, num_steps: int) -> None:
        """Train one run to its end through kills."""
        run_dir = Path(config.run_dir)
        saved = 0
        kills = min(self.options.kills_per_run, self.options.kills - self.tally.kills)
        for number in range(kills):
            if saved == num_steps:  # only the end is left to disturb
                names = [name for name in NAMES if name not in REPEATED]
            else:  # not yet the end, or there would be nothing left to disturb
                late = number >= kills / 2
                passed = {"sampling"} if saved else {"restoring"}
                names = [name for name in NAMES if late or name not in AT_THE_END | passed]
            rarest = min(self.tally.aimed[name] for name in names)
            aim = self.chance.choice(
                [name for name in names if self.tally.aimed[name] <= rarest + 1]
            )
            if aim == "reading data":
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
            if not self.live(config, aim=aim):
                return  # the moment did not come any more
            folder = run_dir / "checkpoints"
            self.tally.kills_in_unfinished_saves += any(folder.glob(".*.tmp"))
            steps = [path for path in folder.glob("step-*") if path.is_dir()]
            whole = [path for path in steps if find_damage(path) is None]
            newest = max((int(path.name[5:]) for path in whole), default=0)
            self.tally.lost_checkpoints += len(steps) - len(whole) + (newest < saved)
            saved = max(saved, newest)
        self.live(config, aim=None)

    def live(self, config: finetune.Config, *, aim: str | None) -> bool:
        """One life of a training process; whether it was killed."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            train(config, writer, self.log)
        os.close(writer)
        occurrence = self.chance.choice((1, 1, 1, 2)) if aim in REPEATED else 1
        deadline = float("inf")
        if aim == "starting":
            deadline = time.monotonic() + self.delay("starting")
        open_moments: list[tuple[str, float]] = [("starting", time.monotonic())]
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
                if len(open_moments) == 1 and open_moments[0][0] == "starting":
                    self.seconds.setdefault("starting", []).append(now - open_moments[0][1])
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

    def settings(self, run_dir: Path, stops_early: bool) -> finetune.Config:
        """A short run with dropout, evaluations, two epochs and a checkpoint after every step.

        One that stops early takes the best weights, which are not the last, in the end.
        """
        return build_config(
            finetune.Config,
            {
                "model": str(self.model),
                "task": {"kind": "chat", "train": str(self.data), "validation": "4 examples"},
                "duration": "8 steps",
                "batch": "6 examples",
                "dropout": 0.1,
                "precision": "bf16",
                "optimizer": {"lr": 0.3 if stops_early else 1e-3, "schedule": "constant"},
                "evaluate": {
                    "every": "2 steps",
                    "num_samples": 1,
                    "stop_after": 1 if stops_early else None,
                },
                "save_every": "1 steps",
                "num_workers": 0,
                "run_dir": str(run_dir),
            },
        )


def train(config: finetune.Config, writer: int, log: Path) -> None:
    """The life of a child: train, saying over the pipe where it stands."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name, (owner, attribute) in MOMENTS.items():
        setattr(owner, attribute, announced(getattr(owner, attribute), name, writer))
    code = 1
    try:
        finetune.run(config, resume=True)
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
        os.write(writer, f"{'saving the best' if best else name}\n".encode())
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
    model = run_dir / "model"
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
        "samples": (run_dir / "samples.jsonl").read_text(encoding="utf-8"),
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


def make_conversations(path: Path) -> Path:
    """Forty short conversations."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            question = {"role": "user", "content": f"What is {number} and {number % 7}?"}
            answer = {"role": "assistant", "content": f"It is {number + number % 7}, I think."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
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
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
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


if __name__ == "__main__":
    outcome = main()
    sys.exit(1 if outcome.lost_checkpoints or outcome.faults else 0)
