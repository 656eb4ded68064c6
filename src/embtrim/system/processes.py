"""Work shared by processes: a crash, an interrupt or the death of the parent ends all of the processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from embtrim.errors import EmbtrimError
from embtrim.system.interrupts import Interrupted, raise_interrupted
from embtrim.system.machine import available_cores

# Seconds that workers have to write their checkpoints before they are killed.
CHECKPOINT_SECONDS = 60.0

_make: Callable[[Any], Any] | None = None  # in a worker process: the function that makes the result of an item
_is_busy = False  # in a worker process: whether it makes a result


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
    threads = max(1, available_cores() // jobs)
    if (torch := sys.modules.get("torch")) is not None:
        threads = min(threads, torch.get_num_threads())
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads, start, arguments))
    try:
        yield lambda items: _results(pool, list(items))
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        _end(set(active_children()) - others)
        if isinstance(error, BrokenProcessPool):
            raise EmbtrimError(
                "a worker process died (killed, or out of memory); what was finished is on disk: start again to go on, "
                "with fewer --jobs if memory is short"
            ) from None
        raise


def _end(children: Iterable[BaseProcess]) -> None:
    """End worker processes; they have time to write their checkpoints."""
    for child in children:
        child.terminate()
    end = time.monotonic() + CHECKPOINT_SECONDS
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        child.kill()
        child.join()


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
    signal.signal(signal.SIGTERM, lambda signum, _: _end_worker(signum))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if (torch := sys.modules.get("torch")) is not None:  # it is not, in workers whose work needs no torch
        torch.set_num_threads(threads)
    _make = start(*arguments)


def _end_with_parent() -> None:
    """End this worker with its parent: a killed parent cannot end its workers, which would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_worker(signum: int) -> None:
    """End this worker: at once, or after its training has written its state."""
    if not _is_busy:
        os._exit(128 + signum)
    raise_interrupted(signum)


def _call(item: Any) -> Any:
    global _is_busy
    assert _make is not None
    try:
        _is_busy = True
        return _make(item)
    except Interrupted as end:
        os._exit(128 + end.signum)
    finally:
        _is_busy = False
