"""`fulltune corpus`: from raw text to a prepared corpus, streaming, in parallel, and resumable.

CORPUS/train/train-00000.arrow             text, source, where
CORPUS/validation/validation-00000.arrow
CORPUS/manifest.json                       sources, settings, counts, hashes; written last
CORPUS/.working/                           finished chunks, until the corpus is whole
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import fulltune
from fulltune.config import build_config, differing_keys
from fulltune.data.cleaning import LanguageFilter
from fulltune.data.corpus import CorpusConfig, write_chunks
from fulltune.data.corpus_counts import Removed, Tally
from fulltune.data.corpus_shards import (
    TRAIN,
    VALIDATION,
    decide,
    gather,
    validation_share,
    write_shards,
)
from fulltune.data.deduplication import choose_bands
from fulltune.data.ngrams import EvaluationNgrams
from fulltune.data.records import check_source, source_fingerprint
from fulltune.errors import ConfigError, DataError, FulltuneError, RunFolderError
from fulltune.recipes.corpus_manifest import KIND, make_manifest, sum_of
from fulltune.runtime import num_cores
from fulltune.tracking import Display, make_display
from fulltune.train.run_folder import LOCK, locked, write_atomically

MANIFEST, WORKING, PLAN = "manifest.json", ".working", "plan.json"
CHANGEABLE = ("output", "num_workers")
"""Settings that change no byte of a corpus."""


class Config(CorpusConfig):
    """A prepared corpus: from which text, by which stages, and where."""

    output: str
    """Folder of the corpus; made new."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that clean and hash; null is one for each core. It changes no byte."""


@dataclass(frozen=True)
class Result:
    """A corpus and what it was made of."""

    folder: Path
    manifest: dict[str, Any]
    already_finished: bool = False


def run(config: Config, *, resume: bool = False, display: Display | None = None) -> Result:
    """Prepare the corpus in ``config.output``, or go on with it.

    Args:
        config: the settings.
        resume: go on after the finished chunks; start where there is nothing.
        display: None makes one on stderr.

    Raises:
        FulltuneError: of the kind that says what is wrong; no other corpus is touched.
    """
    folder = Path(config.output)
    check_settings(config)
    check_folder(folder, config, resume=resume)
    if (folder / MANIFEST).exists():
        with display or make_display(title=str(folder)) as shown:
            return _finished_before(folder, shown)
    for source in (*config.source_list, *config.decontaminate.against):
        check_source(source)
    with display or make_display(title=str(folder)) as shown:
        shown.stage("hashing the sources")
        plan = _make_plan(config)
        with locked(folder, doing="preparing a corpus", setting="output"), _write_errors(folder):
            try:
                return _run(config, folder, plan, shown)
            except KeyboardInterrupt:
                shown.notice("interrupted; finished chunks are kept, go on with `--resume`")
                raise
            except DataError:
                _remove_if_nothing_is_done(folder)
                raise


def _finished_before(folder: Path, display: Display) -> Result:
    """A corpus that is whole, unless a source has changed since; one that is gone is said."""
    manifest = _read_manifest(folder)
    display.stage("hashing the sources")
    for part in (*manifest["sources"], *manifest["evaluation"]):
        source = part["source"]
        try:
            check_source(source)
            fingerprint = source_fingerprint(source)
        except FulltuneError as error:
            display.notice(
                f"warning: whether `{source}` has changed since the corpus was made is not known: "
                f"{error}"
            )
            continue
        if fingerprint != part["fingerprint"]:
            raise RunFolderError(
                f"`{source}` has changed since the corpus in `{folder}` was made, which is "
                "finished and does not hold the change",
                hint="give `output` another name to make a corpus of it as it is now",
            )
    return Result(folder, manifest, already_finished=True)


def check_settings(config: Config) -> None:
    """Whatever is wrong with the settings is said before a file is read.

    Raises:
        ConfigError: a setting says nothing, or contradicts another.
    """
    validation_share(config)
    if not config.source_list:
        raise ConfigError("`sources` names none", hint="name a file or a folder")
    repeated = {source for source in config.source_list if config.source_list.count(source) > 1}
    if repeated:
        raise ConfigError(
            f"`sources` names {', '.join(f'`{source}`' for source in sorted(repeated))} twice",
            hint="name it once",
        )
    if config.languages is not None:
        if not config.languages:
            raise ConfigError("`languages` is empty", hint="write `[en, zh]`, or null to keep all")
        LanguageFilter(config.languages)
    if config.near_duplicates.threshold is not None:
        choose_bands(config.near_duplicates)


def _run(config: Config, folder: Path, plan: dict[str, Any], display: Display) -> Result:
    working = folder / WORKING
    working.mkdir(exist_ok=True)
    _check_plan(folder, plan)
    for leftover in working.glob("*.tmp"):
        leftover.unlink()
    evaluation: list[dict[str, Any]] = []
    if config.decontaminate.against:
        display.stage("reading the evaluation data")
        ngrams, found = EvaluationNgrams.read(
            config.decontaminate.against, config.decontaminate.ngram
        )
        ngrams.save(working)
        evaluation = [asdict(source) for source in found]
        for source in found:
            if source.num_too_short:
                display.notice(
                    f"warning: {source.num_too_short:,} of {source.num_records:,} records of "
                    f"{source.source} are shorter than {config.decontaminate.ngram} tokens, and "
                    "cannot be found in the corpus"
                )
    num_finished = sum(1 for _ in working.glob("chunk-*.arrow"))
    if num_finished:
        display.notice(f"{num_finished:,} chunks were finished before, and are kept")
    display.stage("cleaning and hashing documents")
    num_chunks, tally = write_chunks(
        config,
        working,
        num_workers=num_cores() if config.num_workers is None else config.num_workers,
        progress=lambda done: display.progress("documents", done, None),
    )
    _check_something_passed(config, tally)
    if tally.binary.examples:
        display.notice(_binary_notice(tally.binary))
    display.stage("looking for duplicates")
    documents = gather(config, working, num_chunks)
    decisions = decide(
        config, documents, working,
        progress=lambda done, total: display.progress("bands of near duplicates", done, total),
    )  # fmt: skip
    display.stage("writing the corpus")
    finished = working / "finished"
    for begun in (finished, folder / TRAIN, folder / VALIDATION):
        if begun.exists():  # by a run that was killed here; the plan says that it was this one
            shutil.rmtree(begun)
    written = write_shards(
        config, decisions, documents, working, num_chunks, finished,
        progress=lambda done, total: display.progress("chunks written", done, total),
    )  # fmt: skip
    manifest = make_manifest(config, plan, tally, written, evaluation)
    for split in written.shards:
        (finished / split).rename(folder / split)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_atomically(folder / MANIFEST, text + "\n")
    shutil.rmtree(working)
    return Result(folder, manifest)


def _check_something_passed(config: Config, tally: Tally) -> None:
    read = sum_of(tally.read.values())
    if not read.documents:
        names = ", ".join(f"`{source}`" for source in config.source_list)
        raise DataError(f"{names} hold no document", hint="were the files written completely?")
    filters = (tally.binary, tally.length, tally.language)
    if sum(each.amount.documents for each in filters) == read.documents:
        reasons = {reason: count for each in filters for reason, count in each.reasons.items()}
        raise DataError(
            f"nothing is left of the {read.documents:,} documents: "
            + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()),
            hint="loosen `length` or `languages`, or look at "
            f"{next(where for each in filters for where in each.examples)}",
        )


def _binary_notice(binary: Removed) -> str:
    count = binary.amount.documents
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(binary.reasons.items()))
    return (
        f"warning: {count:,} {'document is' if count == 1 else 'documents are'} no text and left "
        f"out ({reasons}): {', '.join(binary.examples)}"
        + (" ..." if count > len(binary.examples) else "")
    )


# The folder


def check_folder(folder: Path, config: Config, *, resume: bool) -> None:
    """Refuse a folder that holds anything else than this very corpus, finished or not.

    Raises:
        RunFolderError: it does, or a corpus is there and ``resume`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"`{folder}` is a file", hint="give `output` another name")
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        return
    finished, unfinished = (folder / MANIFEST).exists(), (folder / WORKING).is_dir()
    if not finished and not unfinished:
        raise RunFolderError(
            f"`{folder}` is not empty, and holds no corpus", hint="give `output` another name"
        )
    if not resume:
        raise RunFolderError(
            f"`{folder}` holds {'a finished' if finished else 'an unfinished'} corpus",
            hint="give `output` another name"
            + ("" if finished else f", go on with it by `--resume`, or remove {folder / WORKING}"),
        )
    if finished:
        _check_same(folder, _read_manifest(folder), _settings(config))


def _remove_if_nothing_is_done(folder: Path) -> None:
    """A source that failed at its beginning leaves nothing that would be in the way."""
    working = folder / WORKING
    if not any(working.glob("chunk-*.arrow")):
        shutil.rmtree(working)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(
            f"`{path}` cannot be read: {error}", hint="give `output` another name"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise RunFolderError(
            f"`{folder}` holds something else than a corpus", hint="give `output` another name"
        )
    return manifest


def _settings(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=set(CHANGEABLE))


def _make_plan(config: Config) -> dict[str, Any]:
    """All that the bytes of the corpus depend on."""
    return {
        "version": fulltune.__version__,
        "settings": _settings(config),
        "sources": {source: source_fingerprint(source) for source in config.source_list},
        "evaluation": {
            source: source_fingerprint(source) for source in config.decontaminate.against
        },
    }


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / WORKING / PLAN
    if not path.exists():
        write_atomically(path, json.dumps(plan, ensure_ascii=False))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    _check_same(folder, found, plan["settings"])
    for part in ("sources", "evaluation"):
        for source, fingerprint in plan[part].items():
            if found[part][source] != fingerprint:
                raise RunFolderError(
                    f"`{source}` has changed since the corpus in `{folder}` was begun",
                    hint="give `output` another name, restore the file, or remove "
                    f"{folder / WORKING}",
                )
    if found["version"] != plan["version"]:
        raise RunFolderError(
            f"the corpus in `{folder}` was begun by version {found['version']} of fulltune",
            hint="give `output` another name, or go on with that version",
        )


def _check_same(folder: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    try:
        before, now = (
            build_config(CorpusConfig, values) for values in (found["settings"], settings)
        )
    except ConfigError as error:
        raise RunFolderError(
            f"`{folder}` holds a corpus whose settings this version cannot read: {error}",
            hint="give `output` another name",
        ) from None
    differing = differing_keys(before, now)
    if differing:
        raise RunFolderError(
            f"`{folder}` holds a corpus of other settings (differs in "
            f"{', '.join(f'`{key}`' for key in differing)})",
            hint="give `output` another name, or resume with the settings it was begun with"
            + (f", or remove {folder / WORKING}" if (folder / WORKING).exists() else ""),
        )


@contextmanager
def _write_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except FulltuneError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"`{folder}` cannot be written: {error}",
            hint="free some space, or make it writable, then go on with `--resume`; finished "
            "chunks are kept",
        ) from None
