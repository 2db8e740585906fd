"""`fulltune preview`: what a run would train on, before it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from fulltune.config import load_config, read_yaml
from fulltune.data.arranged import JoinedExamples
from fulltune.data.joined import JoinedDataset
from fulltune.data.loader import Loader
from fulltune.data.padding import measure_padding
from fulltune.data.preview_facts import to_json
from fulltune.data.preview_page import render_html
from fulltune.data.preview_view import (
    SampleView,
    TokenState,
    TokenView,
    render_terminal,
    view_states,
    view_tokens,
)
from fulltune.data.tasks import Example
from fulltune.errors import ConfigError
from fulltune.memory.plan import MICRO_BATCH_TOKENS
from fulltune.models.presets import is_new_model
from fulltune.objectives.prompted_lm import PromptedLM
from fulltune.objectives.sequence_to_sequence import SequenceToSequence, split_pair
from fulltune.recipes import pretrain, settings_files
from fulltune.recipes.finetune import Config
from fulltune.recipes.noise_view import count_examples, make_noisy_samples
from fulltune.recipes.prepare import (
    UNLIMITED,
    Prepared,
    check_task,
    find_examples,
    make_objective,
    open_base,
    prepare,
)
from fulltune.runtime import choose_device
from fulltune.tracking import Display, make_display
from fulltune.train.run_folder import write_atomically, writing

MAX_SHOWN_REMOVED = 2000
"""Removed tokens of an example that are still shown."""


def run(
    config: Config,
    *,
    num_samples: int = 3,
    html: Path | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> bool:
    """Show the examples of a run by token, with counts and findings.

    Args:
        config: the settings of the run.
        num_samples: examples shown by token.
        html: also write a page.
        as_json: print facts and findings as JSON instead of a table.
        console: where the table goes; None is stdout.

    Returns:
        Whether training would start: no finding is an error.
    """
    if html is not None and html.exists() and not html.is_file():
        raise ConfigError(f"`--html {html}` is not a file", hint="give the name of a file")
    if html is not None and not html.parent.is_dir():
        raise ConfigError(
            f"`--html {html}` cannot be made: there is no folder `{html.parent}`",
            hint="make the folder, or give another file",
        )
    with make_display(title="preview") as display:
        prepared = _prepare(config, display)
        for note in prepared.notes:
            display.stage(note)
        facts, widths = prepared.facts, dict[int, int]()
        arranged_here = isinstance(prepared.dataset, JoinedExamples)
        if arranged_here:
            arranged = count_examples(prepared, config.seed)
            facts = facts.model_copy(update={"arranged": arranged})
        elif (
            not prepared.objective.packing
            and prepared.objective.head != "sequence_to_sequence"  # its two sides are padded apart
            and len(prepared.train)
        ):
            padding, widths = measure_padding(
                make_loader(prepared, config), prepared.dataset.lengths
            )
            facts = facts.model_copy(update={"padding": padding})
            display.stage(
                f"padding counted in forward passes of {padding.micro_batch_tokens:,} tokens, "
                "which a run with less memory makes smaller"
            )
        samples = (
            make_samples(prepared, config, num_samples, widths=widths)
            if not arranged_here
            else make_noisy_samples(prepared, num_samples, config.seed)
        )
    if as_json:
        sys.stdout.write(to_json(facts, prepared.findings) + "\n")
    else:
        render_terminal(facts, prepared.findings, samples, console or Console())
    if html is not None:
        title = f"What {config.run_dir} trains on"
        with writing(html):
            write_atomically(html, render_html(facts, prepared.findings, samples, title=title))
        display.notice(f"written to {html}")
    return all(finding.level != "error" for finding in prepared.findings)


def read_config(path: Path, overrides: Sequence[str]) -> Config:
    """The settings of a run, of pre-training where they name what only that has.

    Raises:
        ConfigError: as `load_config`.
    """
    values = read_yaml(path)
    settings_files.require(path, values, "finetune", "pretrain")
    names = {*values, *(key.partition("=")[0].split(".")[0].strip() for key in overrides)}
    is_new = is_new_model(str(values.get("model", "")))
    only_pretraining = pretrain.Config.model_fields.keys() - Config.model_fields.keys()
    kind = pretrain.Config if is_new or not names.isdisjoint(only_pretraining) else Config
    return load_config(kind, path, overrides)


def _prepare(config: Config, display: Display) -> Prepared:
    def progress(done: int) -> None:
        display.progress("records tokenized", done, None)

    if isinstance(config, pretrain.Config):
        pretrain.check_settings(config)
        check_task(config.task)
        _, objective = pretrain.open_start(config, with_weights=False)
        display.stage("reading and tokenizing the data")
        return pretrain.prepare(config, objective, progress)
    windows = make_objective(open_base(config.model, config.task), config.task)
    display.stage("reading and tokenizing the data")
    return prepare(
        windows, config.task, seed=config.seed, num_workers=config.num_workers, progress=progress
    )


def make_loader(prepared: Prepared, config: Config) -> Loader:
    """The steps of the run on one rank, its forward passes as large as memory ever makes them."""
    # A GPU that is named need not be in this machine: nothing runs on it here.
    device_type = config.device.partition(":")[0]
    if device_type not in MICRO_BATCH_TOKENS:
        device_type = choose_device(config.device).type
    return Loader(
        prepared.dataset.lengths,
        prepared.train,
        batch=config.batch,
        micro_batch_tokens=MICRO_BATCH_TOKENS[device_type][0],
        seed=config.seed,
        packing=prepared.objective.packing,
    )


def make_samples(
    prepared: Prepared, config: Config, num_samples: int, *, widths: Mapping[int, int]
) -> list[SampleView]:
    """Some training examples with what truncation would remove: the first rows and the longest.

    Args:
        prepared: the data.
        config: the settings of the run.
        num_samples: how many.
        widths: tokens of an example's row in its forward pass, padding included; for a model that
            packs, nothing.
    """
    assert isinstance(prepared.dataset, JoinedDataset)
    chosen = prepared.train[: max(num_samples - 1, 1)].tolist() if num_samples else []
    if num_samples > 1 and len(prepared.train) > len(chosen):
        removed = prepared.dataset.num_removed[prepared.train]
        longest = prepared.dataset.lengths[prepared.train] + removed
        chosen.append(int(prepared.train[longest.argmax()]))
    places = {prepared.dataset.where(index): index for index in reversed(chosen)}
    wheres = [prepared.dataset.where(index) for index in dict.fromkeys(chosen)]
    examples = find_examples(config.task, wheres, include_validation=False)
    objective = prepared.objective
    whole = objective
    if config.task.kind != "text":  # a text is cut into windows, and nothing of it is removed
        whole = replace(cast(Any, objective), max_length=UNLIMITED)

    def decode(ids: list[int]) -> str:
        return str(objective.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    padding = TokenView(str(objective.tokenizer.pad_token), "padding")
    views = []
    for where in dict.fromkeys(wheres):
        if where not in examples:
            continue
        if isinstance(objective, SequenceToSequence | PromptedLM):
            tokens = view_pair(objective, examples[where], decode)
            tokens += [padding] * max(0, widths.get(places[where], 0) - len(tokens))
            views.append(SampleView(where, None, tokens))
            continue
        encoded = whole.encode(examples[where])[0]
        kept = min(len(encoded["input_ids"]), objective.max_length)
        shown = slice(0, kept + MAX_SHOWN_REMOVED)
        input_ids = encoded["input_ids"][shown]
        tokens = view_tokens(decode, input_ids, encoded["targets"][shown], kept)
        missing = widths.get(places[where], kept) - kept
        tokens += [padding] * missing
        views.append(SampleView(where, ", ".join(encoded["labels"]) or None, tokens))
    return views


def view_pair(
    objective: SequenceToSequence | PromptedLM,
    example: Example,
    decode: Callable[[list[int]], str],
) -> list[TokenView]:
    """A source and its target by token, with what truncation would remove of each.

    Args:
        objective: encodes the example.
        example: a source with its target.
        decode: as in `view_tokens`.
    """
    longest = {"max_length": UNLIMITED, "max_target_length": UNLIMITED}
    if isinstance(objective, PromptedLM):
        longest["context"] = UNLIMITED
    encoded = replace(cast(Any, objective), **longest).encode(example)[0]
    source, target = split_pair(encoded)
    kept = replace(objective, too_long="truncate").encode(example)[0]
    kept_source, kept_target = split_pair(kept)
    # A source is cut before its end token, or before what its prompt writes after it.
    num_before = 0
    while num_before < len(kept_source) and source[num_before] == kept_source[num_before]:
        num_before += 1
    num_removed = len(source) - len(kept_source)
    num_after = len(kept_source) - num_before
    num_cut = len(target) - len(kept_target)
    runs: list[tuple[TokenState, int]] = [
        ("context", num_before),
        ("truncated", num_removed),
        ("context", num_after),
        ("trained", len(kept_target)),
        ("truncated", num_cut),
        ("context", len(encoded["input_ids"]) - len(source) - len(target)),
    ]
    states = [state for state, count in runs for _ in range(count)]
    return view_states(decode, encoded["input_ids"], states)
