"""`fulltune tokenizer`: train one on text, compare several, extend that of a trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fulltune import __version__
from fulltune.assets.building import built_whole
from fulltune.data.documents import is_held_out, read_documents
from fulltune.data.records import check_source, source_fingerprint
from fulltune.data.tokenizer_statistics import TokenizerStatistics, measure_tokenizer
from fulltune.data.tokenizers import (
    FAMILY_TOKENS,
    INFO_FILE,
    TokenizerConfig,
    check_output,
    readable_piece,
    train_tokenizer,
    write_tokenizer,
)
from fulltune.errors import ConfigError, DataError
from fulltune.train.run_folder import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """A new tokenizer, and what it was measured on."""

    folder: Path
    statistics: TokenizerStatistics
    measured_on: Literal["held_out", "training"]
    num_training_documents: int


@dataclass(frozen=True)
class Extended:
    """A model with new tokens."""

    folder: Path
    pieces: dict[str, list[str]]
    """Each new token -> the tokens that stood for it before, as readable text."""
    vocab_size: int
    """Rows of the embeddings now."""


def train(
    sources: Sequence[str],
    output: Path,
    config: TokenizerConfig,
    *,
    columns: Mapping[str, str] | None = None,
) -> Trained:
    """Train a tokenizer and write it as a folder.

    The sources are read three times: to count what is held out, to train, to measure.

    Raises:
        ConfigError: the output exists, or the settings contradict each other.
        DataError: a source is missing, empty or not text, or supports no such vocabulary.
        RunFolderError: the output cannot be written.
    """
    check_output(output)
    for source in sources:
        check_source(source)
    fingerprints = [
        {"source": source, "fingerprint": source_fingerprint(source)} for source in sources
    ]
    num_documents = num_held_out = 0
    for document in read_documents(sources, columns=columns):
        num_documents += 1
        num_held_out += is_held_out(document, config.held_out)
    # A source of one or two documents may have none on one side; then all of it is trained on, and
    # the statistics say that they are of the training text.
    splits = 0 < num_held_out < num_documents
    share = config.held_out if splits else 0.0
    tokenizer = train_tokenizer(
        read_documents(sources, columns=columns, held_out=share, side="training"), config
    )
    measured_on: Literal["held_out", "training"] = "held_out" if splits else "training"
    statistics = measure_tokenizer(
        tokenizer,
        read_documents(sources, columns=columns, held_out=share, side=measured_on),
    )
    num_training = num_documents - (num_held_out if splits else 0)
    info: dict[str, Any] = {
        "fulltune": __version__,
        "sources": fingerprints,
        "columns": dict(columns or {}),
        "settings": {
            **config.model_dump(mode="json"),
            "algorithm": config.algorithm or FAMILY_TOKENS[config.family].algorithm,
            "vocab_size": len(tokenizer),
        },
        "num_training_documents": num_training,
        "measured_on": measured_on,
        "statistics": statistics.to_json(),
    }
    with writing(output):
        write_tokenizer(tokenizer, output, info=info)
    return Trained(output, statistics, measured_on, num_training)


def check_same(
    sources: Sequence[str],
    folder: Path,
    config: TokenizerConfig,
    *,
    columns: Mapping[str, str] | None = None,
) -> None:
    """See that `train` would make the tokenizer that a folder holds.

    Raises:
        ConfigError: it was made with other settings or of other text.
    """
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    family = FAMILY_TOKENS[config.family]
    algorithm = config.algorithm or family.algorithm
    wanted = {**config.model_dump(mode="json"), "algorithm": algorithm}
    if config.vocab_size is None:
        wanted["vocab_size"] = family.vocab_size
        if algorithm == "characters":
            del wanted["vocab_size"]  # as many as the text has
    # A tokenizer of an earlier version lacks the settings that came since, and is without them.
    found = {**TokenizerConfig(family=config.family).model_dump(mode="json"), **info["settings"]}
    differing = [name for name, value in wanted.items() if found[name] != value]
    made_of = {part["source"]: part["fingerprint"] for part in info["sources"]}
    if made_of != {source: source_fingerprint(source) for source in sources}:
        differing.append("train")
    if info["columns"] != dict(columns or {}):
        differing.append("columns")
    if differing:
        raise ConfigError(
            f"`{folder}` holds a tokenizer of other settings or text (differs in "
            f"{', '.join(f'`{name}`' for name in differing)})",
            hint="give `output` another name, or remove the folder",
        )


def compare(
    models: Sequence[str], data: str, *, columns: Mapping[str, str] | None = None
) -> dict[str, TokenizerStatistics]:
    """Measure the tokenizers of several folders or models on the same text.

    Raises:
        ConfigError: one is named twice.
        ModelError: there is no tokenizer.
        DataError: the data is missing, empty or not text.
    """
    if len(set(models)) != len(models):
        raise ConfigError("a tokenizer is named twice", hint="name each once")
    check_source(data)
    tokenizers = {model: open_tokenizer(model) for model in models}
    return {
        model: measure_tokenizer(tokenizer, read_documents([data], columns=columns))
        for model, tokenizer in tokenizers.items()
    }


def open_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a tokenizer folder, or of any source of a model."""
    from fulltune.models.loading import TOKENIZER_FILES, load_tokenizer
    from fulltune.models.sources import resolve_model

    folder = Path(source).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(folder)
    return load_tokenizer(resolve_model(source))


def extend(model: str, tokens: Sequence[str], output: Path) -> Extended:
    """Add tokens to a trained model: its tokenizer and its embeddings.

    Raises:
        ConfigError: the output exists, or a token cannot be added.
        ModelError: the model cannot be loaded.
        RunFolderError: the output cannot be written.
    """
    from fulltune.models.loading import load_tokenizer, read_info, save_model
    from fulltune.models.sources import resolve_model
    from fulltune.models.vocabulary import add_tokens, grow_embeddings, load_as_saved

    check_output(output)
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    pieces_of_id = add_tokens(tokenizer, tokens)
    loaded = load_as_saved(folder)
    grow_embeddings(loaded, pieces_of_id)
    pieces = {
        token: [readable_piece(tokenizer, piece) for piece in ids]
        for token, ids in zip(tokens, pieces_of_id.values(), strict=True)
    }
    with writing(output), built_whole(output) as building:
        info = {**read_info(folder), "added_tokens": {"model": model, "pieces": pieces}}
        save_model(loaded, tokenizer, building, info=info)
    return Extended(output, pieces, int(loaded.config.get_text_config().vocab_size))


def read_tokens(path: Path) -> list[str]:
    """Tokens of a file, one a line; empty lines are passed over.

    Raises:
        DataError: the file cannot be read, holds no token, or one twice, with its line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"`{path}` cannot be read: {error.strerror}", hint="one token a line"
        ) from None
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}",
                hint="save the file as UTF-8",
            ) from None
        if not token.strip():
            continue
        if token in first_line:
            raise DataError(
                f"{path}:{number}: `{token}` stands in line {first_line[token]} already",
                hint="give each token once",
            )
        first_line[token] = number
    if not first_line:
        raise DataError(f"`{path}` is empty: it holds no tokens", hint="write one token a line")
    return list(first_line)
