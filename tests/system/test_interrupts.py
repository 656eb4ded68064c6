"""Ctrl-C and SIGTERM: held back, acted on, told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import embtrim
from embtrim.models import build
from embtrim.system import interrupts
from embtrim.system.interrupts import Interrupted, going_on_with, held_back, interrupts_not_replaced, signals_raised
from embtrim.training import fitting
from tests.cli.workshop import environment
from tests.training.interruptions import TRAIN, same_weights


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """A shell starts processes in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_act_at_the_end_of_the_block() -> None:
    reached = []

    def work() -> None:
        with signals_raised(), held_back() as signals:
            assert not signals
            signal.raise_signal(signal.SIGTERM)
            assert signals
            reached.append(1)

    with pytest.raises(Interrupted) as raised:
        work()
    assert reached == [1]
    assert raised.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupt_that_a_library_drops_for_an_error_is_raised_again() -> None:
    def library() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise TypeError("no data type")

    with pytest.raises(Interrupted) as raised, interrupts_not_replaced():
        library()
    assert raised.value.signum == signal.SIGINT
    assert isinstance(raised.value.__cause__, TypeError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(TypeError), interrupts_not_replaced():
        raise TypeError("no signal came")


def test_a_second_ctrl_c_acts_at_once_unless_it_comes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(interrupts, "TOGETHER_SECONDS", -1.0)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [1]


def test_handlers_of_the_caller_are_called_and_ignored_signals_stay_ignored() -> None:
    seen: list[int] = []
    before = [
        signal.signal(s, h) for s, h in ((signal.SIGTERM, lambda s, _: seen.append(s)), (signal.SIGINT, signal.SIG_IGN))
    ]
    try:
        with held_back() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
            signals.act()
            assert seen == [signal.SIGTERM]
            assert not signals
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
        with signals_raised():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_an_interrupt_says_where_the_work_goes_on() -> None:
    for holds, args in ((True, ("interrupted; the same call goes on with place",)), (False, ())):
        with pytest.raises(KeyboardInterrupt) as raised, going_on_with(Path("place"), lambda holds=holds: holds):
            raise KeyboardInterrupt
        assert raised.value.args == args


@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_training_writes_its_state_before_it_ends(
    data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """checkpoint_seconds is so long that nothing but the signal can have written it."""
    config = TRAIN.replace(checkpoint_seconds=1e9)
    whole, model = (build("fm", data.schema, embedding_dim=4) for _ in range(2))
    expected = embtrim.fit(whole, data, config)
    called = "evaluate" if where == "validation" else "logloss_of_batch"
    function, count = getattr(fitting, called), []

    def signalled(*given: object, **named: object) -> object:
        count.append(1)
        if len(count) == (1 if where == "validation" else 7):
            signal.raise_signal(signal.SIGINT)
        return function(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, called, signalled)
        with pytest.raises(KeyboardInterrupt):
            embtrim.fit(model, data, config, checkpoint=tmp_path / "state")
    assert (tmp_path / "state").exists()
    if where == "step":
        assert len(count) == 7
    again = build("fm", data.schema, embedding_dim=4)
    result = embtrim.fit(again, data, config, checkpoint=tmp_path / "state")
    assert same_weights(again, whole)
    assert result.best_score == expected.best_score


def start_worker(folder: str):
    def work(_: int) -> None:
        try:
            (Path(folder) / f"{os.getpid()}.started").touch()
            time.sleep(1000)
        finally:
            (Path(folder) / f"{os.getpid()}.tidied").touch()

    return work


TWO_WORKERS = """
import sys
from embtrim.system.interrupts import signals_raised
from embtrim.system.processes import in_processes
from tests.system.test_interrupts import start_worker
if __name__ == "__main__":
    with signals_raised(), in_processes(2, start_worker, sys.argv[1]) as make:
        list(make([1, 2]))
"""


@pytest.mark.slow
def test_workers_have_time_to_write_their_state(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(TWO_WORKERS)
    paths = {**environment(), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=paths, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("*.started"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert len(list(tmp_path.glob("*.tidied"))) == 2
    assert errors.strip().splitlines()[-1].startswith("embtrim.system.interrupts.Interrupted")
    assert errors.count("Traceback") == 1, "the workers say nothing"
