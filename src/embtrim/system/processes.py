"""Work shared by processes: a crash, an interrupt or the death of the parent ends all of the processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import Any

import torch

from embtrim.errors import EmbtrimError
from embtrim.system.machine import available_cores

_make: Callable[[Any], Any] | None = None  # in a worker process: the function that makes the result of an item


@contextmanager
def in_processes(
    jobs: int, start: Callable[..., Callable[[Any], Any]], *arguments: Any
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Results of items in the order in which worker processes finish them; with one job, made by this process in order.

    Args:
        jobs: Number of worker processes; each gets its share of the threads that this process would use.
        start: Makes the function that is called with each item; called once in each worker. The items, the results and
            `start` itself must be picklable.
        arguments: Arguments of `start`.

    Raises:
        EmbtrimError: A worker died.
    """
    if jobs == 1:
        make = start(*arguments)
        yield lambda items: map(make, items)
        return
    others = set(active_children())
    threads = max(1, min(torch.get_num_threads(), available_cores() // jobs))
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads, start, arguments))
    try:
        yield lambda items: _results(pool, list(items))
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.terminate()
            child.join()
        if isinstance(error, BrokenProcessPool):
            raise EmbtrimError(
                "a worker process died (killed, or out of memory); what was finished is on disk: start again to go on, "
                "with fewer --jobs if memory is short"
            ) from None
        raise


def _results(pool: ProcessPoolExecutor, items: Sequence[Any]) -> Iterator[Any]:
    with _interrupts_held():
        waiting = {pool.submit(_call, item) for item in items}
    while waiting:
        # A signal may reach any thread. The main thread notices it only when its own wait ends.
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back inside a `with` block, where the system can; processes started inside never see one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(threads: int, start: Callable[..., Callable[[Any], Any]], arguments: Sequence[Any]) -> None:
    global _make
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent ends its workers; systems without signal masks deliver Ctrl-C here too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _make = start(*arguments)


def _end_with_parent() -> None:
    """End this worker with its parent: a killed parent cannot end its workers, which would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _make is not None
    return _make(item)
