"""Chat templates that are built in or read from a file."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from fulltune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fulltune")

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template: a built-in name (`chatml`) or the path of a Jinja file.

    No token is added: `vocabulary.add_markers` does that for a built-in template. Where a marker of
    a file's template is not one token, the log says so: the model then learns it as the several
    tokens it is.

    Raises:
        ConfigError: no such template, or it cannot be rendered.
    """
    if template in CHAT_TEMPLATES:
        text = CHAT_TEMPLATES[template]
    elif (path := Path(template).expanduser()).is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat template `{template}` cannot be read: {error}", hint="save it as UTF-8"
            ) from None
    else:
        raise ConfigError(
            f"chat template `{template}` is neither built in nor a file",
            hint="give the path of a Jinja file, or "
            + " or ".join(f"`{name}`" for name in CHAT_TEMPLATES),
        )
    previous, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateError as error:
        tokenizer.chat_template = previous
        line = getattr(error, "lineno", None)
        raise ConfigError(
            f"chat template {f'{template}:{line}' if line else f'`{template}`'} "
            f"cannot be rendered: {error}",
            hint="correct the template; it is Jinja, given `messages` and `add_generation_prompt`",
        ) from error
    for marker in () if template in CHAT_TEMPLATES else template_markers(text):
        num_tokens = len(tokenizer.encode(marker, add_special_tokens=False))
        if num_tokens != 1:
            logger.info("chat template: `%s` is %d tokens in this vocabulary", marker, num_tokens)


def template_markers(template: str) -> list[str]:
    """The markers of turns in the text of a chat template, `<|im_end|>` and its kin."""
    return sorted(set(re.findall(r"<\|\w+\|>", template)))
