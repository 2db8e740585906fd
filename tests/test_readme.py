"""Every `fulltune` command of the README and then of the pages in docs/ is run, in the order it
stands there, on the real assets.

Training is cut to two steps by further settings at the end of the command; nothing else is changed.
`make` targets are what runs this test, and the benchmarks and the script in docs/ have tests of
their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "duration=2 steps",
    "batch=4 examples",
    "task.validation=8 examples",
    "evaluate.num_samples=1",
]
SHORT_TASK = {
    **dict.fromkeys(
        (
            *("configs/trec-minilm.yaml", "configs/trec-labels.yaml", "configs/movie-scores.yaml"),
            *("configs/us-addresses.yaml", "configs/squad-minilm.yaml"),
        ),
        SHORT[:3],
    ),
    # What the model gave both answers is computed for all pairs that fit.
    "configs/dpo-smollm2.yaml": [*SHORT, "task.max_length=256"],
    "configs/smollm2-chat.yaml": SHORT,
    "configs/translate-smollm2.yaml": SHORT,
    "configs/summarize-smollm2.yaml": SHORT,
    "configs/text-to-text-t5.yaml": SHORT,
}
SHORT_COMPARISON = [
    "finetune.duration=2 steps",
    "finetune.task.validation=8 examples",
    "methods=[all, lora 2]",
    "rates=[1e-4]",
    "seeds=1",
    "test=8 examples",
]
SHORT_SEARCH = [
    "budget=2 trials",
    "range_test=false",
    "finetune.duration=2 steps",
    "finetune.task.validation=8 examples",
]
SHORT_PRETRAINING = ["duration=2 steps", "batch=8 examples", "task.validation=2%"]


def shown_commands() -> list[list[str]]:
    pages = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("fulltune ")]


def shortened(command: list[str]) -> list[str]:
    if command[1] == "pretrain":
        return [*command, *SHORT_PRETRAINING]
    if command[1] == "compare":
        return [*command, *SHORT_COMPARISON]
    if command[1] == "search":
        return [*command, *SHORT_SEARCH]
    if command[1] not in ("finetune", "preview"):
        return command
    file = next(word for word in command if word.endswith(".yaml"))
    return [*command, *SHORT_TASK.get(file, SHORT_PRETRAINING)]


@pytest.mark.network
@pytest.mark.slow
def test_every_command_of_the_readme_and_the_docs_works_in_its_order(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    questions = [{"text": "Who wrote Hamlet?"}, {"text": "How far is the moon?"}]
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8"
    )
    environment = {
        **os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default",
    }  # fmt: skip
    commands = shown_commands()
    assert len(commands) >= 10
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *shortened(command)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            input="Hello\n" if command[1] == "chat" else "",
        )  # fmt: skip
        shown = f"$ {shlex.join(shortened(command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, shown
        assert "Traceback" not in done.stderr, shown
        for manifest in tmp_path.glob("runs/**/manifest.json"):  # a finished run needs them no more
            shutil.rmtree(manifest.parent / "checkpoints", ignore_errors=True)
    answers = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in answers] == [row["text"] for row in questions]
    for run in ("smollm2-chat", "trec-minilm", "trec-minilm-seed-1"):
        assert (tmp_path / "runs" / run / "model" / "model.safetensors").is_file()
        assert (tmp_path / "runs" / run / "report.html").is_file()
