"""Rank, device, precision, seed and the machine: the only reader of the environment."""

from __future__ import annotations

import atexit
import ctypes
import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fulltune.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp32"]


def cache_dir() -> Path:
    """Where downloads and tokenized data are kept: `FULLTUNE_CACHE`, else the user's cache."""
    if chosen := os.environ.get("FULLTUNE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fulltune"


def npm_registry() -> str | None:
    """Address of the npm registry that the user has set, without a slash at its end."""
    names = ("NPM_CONFIG_REGISTRY", "npm_config_registry")  # npm reads both
    chosen = next(filter(None, map(os.environ.get, names)), None)
    return chosen and chosen.rstrip("/")


@dataclass(frozen=True)
class Runtime:
    """Where this process runs, and which of the processes of the run it is."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0


def is_main_process() -> bool:
    """Whether this is the first rank of the run, before and after there is a group of them."""
    return int(os.environ.get("RANK", "0")) == 0


def num_ranks() -> int:
    """Processes that share each step, before and after there is a group of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_runtime(device: str = "auto") -> Runtime:
    """Choose the device and, under `torchrun`, join the other ranks.

    Raises:
        ConfigError: a device was asked for that is not there, or one GPU for several ranks.
    """
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = num_ranks()
    if world_size > 1 and device.startswith("cuda:"):
        raise ConfigError(
            f"`device` is {device!r}, which {world_size} ranks cannot share",
            hint="write `device: cuda`: each rank takes the GPU of its own number",
        )
    chosen = choose_device(device, local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        # Left at the end of the process, not of a run: a second group would find stale keys of the
        # first in the launcher's store, and wait for ever.
        atexit.register(dist.destroy_process_group)
    return Runtime(chosen, int(os.environ.get("RANK", "0")), world_size)


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of giving it back to the system.

    A training step frees what the next one allocates again. By default glibc returns it, and the
    system hands it out page by page, each filled with zeros: 170,000 page faults in a step of
    SmolLM2-135M over 1,632 tokens, a tenth of its time. The peak is the same.

    Returns:
        Whether there is such a setting here; other C libraries than glibc have none.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    library = _glibc()
    if library is None:
        return False
    # Nothing is trimmed, and large blocks come from the same heap as all others.
    return bool(library.mallopt(trim_threshold, -1) and library.mallopt(mmap_max, 0))


def return_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` has kept so far."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto` is the first accelerator torch can use, else the CPU.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"`device` cannot be {device!r}", hint="choose from auto, cpu, cuda, cuda:N"
        ) from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if chosen.index is None else chosen.index
        if index >= count:
            found = f"torch {torch.__version__} sees {count or 'no'} GPU{'s' if count > 1 else ''}"
            if count and chosen.index is None:
                raise ConfigError(
                    f"there is no GPU for process {local_rank + 1} of this machine: {found}",
                    hint=f"start at most {count} processes a machine",
                )
            raise ConfigError(
                f"`device` is {device!r}, but that GPU is not there: {found}",
                hint=f"write `cuda:0`{f' to `cuda:{count - 1}`' if count > 1 else ''}, or `cpu`"
                if count
                else "set `device: cpu`, or install the torch build for your CUDA version",
            )
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise ConfigError(
            f"`device` cannot be {device!r}", hint="choose from auto, cpu, cuda, cuda:N"
        )
    return chosen


def matmul_rates(
    dtypes: Sequence[torch.dtype], device: torch.device, *, size: int = 1024, seconds: float = 0.3
) -> list[float]:
    """Measured rate of a square matrix product in each dtype, in FLOP/s: the best of many.

    The dtypes take turns, so that whatever else the machine does for a moment slows all of them.
    """
    import torch

    if device.type == "cuda":
        size = 8192
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator)
    matrices = [matrix.to(device, dtype) for dtype in dtypes]
    best = [float("inf")] * len(matrices)
    rounds, begin = 0, time.perf_counter()
    while rounds < 8 or time.perf_counter() - begin < seconds:
        for index, matrix in enumerate(matrices):
            start = time.perf_counter()
            matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[index] = min(best[index], time.perf_counter() - start)
        rounds += 1
    return [2 * size**3 / taken for taken in best]


@dataclass(frozen=True)
class PrecisionChoice:
    """The dtype of the forward and backward pass, and the measurement it was chosen by."""

    dtype: torch.dtype
    matmul_rate: float
    """FLOP/s of a matrix product in ``dtype`` on this machine."""
    reason: str


def choose_precision(precision: Precision, device: torch.device) -> PrecisionChoice:
    """`auto` takes bf16 where its products are measured at least 1.5 times as fast as fp32's."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision != "auto":
        dtypes = {precision: dtypes[precision]}
    rates = dict(zip(dtypes, matmul_rates(list(dtypes.values()), device), strict=True))
    shown = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    name = precision
    if precision == "auto":
        name = "bf16" if rates["bf16"] >= 1.5 * rates["fp32"] else "fp32"
    return PrecisionChoice(dtypes[name], rates[name], f"{name} (measured: {shown})")


def seed_everything(seed: int) -> None:
    """Seed torch's generators; nothing in the package draws from another global generator."""
    import torch

    torch.manual_seed(seed)


@contextmanager
def preserved_random_state() -> Generator[None]:
    """Leave torch's generators as they were found."""
    import torch

    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held so far: on the GPU if it runs there, else resident memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """The machine in words, for manifests and reports."""
    import psutil
    import torch

    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
        )
    machine: dict[str, str | int] = {
        "cpu": name,
        "cores": num_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    import numpy
    import tokenizers
    import torch
    import transformers

    from fulltune import __version__

    return {
        "fulltune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": numpy.__version__,
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the work tree that holds ``folder``, `+` appended when it has changes."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
        status = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if status.strip() else "")
