"""What is set in the process: how freed memory is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS_OF_LAST_ROUND = """
import resource
import torch
from fulltune.runtime import keep_freed_memory

assert keep_freed_memory()
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(32)] + [torch.ones(2**24)]
    del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_reused_almost_without_page_faults():
    # A process of its own: the setting stays until a process ends.
    run = [sys.executable, "-c", FAULTS_OF_LAST_ROUND]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert int(shown) < 2500  # of the 49,152 pages that 192 MiB have
