from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fulltune.errors import DataError, MissingExtraError
from fulltune.tracking import (
    LiveDisplay,
    MetricsLog,
    PlainDisplay,
    Tracker,
    TrackingConfig,
    format_bytes,
    format_duration,
    format_miss,
    format_number,
    make_display,
    printable,
    read_metrics,
    restore_numbers,
    show_answer,
    to_json_text,
)

STEP = {
    "loss": 1.8342,
    "lr": 2e-5,
    "grad_norm": 0.81,
    "tokens_per_second": 3120.4,
    "matmul_share": 0.34,
    "memory_bytes": 2.1e9,
    "updates_rounded_away": None,
    "epoch": 0.25,
}


def test_events_are_read_back_in_order_with_their_time(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write("start", step=0, model="tiny")
    log.write("sample", step=0, prompt=[{"role": "user", "content": "你好\n"}], answer="NaN")
    log.sync()
    log.close()
    events = read_metrics(log.path)
    assert [event["event"] for event in events] == ["start", "sample"]
    assert events[1]["prompt"][0]["content"] == "你好\n"
    assert events[1]["answer"] == "NaN"
    assert all(event["time"] > 1e9 for event in events)


@pytest.mark.parametrize("names", [3, "loss", {"loss": 1}, [1], ["gone"]])
def test_names_of_values_that_are_not_finite_which_are_none_are_an_error_with_its_line(
    tmp_path: Path, names: object
) -> None:
    path = tmp_path / "metrics.jsonl"
    events = [{"event": "start"}, {"event": "step", "loss": "NaN", "not_finite": names}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not an event: .*`not_finite`"):
        read_metrics(path)


def test_values_that_are_not_finite_stay_visible_in_valid_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("step", step=1, loss=math.nan, norms=[1.0, math.inf, -math.inf])
    line = log.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == "NaN"
    (event,) = read_metrics(log.path)
    assert math.isnan(event["loss"])
    assert event["norms"] == [1.0, math.inf, -math.inf]


def test_each_event_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from fulltune.tracking import MetricsLog;"
        "log = MetricsLog(Path(sys.argv[1])); log.write('step', step=1); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "metrics.jsonl"
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert [event["step"] for event in read_metrics(path)] == [1]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_left_out_and_never_joins_the_next_event(
    tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", step=1)
    log.write("step", step=2, loss=1.5)
    log.close()
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert [event["step"] for event in read_metrics(path)] == [1]
    log = MetricsLog(path)
    log.write("step", step=2, loss=1.5)
    log.close()
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "time": 1.0, "step": 1}')
    log = MetricsLog(path)
    log.write("step", step=2)
    log.close()
    assert [event["step"] for event in read_metrics(path)] == [1, 2]


def test_a_spoiled_line_inside_the_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n{"event": "st\n{"event": "end"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not an event") as caught:
        read_metrics(path)
    assert caught.value.hint is not None


def test_metrics_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_resumed_run_forgets_the_steps_it_will_make_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("note", text="no step")
    for step in range(1, 6):
        log.write("step", step=step, loss=math.nan)
    with log.path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    log.truncate_after(3)
    log.write("resume", step=3)
    log.close()
    events = read_metrics(log.path)
    assert [event.get("step") for event in events] == [None, 1, 2, 3, 3]
    assert math.isnan(events[1]["loss"])
    assert list(tmp_path.iterdir()) == [log.path]


def test_a_full_disk_is_an_error_with_a_hint_and_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from fulltune.errors import RunFolderError; from fulltune.tracking import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "log.write('step', step=1)\n"
        "try: log.write('step', step=2, text='long' * 30)\n"
        "except RunFolderError as error: print(error, error.hint)\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert "metrics.jsonl` cannot be written: File too large" in done.stdout
    assert "run_dir" in done.stdout
    assert path.read_bytes().endswith(b"\n")
    assert [event["step"] for event in read_metrics(path)] == [1]


def test_a_value_that_is_no_number_or_text_is_a_bug_and_says_which(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path / "metrics.jsonl") as log,
        pytest.raises(TypeError, match="`model` of a logged event is a object"),
    ):
        log.write("start", model=object())


def test_tensorboard_receives_steps_and_evaluations_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    program = (
        "import sys; from pathlib import Path; from fulltune.tracking import *\n"
        "config = TrackingConfig(sinks=('tensorboard',))\n"
        "with Tracker(Path(sys.argv[1]), config) as tracker:\n"
        "    tracker.write('step', step=1, loss=2.5)\n"
        "    tracker.write('step', step=2, loss=9.0)\n"
        "with Tracker(Path(sys.argv[1]), config, resume_step=1) as tracker:\n"
        "    tracker.write('step', step=2, loss=2.25)\n"
        "    tracker.write('evaluation', step=2, split='validation', accuracy=0.5)\n"
        "    tracker.write('checkpoint', step=2)\n"
        "print('torch' in sys.modules, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [
        (1, 2.5),
        (2, 2.25),
    ]
    assert [point.value for point in events.Scalars("validation/accuracy")] == [0.5]
    assert [event.get("loss") for event in read_metrics(tmp_path / "metrics.jsonl")] == [
        2.5,
        2.25,
        None,
        None,
    ]


@pytest.mark.parametrize("sink", ["wandb", "trackio"])
def test_a_missing_extra_names_the_command_and_writes_nothing(tmp_path: Path, sink: str) -> None:
    if importable(sink):
        pytest.skip(f"{sink} is installed")
    config = TrackingConfig.model_validate({"sinks": [sink]})
    with pytest.raises(MissingExtraError, match=f"`{sink}`") as caught:
        Tracker(tmp_path, config)
    assert f"`pip install 'fulltune[{sink}]'`" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_wandb_works_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with Tracker(tmp_path, TrackingConfig(sinks=("wandb",), offline=True)) as tracker:
        tracker.write("step", step=1, loss=2.5)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def importable(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def run_display(display: LiveDisplay | PlainDisplay) -> None:
    with display:
        display.stage("loading the model")
        display.progress("tokenizing train.jsonl", 20, 20)
        display.progress("counting", 3, None)
        display.step(1, STEP)
        display.step(2, {**STEP, "loss": math.nan, "updates_rounded_away": 0.31})
        display.evaluation(
            2, {"split": "validation", "loss": 1.9, "perplexity": 6.68, "best": True}
        )
        display.notice("spike at step 2 \x1b[31m[red]\x07")


def test_plain_lines_are_aligned_and_hold_no_control_characters() -> None:
    output = io.StringIO()
    display = make_display(1200, Console(file=output, width=40))
    assert isinstance(display, PlainDisplay)
    run_display(display)
    lines = output.getvalue().splitlines()
    assert lines[2] == (
        "step    1/1200  loss   1.834  lr 2.00e-05  grad 0.8100  tok/s    3,120  matmul   34%"
        "  mem   2.0 GiB  epoch  0.25"
    )
    assert lines[3].startswith("step    2/1200  loss     NaN  lr 2.00e-05")
    assert "rounded 31.0%" in lines[3]
    assert lines[4] == "eval    2  validation  loss 1.900  perplexity 6.680  (best)"
    assert "[red]" in lines[5]
    assert all(character.isprintable() or character == "\n" for character in output.getvalue())


def test_the_panel_names_the_judged_metric_first_with_the_first_and_the_best() -> None:
    output = io.StringIO()
    console = Console(
        file=output, width=100, force_terminal=True, _environ={"TERM": "xterm"}, color_system=None
    )
    with make_display(9, console, metric="macro_f1") as display:
        for step, value in ((0, 0.25), (4, 0.75), (8, 0.5)):
            values = {"loss": 1.5, "macro_f1": value, "best": step <= 4}
            display.evaluation(step, {"split": "validation", **values})
    assert "macro F1 0.5000 (best 0.7500 at 4, first 0.2500)  loss 1.500  at step 8" in (
        output.getvalue()
    )


def test_a_terminal_gets_a_panel_and_NO_COLOR_takes_the_colour_away() -> None:
    texts = {}
    for no_color in (False, True):
        output = io.StringIO()
        console = Console(
            file=output,
            width=100,
            force_terminal=True,
            color_system="truecolor",
            no_color=no_color,
            _environ={"TERM": "xterm"},
        )
        display = make_display(1200, console, title="run")
        assert isinstance(display, LiveDisplay)
        run_display(display)
        texts[no_color] = output.getvalue()
    for text in texts.values():
        assert "step 2/1,200" in text
        assert "34% of measured matrix rate" in text
        assert "★ best" in text
        assert "[red]" in text
        assert "\x07" not in text
    assert "\x1b[36m" in texts[False]
    assert "\x1b[36m" not in texts[True]


@pytest.mark.parametrize("way", ["closed", "no reader", "terminal gone"])
def test_a_broken_stderr_does_not_end_the_run(way: str) -> None:
    program = (
        "import sys, os, time\n"
        "from fulltune.tracking import make_display\n"
        "with make_display(9) as display:\n"
        "    for step in range(1, 10):\n"
        "        display.step(step, {'loss': 1.0})\n"
        "        if step == 5: print('half', flush=True); sys.stdin.readline()\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.6)\n"
        "print('done', type(display).__name__)\n"
    )
    prepare = None
    if way == "terminal gone":
        leader, follower = os.openpty()
        stderr = follower
    else:
        leader, stderr = os.pipe()
    if way == "closed":
        prepare = _close_stderr
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=prepare,
    ) as process:
        os.close(stderr)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.close(leader)
        output, _ = process.communicate("go\n", timeout=30)
    assert process.returncode == 0
    expected = "LiveDisplay" if way == "terminal gone" else "PlainDisplay"
    assert output.split() == ["done", expected]


def _close_stderr() -> None:
    os.close(2)


def test_numbers_are_written_as_people_write_them() -> None:
    assert format_bytes(2.1e9) == "2.0 GiB"
    assert format_bytes(5e8) == "477 MiB"
    assert show_answer({"answer": "It is a", "stopped": False}) == "It is a …"
    assert show_answer({"answer": "Paris."}) == "Paris."
    assert format_miss(-0.13) == "13% too low"
    assert format_miss(0.004) == "right within 1%"
    assert [format_duration(seconds) for seconds in (41, 725, 12000, 187200, math.inf)] == [
        "0:41",
        "12:05",
        "3:20:00",
        "2 d 4 h",
        "?",
    ]
    numbers = [0.0, 1.83421, 0.81, 31.234, 3120.4, 2e-5, -0.5, math.nan, -math.inf]
    assert [format_number(value) for value in numbers] == [
        "0",
        "1.834",
        "0.8100",
        "31.23",
        "3,120",
        "2.00e-05",
        "-0.5000",
        "NaN",
        "-Infinity",
    ]
    assert printable("a\tb\x1b[0m\n c") == "a b [0m c"


def test_a_document_with_numbers_that_are_not_finite_is_json_and_is_read_back() -> None:
    document = {
        "results": {"loss": math.nan, "perplexity": math.inf, "accuracy": 0.5},
        "weight_change": [{"group": "layer 0", "relative.change": -math.inf}, {"group": "NaN"}],
        "path": Path("runs/a"),
        "answer": "NaN",
    }
    text = to_json_text(document, indent=1)
    plain = json.loads(text, parse_constant=pytest.fail)
    assert plain["results"] == {"loss": "NaN", "perplexity": "Infinity", "accuracy": 0.5}
    assert plain["not_finite"] == [
        "results.loss", "results.perplexity", "weight_change.relative.change",
    ]  # fmt: skip
    restored = restore_numbers(plain)
    assert math.isnan(restored["results"]["loss"])
    assert restored["results"]["perplexity"] == math.inf
    assert restored["weight_change"] == [
        {"group": "layer 0", "relative.change": -math.inf}, {"group": "NaN"},
    ]  # fmt: skip
    assert restored["answer"] == "NaN"
    assert "not_finite" not in restored


def test_a_list_of_documents_names_what_is_not_finite_in_each() -> None:
    text = to_json_text([{"metrics": {"loss": math.nan}}, {"metrics": {"loss": 1.0}}], indent=2)
    first, second = json.loads(text, parse_constant=pytest.fail)
    assert first == {"metrics": {"loss": "NaN"}, "not_finite": ["metrics.loss"]}
    assert second == {"metrics": {"loss": 1.0}}
