"""What workers of the tests run: functions that a spawned process can import; and an engine without workers."""

import os
import pickle
import signal
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


def double(item: int) -> int:
    return 2 * item


def die_at_three(marker: Path, item: int) -> int:
    """Twice the item; the first worker that is given 3 is killed."""
    if item == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * item


def die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def die_once(marker: Path, function: partial[Any], item: Any) -> Any:
    """What a task of `encode` returns; but the first worker that writes the codes of file 3 is killed as it works."""
    if function.args[0].__name__ == "code" and item.number == 3 and not marker.exists():
        marker.touch()
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
        function(item)
        threading.Event().wait(60)
    return function(item)


def sent(thing):
    return pickle.loads(pickle.dumps(thing))


class Backwards:
    """Runs the last item first and each item twice, as retries do, and sends everything through pickle."""

    @contextmanager
    def started(self):
        def run(function, items):
            for index in reversed(range(len(items))):
                for _ in range(2):
                    result = sent(function)(sent(items[index]))
                yield index, sent(result)

        yield run
