"""Worker processes that neither outlive their parent nor answer Ctrl-C in its place."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from fulltune.errors import FulltuneError

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_in_order(
    items: Iterator[Item],
    start: Callable[[], Callable[[Item], Result]],
    finished: Callable[[Result], None],
    *,
    num_workers: int,
    modules: Sequence[str],
    known: Callable[[Item], Result | None] = lambda _: None,
) -> None:
    """Work on items in several processes and take the results in the order of the items.

    Where reading the items fails, what was read before is finished first: an earlier item that
    fails in the work is the one that is named, whatever the number of processes.

    Args:
        items: read in this process, not far ahead of the work.
        start: called once in each worker process; gives what is done there with each item.
        finished: called in this process with each result.
        num_workers: processes; 0 and 1 work in this one, and so does a single item, since starting
            a process costs more.
        modules: imported once and shared by all workers.
        known: the result of an item that needs no work, else None; called in this process.

    Raises:
        FulltuneError: of the first item in order that cannot be read or worked on.
        BrokenProcessPool: a worker was killed.
    """
    read = _items_then_error(items)
    first = list(itertools.islice(read, 2))
    read = itertools.chain(first, read)
    if len(first) < 2 or num_workers <= 1:
        work = start()
        for item in read:
            if isinstance(item, FulltuneError):
                raise item
            result = known(item)
            finished(work(item) if result is None else result)
        return

    failure: FulltuneError | None = None
    waiting: deque[Result | Future[Result]] = deque()

    def finish_first() -> None:
        entry = waiting.popleft()
        finished(entry.result() if isinstance(entry, Future) else entry)

    with ProcessPoolExecutor(
        num_workers,
        mp_context=process_context(*modules),
        initializer=_start_worker,
        initargs=(start,),
    ) as pool:
        try:
            for item in read:
                if isinstance(item, FulltuneError):
                    failure = item
                    break
                result = known(item)
                if result is not None:
                    waiting.append(result)
                else:
                    with interrupted_afterwards():
                        waiting.append(pool.submit(_work_on, item))
                if len(waiting) == 2 * num_workers:
                    finish_first()
            while waiting:
                finish_first()
        finally:
            for entry in waiting:
                if isinstance(entry, Future):
                    entry.cancel()
    if failure is not None:
        raise failure


def _items_then_error(items: Iterator[Item]) -> Iterator[Item | FulltuneError]:
    try:
        yield from items
    except FulltuneError as error:
        yield error


_work: Callable[[Any], Any] | None = None
"""What this worker process does; set once by `_start_worker`."""


def _start_worker(start: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    tie_to_parent()
    # The tokenizers have no other switch. The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = start()


def _work_on(item: Any) -> Any:
    assert _work is not None
    return _work(item)


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
