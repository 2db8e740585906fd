"""The command line as it is seen: help, tables, JSON, exit codes, and what goes where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fulltune.assets import list_assets
from fulltune.cli import main
from fulltune.cli.printing import print_answers
from fulltune.config import list_keys, list_settings, load_config
from fulltune.data.tasks import TASKS
from fulltune.models.families import FAMILIES
from fulltune.recipes import finetune, pretrain
from fulltune.recipes.chain_steps import KINDS

VERBS = ("demo", "preview", "finetune", "pretrain", "chain", "search", "compare", "corpus",
         "evaluate", "predict", "chat", "report", "attention", "settings", "tasks", "models",
         "assets")  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command line in this process: its exit code, stdout and stderr."""

    def run(*arguments: object, columns: int = 100) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["fulltune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def run_process(*arguments: object, **changes: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fulltune", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**ENVIRONMENT, **changes},
    )  # fmt: skip


@pytest.fixture
def settings_file(tmp_path: Path, tiny_bert: Path, classification_file: Path) -> Path:
    values = {
        "model": str(tiny_bert),
        "task": {"kind": "classification", "train": str(classification_file)},
        "duration": "2 steps", "batch": "8 examples", "precision": "fp32", "num_workers": 0,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# -- help and tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_help_names_every_verb_and_fits_the_terminal(say: Say, columns: int) -> None:
    code, output, _ = say("--help", columns=columns)
    assert code == 0
    assert all(re.search(rf"│ {verb} +\w", output) for verb in VERBS)
    assert max(map(len, output.splitlines())) <= columns


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_each_of_its_options(say: Say, verb: str) -> None:
    code, output, _ = say(verb, "--help", columns=80)
    assert code == 0
    options = re.findall(r"^│ (?:\* +)?(--[\w-]+)(.*)│$", output, flags=re.MULTILINE)
    assert ("--help" in dict(options)) is True
    for name, rest in options:
        assert re.search(r" {2}\S.* \w+", rest), f"{verb} {name} says nothing: {rest}"
    assert max(map(len, output.splitlines())) <= 80


def test_no_arguments_show_the_help(say: Say) -> None:
    code, output, errors = say()
    assert code == 2
    assert "finetune" in output + errors


def test_help_and_the_lists_need_no_heavy_package() -> None:
    script = (
        "import sys\nfrom fulltune.cli import main\n"
        "sys.argv = ['fulltune', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'pyarrow', 'numpy', 'datasets'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    for arguments in (["--help"], ["finetune", "--help"], ["assets"], ["tasks"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True, text=True, check=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "heavy: []", arguments


def test_settings_are_listed_once_each_with_default_and_meaning(say: Say) -> None:
    code, output, _ = say("settings", "finetune", "--json")
    rows = json.loads(output)
    keys = [row["key"] for row in rows]
    assert code == 0
    assert len(set(keys)) == len(keys)
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    assert set(keys) == set(list_keys(finetune.Config)) - sections
    assert all(row["default"] and row["kind"] and row["meaning"].endswith(".") for row in rows)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_settings_loses_no_word(say: Say, columns: int) -> None:
    _, output, _ = say("settings", columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    words = set(output.split())
    for row in list_settings(finetune.Config):
        assert row.key in words
        assert set(row.meaning.split()) <= words, row.key


def test_the_meaning_of_a_setting_has_the_width_of_the_terminal(say: Say) -> None:
    _, output, _ = say("settings", columns=80)
    assert max(map(len, output.splitlines())) > 70
    name, meaning, accepted = output[output.index("task.train") :].splitlines()[:3]
    assert name.split() == ["task.train", "required"]
    assert meaning.startswith("    Training data: a file, a folder,")
    assert accepted.startswith("    ")


def test_settings_without_effect_on_pretraining_are_not_offered(say: Say) -> None:
    rows = {row["key"]: row for row in json.loads(say("settings", "pretrain", "--json")[1])}
    assert rows["task.kind"]["kind"] == "text"
    assert "task.labels" not in rows
    assert "task.template" not in rows
    assert "task.labels" in {row["key"] for row in json.loads(say("settings", "--json")[1])}


def test_the_kinds_of_step_of_a_chain_are_listed_with_their_settings(say: Say) -> None:
    code, output, _ = say("settings", "chain", "--json")
    rows = {row["key"]: row for row in json.loads(output)}
    assert code == 0
    for kind, has_verb in {
        "corpus": True, "tokenizer": False, "pretrain": True, "finetune": True, "evaluate": False
    }.items():  # fmt: skip
        own = set(rows) & {f"{kind}.{key}" for key in list_keys(KINDS[kind].settings)}
        if has_verb:
            assert f"`fulltune settings {kind}`" in rows[kind]["kind"]
            assert say("settings", kind)[0] == 0
            assert own == set()
        else:
            assert len(own) == len(list_keys(KINDS[kind].settings))
    assert set(KINDS) <= set(rows)
    assert all(
        row["default"] and row["kind"] and row["meaning"].endswith(".") for row in rows.values()
    )
    code, output, _ = say("settings", "chain", columns=80)
    assert max(map(len, output.splitlines())) <= 80


FILES = {
    "chain": "steps: [{evaluate: {model: runs/mine}}]",
    "corpus": "{sources: book.txt, output: corpus}",
    "finetune": "{model: runs/mine, task: {kind: chat, train: a.jsonl}, run_dir: runs/a}",
    "pretrain": "{model: runs/mine, objective: {length: 64}, task: {kind: text, train: a.txt}, "
    "run_dir: runs/a}",
    "search": "{finetune: {model: runs/mine, task: {kind: chat, train: a.jsonl}}, "
    "space: {optimizer.lr: 1e-5..1e-3 log}, run_dir: runs/a}",
}


@pytest.mark.parametrize("verb", [*FILES, "preview"])
@pytest.mark.parametrize("written_for", FILES)
def test_a_file_given_to_another_verb_is_answered_with_the_verb_that_it_is_for(
    say: Say, tmp_path: Path, verb: str, written_for: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILES[written_for], encoding="utf-8")
    code, output, errors = say(verb, path)
    assert (code, output) == (2, "")  # none of the data is there
    if verb == written_for or (verb == "preview" and written_for in ("finetune", "pretrain")):
        assert "is a file for" not in errors
    elif (verb, written_for) == ("pretrain", "finetune"):
        assert "`task.kind` is `chat`" in errors
        assert "fulltune finetune" in errors
    else:
        error, hint = errors.splitlines()
        assert error.startswith(f"error: `{path}` is a file for `fulltune {written_for}`: it has ")
        assert hint == f"hint: run `fulltune {written_for} {path}`"


def test_the_size_of_a_new_model_is_not_looked_for_by_finetune(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{model: gpt2-tiny, task: {kind: text, train: a.txt}, run_dir: a}", "utf-8")
    _, _, errors = say("finetune", path)
    assert "is a file for `fulltune pretrain`: it has the size of a new model" in errors


def test_an_answer_is_shown_under_all_turns_of_its_prompt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns = [("user", "Hello"), ("assistant", "Hi!"), ("user", "And Rome?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    print_answers(prompt, {"answer": "A city."})
    said = capsys.readouterr().out
    assert [said.index(f"{role}: {content}") for role, content in turns] == sorted(
        said.index(f"{role}: {content}") for role, content in turns
    )
    assert "A city." in said


def test_lists_name_everything_there_is(say: Say) -> None:
    _, output, _ = say("tasks", columns=80)
    assert all(kind in output for kind in TASKS)
    _, output, _ = say("assets", columns=80)
    assert all(f"asset:{asset.name}" in output for asset in list_assets())
    _, output, _ = say("models", columns=80)
    assert all(name in output for name in FAMILIES)
    assert "asset:smollm2-135m-instruct" in output
    assert "asset:trec" not in output


def test_models_say_which_objectives_each_can_be_pretrained_with(say: Say) -> None:
    _, output, _ = say("models", "--json")
    objectives = {
        name: family["objectives"]
        for family in json.loads(output)["families"]
        for name in family["model_types"]
    }
    assert objectives["gpt2"] == ["causal_lm"]
    assert objectives["bert"] == ["masked_lm", "sentence_pairs"]
    assert objectives["roberta"] == ["masked_lm"]  # it has no head for pairs
    assert objectives["xlnet"] == ["permutation_lm"]
    assert objectives["t5"] == ["span_corruption"]
    _, output, _ = say("models", columns=200)
    assert "masked_lm, sentence_pairs" in output


@pytest.mark.parametrize("verb", ["settings", "tasks", "models", "assets"])
def test_lists_parse_as_json(say: Say, verb: str) -> None:
    code, output, errors = say(verb, "--json")
    assert code == 0
    assert json.loads(output)
    assert errors == ""


# -- running ---------------------------------------------------------------------------------------


def test_a_dry_run_prints_settings_that_load_back(
    say: Say, settings_file: Path, tmp_path: Path
) -> None:
    code, output, errors = say("finetune", settings_file, "--dry-run", "optimizer.lr=2e-5")
    again = tmp_path / "again.yaml"
    again.write_text(output, encoding="utf-8")
    assert code == 0, errors
    assert load_config(finetune.Config, again) == load_config(
        finetune.Config, settings_file, ["optimizer.lr=2e-5"]
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_plans_what_the_run_then_does(
    say: Say, settings_file: Path, tmp_path: Path
) -> None:
    code, output, _ = say("finetune", settings_file, "--dry-run", "--json", "scope=head")
    assert code == 0
    plan = json.loads(output)["plan"]
    assert not (tmp_path / "run").exists()
    _, output, _ = say("finetune", settings_file, "--dry-run", "scope=head")
    comments = [line for line in output.splitlines() if line.startswith("# ")]
    code, _, errors = say("finetune", settings_file, "scope=head")
    assert code == 0, errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    start = json.loads(lines[0])
    for name in ("num_parameters", "num_trained_parameters", "num_steps", "micro_batch_tokens"):
        assert plan[name] == start[name], name
        assert any(f"{plan[name]:,}" in line for line in comments), name
    assert start["predicted_memory_bytes"] == pytest.approx(plan["predicted_memory_bytes"], rel=0.2)
    said = f"{plan['num_steps']:,} steps, {plan['num_examples']:,} examples"
    assert said in errors
    # That the run is there is no hindrance, and it cannot go on with other settings.
    assert say("finetune", settings_file, "--dry-run", "scope=head")[0] == 0
    assert say("finetune", settings_file, "--dry-run", "--resume", "scope=head")[0] == 0
    code, _, errors = say("finetune", settings_file, "--dry-run", "--resume")
    assert (code, "differs in `scope`" in errors) == (2, True)
    # Settings that cannot be trained are refused as the run would refuse them.
    assert say("finetune", settings_file, "--dry-run", "optimizer.warmup=9 steps")[0] == 2


@pytest.mark.parametrize("objective", [{"length": 32}, {"length": 32, "stream": True}])
def test_a_dry_run_of_pretraining_plans_what_the_run_then_does(
    say: Say, tmp_path: Path, tiny_gpt2: Path, objective: dict[str, Any]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("She sells sea shells by the sea shore. 今天天气很好。\n" * 200, "utf-8")
    values = {
        "model": "gpt2-tiny", "tokenizer": str(tiny_gpt2), "architecture": {"n_embd": 32},
        "task": {"kind": "text", "train": str(corpus)}, "objective": objective,
        "duration": "2 steps", "batch": "8 examples", "precision": "fp32", "num_workers": 0,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    code, output, errors = say("pretrain", path, "--dry-run")
    assert code == 0, errors
    assert not (tmp_path / "run").exists()
    again = tmp_path / "again.yaml"
    again.write_text(output, encoding="utf-8")
    assert load_config(pretrain.Config, again) == load_config(pretrain.Config, path)
    plan = json.loads(say("pretrain", path, "--dry-run", "--json")[1])["plan"]
    comments = [line for line in output.splitlines() if line.startswith("# ")]
    code, _, errors = say("pretrain", path)
    assert code == 0, errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    start = json.loads(lines[0])
    for name in ("num_parameters", "num_trained_parameters", "num_steps", "micro_batch_tokens"):
        assert plan[name] == start[name], name
        assert any(f"{plan[name]:,}" in line for line in comments), name
    assert f"{plan['num_steps']:,} steps, {plan['num_examples']:,} examples" in errors
    # What a run would refuse, its plan refuses too.
    for wrong in ("objective.name=masked_lm", "task.train=nowhere", "task.too_long=drop"):
        code, _, errors = say("pretrain", path, "--dry-run", wrong)
        assert (code, "hint: " in errors) == (2, True)


def test_results_go_to_stdout_and_all_else_to_stderr(
    say: Say, settings_file: Path, tmp_path: Path, classification_file: Path
) -> None:
    code, output, errors = say("preview", settings_file, "--json")
    assert code == 0
    assert json.loads(output)
    code, output, errors = say("finetune", settings_file, "--json")
    result = json.loads(output)
    assert (code, result["ending"], result["step"]) == (0, "finished", 2)
    assert "2 steps" in errors
    code, output, errors = say("finetune", settings_file, "--resume")
    assert code == 0
    assert "is finished already" in output
    code, output, _ = say("evaluate", tmp_path / "run", "--json")
    assert code == 0
    assert set(json.loads(output)["metrics"]) >= {"accuracy", "loss"}
    code, output, _ = say("evaluate", tmp_path / "run")
    assert "accuracy" in output
    code, output, _ = say("predict", tmp_path / "run", classification_file)
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) == 120
    assert all("label" in row["prediction"] for row in rows)
    code, output, errors = say("report", tmp_path / "run")
    assert (code, output.strip()) == (0, str(tmp_path / "run" / "report.html"))


def test_a_loss_that_is_not_finite_ends_with_code_one(
    say: Say, settings_file: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_bert.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = say("finetune", settings_file, f"model={broken}", "task.validation=null")
    assert code == 1, errors
    assert "error: " in errors
    assert "hint: " in errors
    assert "Traceback" not in errors


# -- in a process of its own -----------------------------------------------------------------------


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fulltune", "assets"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert errors == b""


def test_colour_is_for_terminals_and_can_be_refused() -> None:
    import pty

    def on_terminal(**changes: str) -> bytes:
        parent, child = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm-256color", **changes}
        command = [sys.executable, "-m", "fulltune", "finetun"]
        with subprocess.Popen(
            command, stdout=child, stderr=child, stdin=child, env=environment
        ) as process:
            os.close(child)
            shown = b""
            while True:
                try:
                    block = os.read(parent, 4096)
                except OSError:
                    break
                if not block:
                    break
                shown += block
        os.close(parent)
        assert process.returncode == 2
        return shown

    coloured = on_terminal(NO_COLOR="")
    assert b"\x1b[" in coloured
    assert b"finetun" in coloured
    assert b"\x1b[" not in on_terminal(NO_COLOR="1")
    assert "\x1b[" not in run_process("finetun").stderr


def test_a_corpus_is_prepared_with_a_table_or_json(say: Say, tmp_path: Path) -> None:
    rows = [{"text": f"document number {number}, 第{number}篇"} for number in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, rows[0]]]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = tmp_path / "corpus.yaml"
    settings.write_text(f"sources: {tmp_path / 'raw.jsonl'}\noutput: {tmp_path / 'out'}\n")
    code, output, errors = say("corpus", settings, "validation=10%")
    assert code == 0, errors
    assert "exact duplicates" in output
    assert "Traceback" not in errors
    code, output, errors = say("corpus", settings, "validation=10%")
    assert code == 2
    assert "finished corpus" in errors
    code, output, errors = say("corpus", settings, f"output={tmp_path / 'other'}", "--json")
    assert code == 0, errors
    manifest = json.loads(output)
    assert manifest["read"]["documents"] == 41
    assert set(manifest["splits"]) == {"train", "validation"}
    code, output, errors = say("settings", "corpus", "--json")
    assert {row["key"] for row in json.loads(output)} >= {"sources", "near_duplicates.threshold"}


def test_ctrl_c_while_tokenizing_ends_with_130_and_no_traceback(
    tmp_path: Path, settings_file: Path
) -> None:
    row = json.dumps({"text": "Where is the red house of Paris? " * 10, "label": "place"})
    (tmp_path / "many.jsonl").write_text((row + "\n") * 300_000, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "fulltune", "finetune", str(settings_file),
         f"task.train={tmp_path / 'many.jsonl'}", "task.too_long=truncate", "num_workers=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stderr is not None
    seen = b""
    deadline = time.monotonic() + 120
    while b"tokenizing" not in seen and time.monotonic() < deadline:
        seen += os.read(process.stderr.fileno(), 4096)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, seen + errors
    assert b"Traceback" not in seen + errors
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_memory_left_is_said_with_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr("fulltune.cli.app", run_out)
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert "the memory of the GPU ran out: CUDA out of memory" in said
    assert "hint: lower `memory`" in said
