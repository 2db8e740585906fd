"""`fulltune attention`: the attention weights of a model on a text, checked by the equation."""

from __future__ import annotations

import re
from pathlib import Path

from fulltune.data.token_labels import label_tokens
from fulltune.errors import ConfigError, DataError
from fulltune.models.attention_equation import equation_of, trace_attention
from fulltune.models.families import family_of, num_layers
from fulltune.models.loading import context_length, load_body, load_model_config, load_tokenizer
from fulltune.models.sources import resolve_model
from fulltune.report.attention_page import AttentionReport, render_attention_page
from fulltune.report.attention_picture import require_picture, write_attention_picture
from fulltune.train.run_folder import write_atomically, writing

MAX_TOKENS = 2048
"""Tokens of a text: a head has the square of them in weights."""


def run(
    model: str,
    text: str,
    *,
    layers: str | None = None,
    heads: str = "all",
    html: Path | None = None,
    png: Path | None = None,
) -> AttentionReport:
    """Trace a text through a model, check its attention, and draw it where asked.

    Args:
        model: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        text: what the model reads.
        layers: `all`, or numbers and ranges such as `0,3-5`; None is the first and the last.
        heads: likewise.
        html: also write a page.
        png: also write a picture.

    Raises:
        ConfigError: a layer or head does not exist, or there is too much to draw.
        DataError: the text is empty, not UTF-8, or longer than the model's context.
        ModelError: the attention of the model has no known equation.
        RunFolderError: a file cannot be written.
    """
    if not text.strip():
        raise DataError("the text is empty", hint='give some words: fulltune attention MODEL "..."')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start + 1} of the text is half of one, or a byte that is not UTF-8",
            hint="was it cut inside a character, or saved in another encoding?",
        ) from None
    for option, path in (("--html", html), ("--png", png)):
        if path is not None and path.exists() and not path.is_file():
            raise ConfigError(f"`{option} {path}` is not a file", hint="give the name of a file")
    folder = resolve_model(model)
    config = load_model_config(folder)
    equation = equation_of(config)
    num = num_layers(config)
    chosen_layers = parse_numbers(layers or f"0,{num - 1}", num, "layer")
    chosen_heads = parse_numbers(heads, config.get_text_config().num_attention_heads, "head")
    if png is not None:
        require_picture(len(chosen_layers) * len(chosen_heads))

    tokenizer = load_tokenizer(folder)
    inputs = dict(tokenizer(text, return_tensors="pt"))
    if family_of(config).can_generate:
        inputs.pop("token_type_ids", None)  # decoders are trained without segments
    input_ids = [int(token) for token in inputs["input_ids"][0]]
    limit = min(context_length(config), MAX_TOKENS)
    if not 0 < len(input_ids) <= limit:
        raise DataError(
            f"the text has {len(input_ids):,} tokens; the model reads 1 to {limit:,} here",
            hint="shorten the text",
        )
    traced = trace_attention(load_body(folder, attention="eager"), inputs, chosen_layers)
    labels = label_tokens(
        lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        input_ids,
        tokenizer.convert_ids_to_tokens(input_ids),
    )
    report = AttentionReport(
        model, equation.name, equation.formula, labels, traced, tuple(chosen_heads)
    )
    if html is not None:
        with writing(html):
            write_atomically(html, render_attention_page(report))
    if png is not None:
        with writing(png):
            write_attention_picture(report, png)
    return report


def parse_numbers(text: str, count: int, what: str) -> list[int]:
    """Numbers and ranges such as `0,3-5`, or `all`, in rising order.

    Raises:
        ConfigError: it is written otherwise, or a number is not below ``count``.
    """
    possible = f"the model has {count}: 0 to {count - 1}, such as `--{what}s 0,{count - 1}`"
    if text.strip() == "all":
        return list(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(
                f"`--{what}s {text}` is neither numbers nor ranges",
                hint=f"write `all`, or such as `0,3-5`; {possible}",
            )
        if last >= count:
            raise ConfigError(f"{what} {last} does not exist", hint=possible)
        numbers.update(range(first, last + 1))
    return sorted(numbers)
