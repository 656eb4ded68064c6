"""Kill commands at random moments, start them again, and compare what they make with what undisturbed ones make.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--commands encode,train] [--folder FOLDER]

Half of the kills (SIGKILL) come at a random time of the command, half at a random change of the names on disk (a rename, a
removed or a new file), just before or just after it. `encode`, `train`, `update` and `export` replace an earlier, other
result: it or the new one must be there after each kill. A killed command is started again, and perhaps killed again, until
it ends.

The table: kills; how often the command then went on from work on disk or started again; results lost (a command that does
not end, a path that does not open), and results that differ from the undisturbed ones (weights, plans, ids, metrics).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import embtrim
from embtrim.cli.main import main as command_line

TINY = ["--set", "hparams.embedding_dim=4", "--set", "train.precision=fp32", "--set", "train.batch_size=128"]
SHORT = [*TINY, "--set", "train.epochs=2", "--set", "train.embedding_l2=0", "--set", "train.checkpoint_seconds=0"]
UPDATE = SHORT[2:]
CHANGES = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir")
# Parts of a record that depend on the time and on the process.
VOLATILE = (
    "seconds",
    "search_epochs",
    "memory",
    "peak",
    "rows_per_second",
    "hardware",
    "bundle_bytes",
    "vocabulary_bytes",
)


class Command(NamedTuple):
    """A command to kill.

    Attributes:
        arguments: Its arguments without --out.
        opens: Gives a digest of what --out holds; raises if it cannot be opened.
        earlier: Arguments of the result that lies at --out before; None if there is none.
        suffix: Suffix of --out.
    """

    arguments: list[str]
    opens: Callable[[Path], str]
    earlier: list[str] | None = None
    suffix: str = ""


def write_log(path: Path, rows: int, seed: int) -> None:
    """A click log of a user, an item, a list and a number, with a signal in the first two."""
    effects = np.random.default_rng(0).normal(size=(2, 80))
    rng = np.random.default_rng(seed)
    user, item, tags = rng.integers(0, 80, rows), rng.integers(0, 40, rows), rng.integers(0, 6, (rows, 2))
    click = rng.random(rows) < 1 / (1 + np.exp(-effects[0][user] - effects[1][item]))
    lines = [f"{int(c)},u{u},i{i},t{a}|t{b},{p:.2f}" for c, u, i, (a, b), p in
             zip(click, user, item, tags, rng.lognormal(3, 1, rows), strict=True)]  # fmt: skip
    path.write_text("\n".join(["click,user,item,tags,price", *lines]) + "\n")


def commands_in(shop: Path) -> dict[str, Command]:
    """The commands, over what `prepare` has made."""
    log, data, full = str(shop / "log.csv"), str(shop / "data"), str(shop / "full")
    optembed = ["--method", "optembed", "--budget", "40%", "--set", "search.epochs=2", "--set", "search.generations=2"]
    grid = ["--models", "fm", "--methods", "uniform,guided", "--budgets", "40%", "--seeds", "1"]
    run = ["--model", "fm", "--method", "sseds", "--budget", "40%", "--controls", "uniform"]
    encode = ["--label", "click", "--split", "8:1:1"]
    return {
        "encode": Command(["encode", log, *encode, "--overwrite"], of_folder, ["encode", str(shop / "new.csv"), *encode]),
        "train": Command(
            ["train", data, "--model", "fm", *SHORT, "--overwrite"],
            of_bundle,
            ["train", data, "--model", "fm", *SHORT, "--seed", "7"],
        ),
        "search": Command(["search", full, data, *optembed, *SHORT], of_plan, suffix=".json"),
        "run": Command(["run", data, *run, *SHORT], of_records),
        "compare": Command(["compare", data, *grid, *SHORT], of_records),
        "compare --jobs 2": Command(["compare", data, *grid, *SHORT, "--jobs", "2"], of_records),
        "update": Command(
            ["update", full, str(shop / "new.csv"), *UPDATE, "--overwrite"], of_bundle, ["train", data, "--model", "fm", *SHORT]
        ),
        "export": Command(
            ["export", full, "--format", "torchrec", "--overwrite"], of_folder,
            ["export", str(shop / "other"), "--format", "torchrec"],
        ),
    }  # fmt: skip


# --- what a command made --------------------------------------------------------------------------------------------


def of_folder(out: Path) -> str:
    """Digest of encoded data or of an export."""
    if not (out / "manifest.json").exists():
        embtrim.load(out)
    kept = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        values = path.read_bytes()
        if path.name == "meta.json":
            values = json.dumps({**json.loads(values), "seconds": 0}).encode()
        kept[path.relative_to(out).as_posix()] = hashlib.sha256(values).hexdigest()
    return json.dumps(kept)


def of_bundle(out: Path) -> str:
    """Digest of a bundle: its bundle.json holds those of all its files."""
    embtrim.load_bundle(out)
    return (out / "bundle.json").read_text()


def of_plan(out: Path) -> str:
    """A plan, and its rows."""
    plan = embtrim.SizePlan.load(out)
    return plan.digest + out.read_text()


def of_records(out: Path) -> str:
    """Records without their times, plans, and the weights of a run's bundles or a grid's full models."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("records/*.json")):
        values = json.loads(path.read_text())
        found[path.stem] = {k: v for k, v in values.items() if not any(part in k for part in VOLATILE)}
    for path in sorted(out.glob("plans/*.json")):
        found[f"plan {path.stem}"] = of_plan(path)
    for path in sorted([*out.glob("bundles/*"), *out.glob("full/*")]):
        weights = path / "model.safetensors" if path.is_dir() else path
        if path.is_dir():
            embtrim.load_bundle(path)
        found[f"weights {path.name}"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not (out / "report.html").exists():
        raise FileNotFoundError(out / "report.html")
    return json.dumps(found)


# --- processes ------------------------------------------------------------------------------------------------------


def start(arguments: list[str], log: Path, change: int | None = None, after: bool = False) -> int:
    """Start a command in a child; it kills itself at a change of names on disk, counted from 1, if one is given."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            if change is not None:
                die_at(change, after)
            try:
                command_line(arguments)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        os._exit(code)


def opened(command: Command, out: Path, log: Path) -> str:
    """What a path holds, read in a child: a process that has used polars cannot be forked any more."""
    pid = os.fork()
    if pid:
        code = ended(pid)
        if code:
            raise ValueError(log.read_text())
        return log.read_text()
    code = 1
    try:
        log.write_text(command.opens(out))
        code = 0
    except Exception as error:
        log.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def die_at(change: int, after: bool) -> None:
    """Have this process kill itself before, or after, a change of names on disk."""
    count = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == change and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **named)
            if count == change:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CHANGES:
        setattr(os, name, watched(getattr(os, name)))


def ended(pid: int) -> int:
    """Exit code of a child; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def alone(folder: Path) -> None:
    """Wait until the workers of a killed parent have ended: none has a file in the folder open."""
    end = time.monotonic() + 60
    while time.monotonic() < end and any(str(folder) in text for text in command_lines()):
        time.sleep(0.05)


def command_lines() -> Iterator[str]:
    """What the worker processes of this machine that a dead parent left have mapped or open."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"spawn_main" in (process / "cmdline").read_bytes():
                yield " ".join(os.readlink(link) for link in (process / "fd").iterdir())


class Tally:
    """Counts of one command."""

    def __init__(self) -> None:
        self.kills = self.resumed = self.redone = self.lost = self.differing = 0
        self.told: list[str] = []

    def row(self, name: str) -> str:
        """A line of the table."""
        return f"| {name} | {self.kills} | {self.resumed} | {self.redone} | {self.lost} | {self.differing} |"


def holds_work(out: Path) -> bool:
    """Whether there is work that a command can go on from."""
    roots = [out.with_name(f".{out.name}.{end}") for end in ("unfinished", "encoding")]
    names = ("settings.json", "config.toml", ".lock")
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    files += [path for path in out.glob("*/**/*") if path.is_file()] if (out / "config.toml").exists() else []
    return any(path.name not in names and not path.name.endswith(".tmp") for path in files)


def kill_command(name: str, command: Command, kills: int, chance: random.Random, folder: Path) -> Tally:
    """Kill a command so often, in one go after another, each to its end."""
    tally, log = Tally(), folder / "log"
    whole = folder / "whole" / f"out{command.suffix}"
    whole.parent.mkdir(parents=True)
    began = time.monotonic()
    if command.earlier is not None:
        assert ended(start([*command.earlier, "--out", str(whole)], log)) == 0, log.read_text()
        earlier = opened(command, whole, log)
        began = time.monotonic()
    assert ended(start([*command.arguments, "--out", str(whole)], log)) == 0, log.read_text()
    seconds, expected = time.monotonic() - began, opened(command, whole, log)
    allowed = {expected} if command.earlier is None else {expected, earlier}
    go = 0
    changes = 40
    while tally.kills < kills:
        go += 1
        out = folder / f"{go}" / f"out{command.suffix}"
        out.parent.mkdir()
        if command.earlier is not None:
            assert ended(start([*command.earlier, "--out", str(out)], log)) == 0, log.read_text()
        killed = 0
        while tally.kills < kills and (killed == 0 or chance.random() < 0.5):
            arguments = [*command.arguments, "--out", str(out)]
            if chance.random() < 0.5:
                code = ended(start(arguments, log, chance.randint(1, changes), chance.random() < 0.5))
            else:
                pid = start(arguments, log)
                time.sleep(chance.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            if code == 0:
                changes = max(5, changes * 3 // 4)
                break
            if code != -signal.SIGKILL:
                tally.lost += 1
                tally.told.append(f"{name} {go}: exit code {code}: {log.read_text()[-500:]}")
                break
            changes += 3
            killed += 1
            tally.kills += 1
            alone(out.parent)
            worked = holds_work(out)
            tally.resumed, tally.redone = tally.resumed + worked, tally.redone + (not worked)
            if command.earlier is not None:
                check(tally, f"{name} {go} after a kill", command, out, log, allowed)
        if ended(start([*command.arguments, "--out", str(out)], log)) not in (0,):
            done_before = command.suffix and out.exists() and "exists" in log.read_text()
            if not done_before:
                tally.lost += 1
                tally.told.append(f"{name} {go}: it does not end: {log.read_text()[-500:]}")
                continue
        check(tally, f"{name} {go}", command, out, log, {expected})
        left = {path.name for path in out.parent.iterdir()} - {path.name for path in whole.parent.iterdir()}
        inside = [] if command.suffix else [path for path in out.rglob(".*") if path.name != ".lock"]
        if left or inside or (out / "unfinished").exists():
            tally.lost += 1
            tally.told.append(f"{name} {go}: left behind: {sorted(left)} {inside}")
        shutil.rmtree(out.parent)
    return tally


def check(tally: Tally, where: str, command: Command, out: Path, log: Path, allowed: set[str]) -> None:
    """Open a path and count what is lost or differs."""
    try:
        if opened(command, out, log) not in allowed:
            tally.differing += 1
            tally.told.append(f"{where}: it differs")
    except ValueError as error:
        tally.lost += 1
        tally.told.append(f"{where}: {error}")


def prepare(shop: Path) -> None:
    """Write the logs, the data and the bundles that commands start from."""
    write_log(shop / "log.csv", 1500, 0)
    write_log(shop / "new.csv", 1200, 1)
    for arguments in (
        ["encode", str(shop / "log.csv"), "--label", "click", "--out", str(shop / "data")],
        ["train", str(shop / "data"), "--model", "fm", *SHORT, "--out", str(shop / "full")],
        ["train", str(shop / "data"), "--model", "fm", *SHORT, "--seed", "3", "--out", str(shop / "other")],
    ):
        assert ended(start(arguments, shop / "log")) == 0, (shop / "log").read_text()


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", help="Some of the commands, separated by commas.")
    parser.add_argument("--folder", type=Path, help="Where to work; if not given, a temporary folder.")
    given = parser.parse_args()
    os.environ["EMBTRIM_KERNELS"] = "torch"  # each child would load the fused ones again
    for module in (
        "experiments.comparison",
        "experiments.run",
        "serving.updating",
        "serving.exporting",
        "reports.run_page",
    ):
        importlib.import_module(f"embtrim.{module}")  # in the children it would take longer than the work
    importlib.import_module("torch._dynamo")
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (shop := folder / "shop").mkdir(parents=True)
        prepare(shop)
        commands = commands_in(shop)
        if given.commands:
            commands = {name: commands[name] for name in given.commands.split(",")}
        share, more = divmod(given.kills, len(commands))
        lines, told = [], []
        total = Tally()
        for number, (name, command) in enumerate(commands.items()):
            kills = share + (number < more)
            tally = kill_command(
                name, command, kills, random.Random(f"{given.seed} {name}"), folder / name.replace(" ", "")
            )
            lines.append(tally.row(name))
            print(lines[-1], file=sys.stderr, flush=True)
            for what in ("kills", "resumed", "redone", "lost", "differing"):
                setattr(total, what, getattr(total, what) + getattr(tally, what))
            told += tally.told
    print("| command | kills | resumed | redone | lost | differing |\n|---|---|---|---|---|---|")
    print("\n".join([*lines, total.row("all"), *told]))
    sys.exit(bool(total.lost or total.differing))


if __name__ == "__main__":
    main()
