"""The Markdown of model cards as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape


def render_markdown(text: str) -> Markup:
    """The Markdown that model cards use: headings, tables, lists, paragraphs, `code`, **bold**."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        heading = re.match(r"(#{1,6}) +(.*)", lines[0])
        if heading and len(lines) == 1:
            # The page has a heading of its own above.
            level = min(6, len(heading[1]) + 2)
            inline = _inline(heading[2])
            blocks.append(Markup("<h{0}>{1}</h{0}>").format(level, inline))
        elif lines[0].startswith("|"):
            blocks.append(_markdown_table(lines))
        elif all(line.lstrip().startswith(("- ", "* ")) for line in lines):
            items = [Markup("<li>{}</li>").format(_inline(line.lstrip()[2:])) for line in lines]
            blocks.append(Markup("<ul>{}</ul>").format(Markup("").join(items)))
        else:
            blocks.append(Markup("<p>{}</p>").format(_inline(" ".join(lines))))
    return Markup("\n").join(blocks)


def _markdown_table(lines: Sequence[str]) -> Markup:
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    body = [row for row in rows if not all(set(cell.strip()) <= set(":-") for cell in row)]
    html = []
    for index, row in enumerate(body):
        tag = "th" if index == 0 else "td"
        cells = [
            Markup("<{0}>{1}</{0}>").format(tag, _inline(cell.strip().replace("\\|", "|")))
            for cell in row
        ]
        html.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return Markup('<div class="scroll"><table>{}</table></div>').format(Markup("").join(html))


def _inline(text: str) -> Markup:
    safe = str(escape(text.replace("&lt;", "<")))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe))
