"""What is set in the process, and measured of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fulltune.errors import ConfigError
from fulltune.runtime import matmul_rates, start_runtime

FAULTS_OF_LAST_ROUND = """
import resource
import psutil
import torch
from fulltune.runtime import keep_freed_memory, return_freed_memory

assert keep_freed_memory()
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(32)] + [torch.ones(2**24)]
    del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = psutil.Process().memory_info().rss
return_freed_memory()
print(faults, kept - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_reused_almost_without_page_faults_until_it_is_returned():
    # A process of its own: the setting stays until a process ends.
    run = [sys.executable, "-c", FAULTS_OF_LAST_ROUND]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    faults, returned = map(int, shown.split())
    assert faults < 2500  # of the 49,152 pages that 192 MiB have
    assert returned > 150 * 2**20


def test_several_ranks_are_not_given_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks cannot share") as caught:
        start_runtime("cuda:0")
    assert "device: cuda" in caught.value.hint


def test_precisions_are_measured_in_turn_so_that_a_busy_moment_slows_both() -> None:
    multiplied: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if operator is torch.ops.aten.mm.default:
                multiplied.append(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    asked = [torch.bfloat16, torch.float32]
    with Products():
        rates = matmul_rates(asked, torch.device("cpu"), size=32, seconds=0)
    assert multiplied == 8 * asked
    assert min(rates) > 0
