"""What the repository says of itself is true: documents, settings files, layers, the wheel."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import fulltune
from fulltune.config import build_config, load_config
from fulltune.recipes import chain, compare, finetune, pretrain, preview, search

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")]
DOCUMENTS += [ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOCUMENTS += [ROOT / "benchmarks" / "README.md"]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
SHELL = {"sh", "bash", "shell", "console"}


def fenced_blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    pattern = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return pattern.findall(path.read_text(encoding="utf-8"))


def shell_commands(path: Path) -> list[list[str]]:
    """Every command of the document's shell blocks as words; comments and pipes taken apart."""
    commands: list[list[str]] = []
    for language, text in fenced_blocks(path):
        if language not in SHELL:
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command: list[str] = []
            for word in [*words, "&&"]:
                if word in {"&&", "||", "|", ";"}:
                    commands += [command] if command else []
                    command = []
                elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                    command.append(word)
    return commands


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(program: str) -> list[tuple[str, list[str]]]:
    """(document, arguments) of every use of one program in a block, a sentence or a header."""
    found: list[tuple[str, list[str]]] = []
    for path in DOCUMENTS:
        for name, *words in shell_commands(path):
            if Path(name).name == program:
                found.append((name_of(path), words))
        prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for words in re.findall(rf"`{program} ([a-z][^`]*)`", prose):
            found.append((name_of(path), shlex.split(words)))
    for path in CONFIGS:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"#   {program} "):
                found.append((path.name, shlex.split(line.removeprefix("#"))[1:]))
    return [use for index, use in enumerate(found) if use not in found[:index]]


def as_parameters(commands: list[tuple[str, list[str]]]) -> list[object]:
    return [
        pytest.param(words, id=f"{document}: {' '.join(words)}") for document, words in commands
    ]


def run_fulltune(
    *arguments: str, interpreter_options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *interpreter_options, "-m", "fulltune", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@functools.cache
def help_of(verb: str) -> str:
    result = run_fulltune(*verb.split(), "--help")
    assert result.returncode == 0, f"`fulltune {verb}`: {result.stderr}"
    return result.stdout


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def load_settings(verb: str, path: Path, overrides: list[str]) -> None:
    if verb == "chain":
        chain.load(path)
    elif verb == "compare":
        compare.load(path, overrides)
    elif verb == "search":
        search.check(search.load(path, overrides))
    elif verb == "preview":
        preview.read_config(path, overrides)
    else:
        config = pretrain.Config if verb == "pretrain" else finetune.Config
        load_config(config, path, overrides)


# -- commands in the documents ---------------------------------------------------------------------


def test_the_documents_show_how_to_use_every_program() -> None:
    assert len(commands_of("fulltune")) > 10
    assert {"demo", "test", "check"} <= {words[0] for _, words in commands_of("make")}


@pytest.mark.parametrize("words", as_parameters(commands_of("fulltune")))
def test_every_fulltune_command_names_a_verb_with_its_options(words: list[str]) -> None:
    verb, *arguments = words
    if verb == "tokenizer":
        verb = f"tokenizer {arguments.pop(0)}"
    known = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_of(verb))
    for argument in arguments:
        if argument.startswith("-"):
            assert argument.partition("=")[0] in known


@pytest.mark.parametrize(
    "words",
    as_parameters([use for use in commands_of("fulltune") if ".yaml" in " ".join(use[1])]),
)
def test_every_command_with_a_settings_file_names_valid_settings(words: list[str]) -> None:
    verb, path, *others = words
    overrides = [word for word in others if "=" in word and not word.startswith("-")]
    load_settings(verb, ROOT / path, overrides)


@pytest.mark.parametrize("words", as_parameters(commands_of("make")))
def test_every_make_command_names_a_target(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


@functools.cache
def options_of(script: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"`python {script} --help`: {result.stderr}"
    return re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.stdout)


@pytest.mark.parametrize("words", as_parameters(commands_of("python")))
def test_every_python_command_names_a_module_or_a_file_with_its_options(words: list[str]) -> None:
    program, *arguments = words
    if program == "-m":
        assert importlib.util.find_spec(arguments[0])
        return
    assert (ROOT / program).is_file()
    for argument in arguments:
        if argument.startswith("-"):
            assert argument.partition("=")[0] in options_of(program)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_files_named_in_the_text_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`(?:python )?((?:configs|benchmarks|docs|scripts)/[\w./-]*)`", text)
    named += re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    for name in named:
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_both_readmes_have_the_same_code_blocks() -> None:
    assert fenced_blocks(ROOT / "README.zh-CN.md") == fenced_blocks(ROOT / "README.md")


def test_both_readmes_have_the_same_outline() -> None:
    def outline(name: str) -> list[str]:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        return re.findall(r"^(#+ |\| (?=-)|\|(?! -))", text, re.MULTILINE)

    assert outline("README.zh-CN.md") == outline("README.md")


# -- settings files --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_settings_file_is_valid_and_says_how_it_is_run(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    verbs = {line.split()[2] for line in header if f"configs/{path.name}" in line} - {"preview"}
    (verb,) = verbs
    load_settings(verb, path, [])
    assert any(line.startswith("# Expect: ") for line in header)


def test_the_settings_in_the_readme_are_those_of_the_file_it_names() -> None:
    for language, text in fenced_blocks(ROOT / "README.md"):
        if language != "yaml":
            continue
        title, _, values = text.partition("\n")
        if title.startswith("# my.yaml"):
            build_config(finetune.Config, yaml.safe_load(values))
        else:
            file = (ROOT / title.removeprefix("# ")).read_text(encoding="utf-8")
            assert file[file.index("model:") :] == values


# -- layers and what is imported -------------------------------------------------------------------


def children_of_the_package() -> set[str]:
    folder = ROOT / "fulltune"
    modules = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    return modules | {path.parent.name for path in folder.glob("*/__init__.py")}


def test_the_tree_in_the_readme_is_the_package() -> None:
    tree = next(
        text for _, text in fenced_blocks(ROOT / "README.md") if text.startswith("fulltune/\n")
    )
    drawn = re.findall(r"^  (\w+)(/|\.py) ", tree, re.MULTILINE)
    assert {name for name, _ in drawn} == children_of_the_package()
    for name, ending in drawn:
        assert (ROOT / "fulltune" / f"{name}{ending}").exists(), f"{name}{ending}"


def test_the_layers_in_the_readme_are_those_that_are_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    checked = [sorted(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    drawing = next(
        text for _, text in fenced_blocks(ROOT / "README.md") if text.startswith("cli | ")
    )
    drawn = [sorted(re.findall(r"\w+", layer)) for layer in drawing.split("|")]
    assert [["__main__"], *drawn] == checked
    assert contract["exhaustive"]


def test_help_is_answered_without_torch_or_transformers() -> None:
    result = run_fulltune("--help", interpreter_options=("-X", "importtime"))
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "fulltune.cli" in imported
    assert not imported & {"torch", "transformers", "sklearn", "datasets", "pyarrow"}


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, fulltune; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_is_there() -> None:
    assert set(fulltune.__all__) == set(dir(fulltune))
    for name in fulltune.__all__:
        assert getattr(fulltune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fulltune.nothing


# -- what is in the repository and in the wheel ----------------------------------------------------


def test_no_tracked_file_names_a_machine_or_leaves_a_marker() -> None:
    # In pieces, so that this file is not its own finding.
    folders = "|".join(f"/{name}/" for name in ("work", "root", "Users", "opt"))
    hosts = "|".join(f"{name}\\.org" for name in ("pypi", "pythonhosted", "npmjs"))
    options = "|".join(f"--{name}-url" for name in ("index", "extra-index"))
    markers = "|".join(rf"\b{first}{second}\b" for first, second in (("TO", "DO"), ("FIX", "ME")))
    pattern = re.compile(rf"(?<![\w.])(?:{folders})|{hosts}|{options}|{markers}")
    found = []
    for path in tracked_files():
        if path.suffix in {".png", ".gguf", ".parquet", ".safetensors"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_the_changelog_tells_of_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {fulltune.__version__}" in changelog


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    # Built from a copy of the tracked files: a build leaves folders behind, and a checkout may
    # hold files that a clone does not.
    source = tmp_path / "source"
    for path in tracked_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("fulltune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    package = {str(path.relative_to(ROOT)) for path in tracked_files()} - packed
    assert not {name for name in package if name.startswith("fulltune/")}
    assert "fulltune/py.typed" in packed
    assert any(name.endswith("LICENSE") for name in packed)
