"""The page on pre-training shows what its script prints, and names functions that exist."""

from __future__ import annotations

import importlib
import re
import runpy
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CODE = [line for line in PAGE.splitlines() if line.startswith("Code: ")]


def named_in_the_page() -> list[tuple[str, str]]:
    """(file, name) of everything that the lines beginning with `Code:` name."""
    found = []
    for line in CODE:
        file = ""
        for name in re.findall(r"`([^`]+)`", line):
            if name.startswith("fulltune/"):
                file = name
            elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name):
                found.append((file, name))
    return found


def test_the_script_prints_every_block_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs/pretraining_examples.py"), run_name="__main__")
    assert capsys.readouterr().out == "\n".join(BLOCKS)
    assert len(BLOCKS) == 10


def test_the_script_prints_the_same_a_second_time(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "docs/pretraining_examples.py"))
    script["main"]()
    first = capsys.readouterr().out
    script["main"]()
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(("file", "name"), named_in_the_page())
def test_every_function_named_on_the_page_exists(file: str, name: str) -> None:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert (ROOT / file).is_file()
    found = reduce(getattr, name.split("."), module)
    # Where it is defined, and not where it is imported.
    assert getattr(found, "__module__", module.__name__) in {module.__name__, "builtins"}


def test_every_example_stands_beside_the_code_that_made_it() -> None:
    assert len(CODE) == len(BLOCKS) + 1  # and the cross-entropy that all share
    assert len(PAGE.splitlines()) < 250
