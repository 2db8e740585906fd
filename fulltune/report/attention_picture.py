"""`fulltune attention --png`: heat maps of attention weights as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from fulltune.errors import AssetError, ConfigError, MissingExtraError
from fulltune.report.attention_page import AttentionReport, require_drawable

MAX_MAPS = 64
"""Heat maps in one picture: layers times heads."""
INCHES_PER_TOKEN = 0.2
MOST_PIXELS = 12_000
"""Longest side of a picture; a larger one is drawn coarser."""
DOTS_PER_INCH = 130
LABEL_LENGTH = 16


def require_picture(num_maps: int) -> None:
    """Check, before a model is loaded, that a picture can be made.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: there are too many heat maps.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "a picture is drawn with the package `matplotlib`, which is not installed",
            hint="pip install 'fulltune[plot]', or write a page with `--html FILE`",
        ) from None
    if num_maps > MAX_MAPS:
        raise ConfigError(
            f"{num_maps} heat maps are too many for a picture, which holds {MAX_MAPS}",
            hint="choose fewer with `--layers` and `--heads`, or write a page with `--html FILE`",
        )


def write_attention_picture(report: AttentionReport, output: Path) -> None:
    """Draw layers down and heads across, every cell on the same scale from 0 to 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: there are too many tokens or heat maps.
        AssetError: no installed font has the characters of the text.
        OSError: the file cannot be written.
    """
    require_drawable(report)
    num_rows, num_columns = len(report.layers), len(report.heads)
    require_picture(num_rows * num_columns)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [_shorten(label) for label in report.labels]
    size = max(1.8, INCHES_PER_TOKEN * len(labels))
    width, height = size * num_columns + 2.4, size * num_rows + 2.4
    # `$` would begin a formula, and a font without a character would draw a box.
    families = fonts_for("".join(labels))
    with rc_context({"font.family": families, "text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
        places = range(len(labels))
        for row, layer in enumerate(report.layers):
            for column, head in enumerate(report.heads):
                axis = axes[row, column]
                image = axis.imshow(
                    layer.weights_NQK[head].numpy(), vmin=0.0, vmax=1.0, cmap="Blues"
                )
                axis.set_title(f"layer {layer.layer}, head {head}", fontsize=9)
                axis.set_xticks(places, labels if row == num_rows - 1 else [], rotation=90)
                axis.set_yticks(places, labels if column == 0 else [])
                axis.tick_params(labelsize=8, length=0)
        figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
        dots = min(DOTS_PER_INCH, MOST_PIXELS / max(width, height))
        figure.savefig(output, dpi=dots, format="png")


def fonts_for(text: str) -> list[str]:
    """Names of installed fonts that have every character of a text between them.

    Raises:
        AssetError: some character is in none.
    """
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")  # comes with matplotlib
    # Searched on the disk each time: the list that matplotlib keeps lacks fonts installed later.
    paths = [own, *sorted(font_manager.findSystemFonts())]
    missing = {ord(character) for character in text if character != " "}
    names: list[str] = []
    for path in paths:
        try:
            font = font_manager.get_font(path)
            found = missing & set(font.get_charmap())
        except (OSError, RuntimeError):  # a broken font, or of a kind that cannot be drawn
            continue
        # The first of the list is the usual one, of which the figures are written too.
        if found or not names:
            if path != own:
                font_manager.fontManager.addfont(path)
            names.append(font.family_name)
            missing -= found
        if not missing:
            return names
    shown = " ".join(sorted(map(chr, missing))[:8])
    raise AssetError(
        f"no installed font has the characters {shown}, so the picture would show boxes",
        hint="install a font that has them (for Chinese, `apt-get install fonts-wqy-zenhei` or "
        "`fonts-noto-cjk`), or write a page with `--html FILE`",
    )


def _shorten(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"
