"""Work shared by processes: results as they come; a crash, an interrupt or the parent's death ends all of them."""

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

_make: Callable[[Any], Any] | None = None  # in a worker process: what makes a result of an item


@contextmanager
def in_processes(
    jobs: int, start: Callable[..., Callable[[Any], Any]], *arguments: Any
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Results of items, made by worker processes and given as they come; with one job by this process, in order.

    Args:
        jobs: worker processes; each gets its share of the threads that this process would use.
        start: (*arguments) -> function of an item; called once in each worker. It, items and results must pickle.
        arguments: of `start`.

    Raises:
        EmbtrimError: a worker died.
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
        # A signal may reach any thread, and wakes the main one out of no wait that has no end.
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for the block, where the system can; processes that start in it never see one."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back: the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _make = start(*arguments)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _make is not None
    return _make(item)
