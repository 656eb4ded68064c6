"""Progress: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys

import pytest

from embtrim.system import progress
from embtrim.system.progress import Counter, say, seconds_left, shows_bars, stage, tracked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees; its only entry may be changed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_has_bars_unless_it_is_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shows_bars()
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by some CI
    assert not shows_bars()
    master, slave = os.openpty()
    with open(slave, "w") as terminal, open(master):
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        assert shows_bars()
        monkeypatch.setenv("TERM", "dumb")
        assert not shows_bars()


def test_lines_name_their_stages(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with stage("seed 0", False), stage("guided", True):
        with Counter(True, "rows") as counter:
            counter.begin("epoch 2", 1000, done=200)
            clock[0] = 9
            counter.advance(100)
            clock[0] = 20
            counter.advance(300)
        list(tracked("ab", "evolution", 2, True, "generations", each=True))
    with stage("quiet", False):
        say("done")
        say("not shown", False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "seed 0, guided: begins",
        "seed 0, guided: epoch 2: 600 of 1,000 rows, 20 rows/s, 0:00:20 gone, 0:00:20 left",
        "seed 0, guided: evolution: 1 of 2 generations, 0:00:00 gone, 0:00:00 left",
        "seed 0, guided: evolution: 2 of 2 generations, 0:00:00 gone, 0:00:00 left",
        "quiet: done",
    ]


def test_a_line_tells_each_stage_of_work_that_takes_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Counter(True, after=2.0) as counter:
        counter.reach("reading", 0.1)
        clock[0] = 3
        counter.reach("reading", 0.5)
        counter.reach("reading", 0.6)
        clock[0] = 5
        counter.reach("writing", 0.2)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 50%, 0:00:03 gone, 0:00:03 left",
        "writing: 20%, 0:00:00 gone, 0:00:00 left",
    ]


def test_nothing_is_doubled_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    with stage("guided", True), Counter(True, "cells", each=True, after=2.0) as counter:
        counter.begin("grid", 20, done=8)
        counter.advance()
        assert counter._progress is None
        clock[0] = 60.0
        counter.advance(3)
        say("epoch 1")
        assert counter._progress is not None
        (bar,) = counter._progress.tasks
        assert (bar.description, bar.completed, bar.total) == ("guided: grid", 12, 20)
        # Four cells in a minute, eight to go; with the eight on disk in the rate it would be 40 s.
        bar.start_time, bar._get_time = 0.0, lambda: 60.0
        assert str(counter._progress.columns[-1].render(bar)) == "0:02:00 left"  # type: ignore[union-attr]
        counter.begin("again", 20)
        counter.advance()
        assert counter._progress.tasks[0].completed == 1
    assert "epoch 1" not in capsys.readouterr().err


def test_time_left_counts_what_was_finished_since_the_start() -> None:
    assert seconds_left(60.0, finished=0, remaining=10) is None
    assert seconds_left(60.0, finished=3, remaining=10) == 200
