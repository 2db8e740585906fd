"""The display on stderr: a live panel in a terminal, plain lines elsewhere.

A display must never end a run: a closed stderr is ignored.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fulltune.tracking.numbers import (
    format_bytes,
    format_duration,
    format_number,
    name_of,
    printable,
    sparkline,
)


class _ForgivingStream:
    """A text stream whose reader may go away: what can no longer be shown is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, UnicodeError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no stderr")
        return self._stream.fileno()


def stderr_console() -> Console:
    """A console on stderr that outlives its reader; Rich's own ends the program instead."""
    stream = _ForgivingStream(sys.stderr)
    # Whether this is a terminal is asked of the stream, not of FORCE_COLOR: a log file is no place
    # for a panel that redraws itself. NO_COLOR is obeyed by Rich.
    return Console(file=cast("TextIO", stream), force_terminal=stream.isatty(), highlight=False)


class Display(Protocol):
    """What a recipe tells people while it works."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: object) -> None: ...

    def stage(self, text: str) -> None:
        """Say which slow phase begins: `loading the model`."""

    def progress(self, description: str, done: int, total: int | None) -> None:
        """Say how far a phase before or after training is."""

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of a `step` event."""

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of an `evaluation` event; `best` says that it is the best so far."""

    def notice(self, text: str) -> None:
        """Show one line that should be seen: a checkpoint saved, a spike, a resume."""


def make_display(
    num_steps: int | None = None,
    console: Console | None = None,
    *,
    title: str = "fulltune",
    metric: str = "loss",
) -> LiveDisplay | PlainDisplay:
    """A live panel where the console is a terminal that can draw one, otherwise plain lines.

    Args:
        num_steps: steps of the whole run; None where it is set later, once the data is counted.
        console: None for stderr.
        title: name of the run.
        metric: the evaluation's metric that decides which step is best.
    """
    console = console or stderr_console()
    can_draw = console.is_terminal and not console.is_dumb_terminal
    if can_draw and console.encoding.lower().startswith("utf"):
        return LiveDisplay(num_steps, console, title=title, metric=metric)
    return PlainDisplay(num_steps, console)


class _Progress:
    """Steps per second over the recent past, from which the time left follows."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=50)

    def add(self, step: int) -> None:
        self._seen.append((time.monotonic(), step))

    def seconds_left(self, num_steps: int | None) -> float | None:
        if num_steps is None or len(self._seen) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._seen[0], self._seen[-1]
        if last_step <= first_step or last_time <= first_time:
            return None
        seconds_per_step = (last_time - first_time) / (last_step - first_step)
        since = time.monotonic() - last_time
        return max(0.0, (num_steps - last_step) * seconds_per_step - since)


class PlainDisplay:
    """One line for each thing said, without control characters: for files, pipes and pagers."""

    def __init__(self, num_steps: int | None, console: Console) -> None:
        self.num_steps = num_steps
        self._console = console
        self._progress = _Progress()
        self._last_progress = -math.inf

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def stage(self, text: str) -> None:
        """Print the phase."""
        self._print(text)
        self._last_progress = time.monotonic()

    def progress(self, description: str, done: int, total: int | None) -> None:
        """Print a line every five seconds and one at the end."""
        now = time.monotonic()
        if done != total and now - self._last_progress < 5:
            return
        self._last_progress = now
        share = f"/{total:,} ({done / total:.0%})" if total else ""
        self._print(f"{description} {done:,}{share}")

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Print the step's values as aligned `key value` text."""
        self._progress.add(step)
        width = len(str(self.num_steps or 99999))
        of_all = f"/{self.num_steps}" if self.num_steps else ""
        parts = [f"step {step:>{width}}{of_all}"]
        parts += [f"{name} {text:>{space}}" for name, text, space in _step_texts(values)]
        left = self._progress.seconds_left(self.num_steps)
        if left is not None:
            parts.append(f"left {format_duration(left):>7}")
        self._print("  ".join(parts))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Print every metric, and whether this is the best so far."""
        width = len(str(self.num_steps or 99999))
        parts = [f"eval {step:>{width}}", str(values.get("split", "validation"))]
        parts += [f"{name} {format_number(value)}" for name, value in _metrics(values).items()]
        if values.get("best"):
            parts.append("(best)")
        self._print("  ".join(parts))

    def notice(self, text: str) -> None:
        """Print the line."""
        self._print(text)

    def _print(self, text: str) -> None:
        # Columns stand in runs of spaces, so only control characters are replaced here.
        safe = "".join(character if character.isprintable() else " " for character in text)
        self._console.print(Text(safe), soft_wrap=True, highlight=False)


class LiveDisplay:
    """A panel on the terminal that redraws itself while the run goes on."""

    def __init__(
        self,
        num_steps: int | None,
        console: Console,
        *,
        title: str = "fulltune",
        metric: str = "loss",
    ) -> None:
        self.num_steps = num_steps
        self._console = console
        self._title = title
        self._metric = metric
        self._started = time.monotonic()
        self._stage = ""
        self._counted: tuple[str, int, int | None] | None = None
        self._step = 0
        self._values: dict[str, Any] = {}
        self._losses: deque[float] = deque(maxlen=400)
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, dict[str, Any]] | None = None
        self._best: tuple[int, float] | None = None
        self._notices: deque[tuple[str, str]] = deque(maxlen=4)
        self._progress = _Progress()
        # A thread draws while the run writes. Re-entrant, for a signal handler may write too.
        self._lock = threading.RLock()
        self._live = Live(
            self,
            console=console,
            refresh_per_second=4,
            # Results that go to a file must reach it, not the panel.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        """Show the phase with a running clock."""
        with self._lock:
            self._stage, self._counted = printable(text), None

    def progress(self, description: str, done: int, total: int | None) -> None:
        """Show a bar for the phase."""
        with self._lock:
            self._stage, self._counted = "", (printable(description), done, total)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the step's values."""
        with self._lock:
            self._stage, self._counted = "", None
            self._step, self._values = step, dict(values)
            self._progress.add(step)
            if isinstance(values.get("loss"), (int, float)):
                self._losses.append(float(values["loss"]))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the evaluation beside the first and the best."""
        with self._lock:
            self._stage, self._counted = "", None
            self._last = (step, dict(values))
            value = values.get(self._metric)
            if not isinstance(value, (int, float)):
                return
            if self._first is None:
                self._first = (step, value)
            if values.get("best"):
                self._best = (step, value)

    def notice(self, text: str) -> None:
        """Add a line to the last few notices."""
        with self._lock:
            self._notices.append((time.strftime("%H:%M:%S"), printable(text)))

    def __rich__(self) -> Panel:
        with self._lock:
            return self._draw()

    def _draw(self) -> Panel:
        width = max(20, min(self._console.width, 100) - 4)
        parts: list[Any] = []
        if self._counted is not None:
            description, done, total = self._counted
            counts = f"{done:,}/{total:,}" if total else f"{done:,}"
            parts.append(_bar_line(description, done, total, counts))
        elif self._stage:
            clock = format_duration(time.monotonic() - self._started)
            parts.append(Text.assemble(("● ", "cyan"), self._stage, (f"  {clock}", "dim")))
        if self._values:
            parts.append(self._draw_bar())
            parts.append(self._draw_values(width))
        if self._last is not None:
            parts.append(self._draw_evaluation())
        for clock, text in self._notices:
            line = Text.assemble((f"{clock}  ", "dim"), text, overflow="ellipsis", no_wrap=True)
            parts.append(line)
        if not parts:
            parts.append(Text("starting", style="dim"))
        return Panel(
            Group(*parts),
            title=Text(printable(self._title), style="bold"),
            title_align="left",
            border_style="blue",
            width=width + 4,
        )

    def _draw_bar(self) -> Table:
        counts = f"step {self._step:,}"
        if self.num_steps:
            counts += f"/{self.num_steps:,}  {self._step / self.num_steps:.0%}"
        left = self._progress.seconds_left(self.num_steps)
        if left is not None and self._step < (self.num_steps or 0):
            counts += f"  {format_duration(left)} left"
        else:
            counts += f"  {format_duration(time.monotonic() - self._started)}"
        return _bar_line("", self._step, self.num_steps, counts)

    def _draw_values(self, width: int) -> Table:
        table = Table.grid(padding=(0, 3))
        losses = list(self._losses)
        if losses:
            arrow, style = _trend(losses)
            loss = Text.assemble((format_number(losses[-1]), "bold"), " ", (arrow, style))
            loss.append(f"  {sparkline(losses, max(8, min(48, width - 32)))}", style="cyan")
            table.add_row(Text("loss", style="dim"), loss)
        others = [(name, text) for name, text, _ in _step_texts(self._values) if name != "loss"]
        rate = [(name, text) for name, text in others if name in ("tok/s", "matmul", "mem")]
        rest = [(name, text) for name, text in others if (name, text) not in rate]
        for label, pairs in (("update", rest), ("speed", rate)):
            if pairs:
                line = Text()
                for name, text in pairs:
                    line.append(_speak(name, text) + "   ")
                line.rstrip()
                table.add_row(Text(label, style="dim"), line)
        return table

    def _draw_evaluation(self) -> Text:
        assert self._last is not None
        step, values = self._last
        line = Text.assemble((f"{values.get('split', 'validation')}  ", "dim"))
        metrics = _metrics(values)
        if self._metric in metrics:
            line.append(f"{name_of(self._metric)} ")
            line.append(format_number(metrics.pop(self._metric)), style="bold")
            line.append_text(self._draw_standing(step))
            line.append("  ")
        for name, value in metrics.items():
            line.append(f"{name_of(name)} {format_number(value)}  ")
        line.append(f"at step {step:,}", style="dim")
        return line

    def _draw_standing(self, step: int) -> Text:
        """Where the last evaluation stands beside the first and the best."""
        standing = Text()
        notes = []
        if self._best is not None and self._best[0] == step:
            standing.append(" ★ best", style="green")
        elif self._best is not None:
            notes.append(f"best {format_number(self._best[1])} at {self._best[0]:,}")
        if self._first is not None and self._first[0] != step:
            notes.append(f"first {format_number(self._first[1])}")
        if notes:
            standing.append(f" ({', '.join(notes)})", style="dim")
        return standing


def _bar_line(description: str, done: int, total: int | None, counts: str) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    cells: list[Any] = []
    if description:
        table.add_column(no_wrap=True)
        cells.append(Text(description))
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    cells += [
        ProgressBar(
            total=total or None,
            completed=done,
            pulse=not total,
            complete_style="cyan",
            finished_style="green",
        ),
        Text(counts),
    ]
    table.add_row(*cells)
    return table


def _step_texts(values: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The values of a step that people look at: short name, text, width of the widest text."""
    texts: list[tuple[str, str, int]] = []

    def add(key: str, name: str, width: int, text: Any) -> None:
        value = values.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            texts.append((name, text(value), width))

    add("loss", "loss", 7, format_number)
    add("lr", "lr", 8, lambda value: f"{value:.2e}")
    add("grad_norm", "grad", 6, format_number)
    add("tokens_per_second", "tok/s", 8, lambda value: f"{value:,.0f}")
    add("matmul_share", "matmul", 5, lambda value: f"{value:.0%}")
    add("memory_bytes", "mem", 9, format_bytes)
    add("updates_rounded_away", "rounded", 5, lambda value: f"{value:.1%}")
    add("epoch", "epoch", 5, lambda value: f"{value:.2f}")
    return texts


def _speak(name: str, text: str) -> str:
    """A value of the panel in words: `34% of matrix rate`, `3,120 tok/s`."""
    return {
        "grad": f"gradient norm {text}",
        "tok/s": f"{text} tok/s",
        "matmul": f"{text} of measured matrix rate",
        "mem": f"{text} memory",
        "rounded": f"bf16 alone would lose {text} of updates",
    }.get(name, f"{name} {text}")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, float) and name not in ("time", "seconds")
    }


def _trend(losses: list[float]) -> tuple[str, str]:
    """Where the mean of the newer half of the recent losses stands beside the older half's."""
    recent = losses[-40:]
    half = len(recent) // 2
    if half < 2:
        return " ", ""
    older, newer = sum(recent[:half]) / half, sum(recent[half:]) / (len(recent) - half)
    if not math.isfinite(newer - older):
        return "!", "red"
    if abs(newer - older) < 0.005 * abs(older):
        return "→", "dim"
    return ("↘", "green") if newer < older else ("↗", "yellow")
