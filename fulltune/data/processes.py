"""Worker processes that neither outlive their parent nor answer Ctrl-C in its place."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def process_context(*modules: str) -> Any:
    """How to start worker processes that import ``modules`` once and share them."""
    # A forked copy of a process with threads (torch, a progress display) may hang for ever.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once and then shared by all workers, instead of seconds in each.
    context.set_forkserver_preload(["__main__", *modules])
    _start_fork_server()
    return context


def _start_fork_server() -> None:
    """Start it deaf to Ctrl-C, which would meet it in its imports: the parent alone answers."""
    if threading.current_thread() is not threading.main_thread():
        multiprocessing.forkserver.ensure_running()
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """A worker that is half started when its parent leaves would end in a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if noted:
        signal.raise_signal(signal.SIGINT)


def tie_to_parent() -> None:
    """Called once in a worker: Ctrl-C is left to the parent, and the worker ends with it."""
    # Ctrl-C reaches every process of a terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
