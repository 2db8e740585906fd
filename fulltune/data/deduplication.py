"""Exact and near duplicates among millions of documents, of which only hashes are held.

Near duplicates are found by MinHash (Broder, 1997) with banded locality-sensitive hashing: the
signatures lie in a file, and the bands are sorted one after the other. That takes 8 bytes a
document and band at most, where a table of all bands in memory would take kilobytes a document.

Shape suffixes: N documents, P permutations.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fulltune.config import Settings
from fulltune.data.ngrams import UInt64Array, hash_ngrams
from fulltune.errors import MissingExtraError

Int64Array: TypeAlias = npt.NDArray[np.int64]

DIGEST_BYTES = 16
_BLOCK_DOCUMENTS = 2**14


class NearDuplicatesConfig(Settings):
    """Which documents are nearly the same."""

    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Documents as similar as this or more are one (Jaccard similarity of their shingles, as
    MinHash estimates it); 0.8 is usual. Null looks for none."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Length of a signature: more estimate better, and take longer."""
    shingle: Annotated[int, Field(ge=1, le=32)] = 5
    """Tokens of a shingle: words, and characters where a script has no spaces."""


def document_digest(folded: str) -> bytes:
    """Equal for texts that are equal once folded."""
    return hashlib.blake2b(folded.encode(), digest_size=DIGEST_BYTES).digest()


def find_exact_duplicates(digests: UInt64Array) -> Int64Array:
    """For each document the first that is equal to it: itself, if there is none before.

    Args:
        digests: uint64 [N, 2].
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    del ordered
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


# Near duplicates


class Signer:
    """MinHash signatures, by `datasketch`.

    Raises:
        MissingExtraError: datasketch is not installed.
    """

    def __init__(self, config: NearDuplicatesConfig) -> None:
        self._minhash = _datasketch().MinHash(
            config.permutations, seed=1, hashfunc=int, scheme="affine32"
        )
        self._shingle = config.shingle

    def sign(self, token_hashes: UInt64Array, digest: bytes) -> bytes:
        """The signature, uint32 [P]; a document shorter than a shingle is like its equals only."""
        shingles = hash_ngrams(token_hashes, self._shingle) >> np.uint64(32)
        values = shingles.tolist() or [int.from_bytes(digest[:4], "little")]
        self._minhash.clear()
        self._minhash.update_batch(values)
        signature: bytes = self._minhash.hashvalues.astype("<u4").tobytes()
        return signature


def choose_bands(config: NearDuplicatesConfig) -> tuple[int, int]:
    """Bands and rows of each that err least about the threshold.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    index = _datasketch().MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
    return int(index.b), int(index.r)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise MissingExtraError(
            "`near_duplicates` needs the package `datasketch`, which is not installed",
            hint="pip install 'fulltune[corpus]'",
        ) from None
    return datasketch


def find_near_duplicates(
    signatures: Path,
    candidates: Int64Array,
    config: NearDuplicatesConfig,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, int]:
    """Documents that are like an earlier one, each with that one; which itself is kept.

    Args:
        signatures: a file of uint32 [N, P].
        candidates: int64, the rows to look at, ascending.
        config: with a threshold.
        progress: called with the number of bands done, and of all.
    """
    assert config.threshold is not None
    num_bands, num_rows = choose_bands(config)
    documents, groups = [], []
    num_groups = 0
    for band in range(num_bands):
        progress(band, num_bands)
        keys = _band_keys(signatures, candidates, config.permutations, band * num_rows, num_rows)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        del keys
        equal = ordered[1:] == ordered[:-1]
        shared = np.zeros(len(order), dtype=bool)
        shared[1:] |= equal
        shared[:-1] |= equal
        begins = np.concatenate([[True], ~equal])[shared]
        documents.append(candidates[order[shared]])
        groups.append(num_groups - 1 + np.cumsum(begins))
        num_groups += int(begins.sum())
    of_document = np.concatenate(documents)
    by_document = np.argsort(of_document, kind="stable")
    of_group = np.concatenate(groups)[by_document]
    del documents, groups
    return _keep_first(signatures, of_document[by_document], of_group, num_groups, config)


def _keep_first(
    signatures: Path,
    documents: Int64Array,
    groups: Int64Array,
    num_groups: int,
    config: NearDuplicatesConfig,
) -> dict[int, int]:
    """A document falls to an earlier one that is itself kept, and is similar by all permutations.

    A chain of small changes so does not remove its far end, which nothing kept resembles.

    Args:
        signatures: a file of uint32 [N, P].
        documents: ascending, each as often as it shares a band with others.
        groups: which documents share it; as long as ``documents``.
        num_groups: groups are numbered from 0.
        config: with a threshold.
    """
    assert config.threshold is not None
    duplicates: dict[int, int] = {}
    # Nearly always one document of a group is kept; lists for all would be most of the memory.
    first_kept = np.full(num_groups, -1, dtype=np.int64)
    also_kept: dict[int, list[int]] = {}
    limits = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    with signatures.open("rb") as file:

        def signature(document: int) -> npt.NDArray[np.uint32]:
            file.seek(document * config.permutations * 4)
            return np.frombuffer(file.read(config.permutations * 4), dtype="<u4")

        for start, end in itertools.pairwise(limits):
            document, own_groups = int(documents[start]), groups[start:end]
            heads = first_kept[own_groups]
            earlier = {head for head in heads.tolist() if head >= 0}
            for group in own_groups[heads >= 0].tolist():
                earlier.update(also_kept.get(group, ()))
            own = signature(document) if earlier else None
            for kept in sorted(earlier):
                if float(np.mean(signature(kept) == own)) >= config.threshold:
                    duplicates[document] = kept
                    break
            else:
                first_kept[own_groups[heads < 0]] = document
                for group in own_groups[heads >= 0].tolist():
                    also_kept.setdefault(group, []).append(document)
    return duplicates


def _band_keys(
    signatures: Path, candidates: Int64Array, num_permutations: int, start: int, num_rows: int
) -> UInt64Array:
    """One hash of the rows of a band for each candidate; the file is read in blocks."""
    keys = np.empty(len(candidates), dtype=np.uint64)
    with signatures.open("rb") as file:
        done = block_start = 0
        while block := file.read(_BLOCK_DOCUMENTS * num_permutations * 4):
            block_NP = np.frombuffer(block, dtype="<u4").reshape(-1, num_permutations)
            end = int(np.searchsorted(candidates, block_start + len(block_NP)))
            rows = block_NP[candidates[done:end] - block_start, start : start + num_rows]
            key = np.zeros(len(rows), dtype=np.uint64)
            for column in range(num_rows):
                key = (key + rows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            keys[done:end] = key
            done, block_start = end, block_start + len(block_NP)
    return keys


def as_pairs(digests: Sequence[bytes]) -> UInt64Array:
    """Digests as uint64 [N, 2]."""
    return np.array(digests, dtype=f"V{DIGEST_BYTES}").view("<u8").reshape(-1, 2)
