"""The command line: verbs, a file, then `key=value`. Torch is imported only once a verb runs."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from typing import Any, NoReturn

import typer

# In the order of `--help`.
from fulltune.cli import train, search, compare, tokenizer  # isort: skip
from fulltune.cli import corpus, use, attention, listing  # isort: skip
from fulltune.cli.app import app
from fulltune.errors import FulltuneError

__all__ = [
    "attention",
    "compare",
    "corpus",
    "listing",
    "main",
    "search",
    "tokenizer",
    "train",
    "use",
]

# Newer versions of typer carry a click of their own; this is the base of its errors in either.
CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
SECONDS_FOR_THE_FIRST_RANK = 10
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
"""What the system says of a path that a user named; any other error of it is a bug."""


def main() -> NoReturn:
    """Run a verb. A user's mistake is printed without a traceback; a bug keeps its own."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for noisy in (
        "httpx",
        "huggingface_hub",
        "transformers",
        "datasets",
        "filelock",
        "urllib3",
        "matplotlib",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    code: int | None = 0
    try:
        code = app(prog_name="fulltune", standalone_mode=False)
        sys.stdout.flush()
    except FulltuneError as error:
        _fail(str(error), error.hint, error.exit_code)
    except CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _fail(*_explain_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", None, 130)
    except BrokenPipeError:
        # Who read the output has left, as `head` does; what is still buffered has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as for a broken pipe
            hint = "free some space, or send the output elsewhere"
            _fail(f"the output cannot be written: {error.strerror}", hint, 2)
        if error.filename is None or error.errno not in PATH_ERRORS:
            raise
        hint = "check how the path is written, and who may read and write there"
        _fail(f"`{error.filename}` cannot be used: {error.strerror}", hint, 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded
            raise
        # Not by `_fail`: it may be this rank alone.
        _say("error:", "red", f"the memory of the GPU ran out: {str(error).partition('. ')[0]}")
        hint = "lower `memory`, such as `memory: 20 GiB`, or `task.max_length`; a run goes on with "
        _say("hint:", "cyan", f"{hint}`--resume`")
        sys.exit(1)
    sys.exit(code)


def _explain_usage(error: Any) -> tuple[str, str]:
    """A wrong command line in the words of the other errors."""
    message = str(error.format_message()).strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fulltune"
    see = f"`{command} --help` shows what is possible"
    for before in (" Did you mean ", " (Possible options: "):
        wanted, found, near = message.partition(before)
        if found:
            near = near.strip("'?()")
            return _worded(wanted), f"did you mean `{near}`? {see}"
    return _worded(message), see


def _worded(message: str) -> str:
    """Backticks where typer quotes, and no second `error`."""
    message = message.rstrip(". ").replace("'", "`").replace("Value error, ", "")
    message = message.replace("Input should be", "it must be").replace("option: -", "option -")
    return message[:1].lower() + message[1:]


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    from fulltune.runtime import is_main_process

    if not is_main_process():
        # All ranks fail alike, and the first one says it. Were this one gone before, torchrun
        # would end the first without a word; it ends this one as soon as the first is gone.
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        sys.exit(code)
    _say("error:", "red", message)
    if hint:
        _say("hint:", "cyan", hint)
    sys.exit(code)


def _say(word: str, colour: str, text: str) -> None:
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(f"{typer.style(word, fg=colour, bold=True) if coloured else word} {text}", err=True)
