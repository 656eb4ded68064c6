"""Calls of the command line within the tests' process, and a workshop with data, bundles and plans for them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TINY = [
    *("--set", "hparams.hidden_units=[16]", "--set", "hparams.embedding_dim=8"),
    *(
        "--set",
        "train.epochs=2",
        "--set",
        "train.batch_size=256",
        "--set",
        "train.precision=fp32",
        "--set",
        "train.embedding_l2=0",
    ),
]

# Run main() with a limit on the size of files: what a full disk is to a writer. Python ignores SIGXFSZ by itself.
LIMITED = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({0}, {0})); from embtrim.cli.main import main; main()"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Result:
    """The command line in this process."""
    from embtrim.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def call_limited(limit: int, *arguments: str | Path) -> Result:
    """The command line in a process of its own that can write no file beyond `limit` bytes."""
    command = [sys.executable, "-c", LIMITED.format(limit), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    return Result(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def write_log(path: Path, num_rows: int = 3000, seed: int = 0) -> None:
    """A click log with two categorical fields, a multi-valued one and a number; a planted signal in all but the last."""
    rng = np.random.default_rng(0)
    user_effect, item_effect, tag_effect = (1.5 * rng.normal(size=size) for size in (300, 60, 8))
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 300, num_rows), rng.integers(0, 60, num_rows)
    tags, num_tags = rng.integers(0, 8, (num_rows, 3)), rng.integers(1, 4, num_rows)
    price = rng.lognormal(3, 1, num_rows)
    score = user_effect[user] + item_effect[item] + tag_effect[tags[:, 0]]
    click = rng.random(num_rows) < 1 / (1 + np.exp(-score))
    with open(path, "w") as file:
        file.write("click,user,item,tags,price\n")
        for row in range(num_rows):
            listed = "|".join(f"t{tag}" for tag in tags[row, : num_tags[row]])
            file.write(f"{int(click[row])},u{user[row]},i{item[row]},{listed},{price[row]:.2f}\n")


class Workshop:
    """A folder with a good log, its encoding, a trained bundle, a plan, and a compact bundle, to be broken in copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.data, self.bundle = folder / "log.csv", folder / "data", folder / "full"
        self.plan, self.small = folder / "plan.json", folder / "small"
        write_log(self.log)
        for arguments in (
            ["encode", self.log, "--label", "click", "--out", self.data],
            ["train", self.data, "--out", self.bundle, *TINY],
            ["search", self.bundle, self.data, "--method", "sseds", "--budget", "20%", "--out", self.plan],
            ["compact", self.bundle, self.plan, self.data, "--out", self.small, *TINY],
        ):
            done = call(*arguments)
            if done.code:
                raise RuntimeError(f"{arguments}: {done.err}")

    def new(self, name: str) -> Path:
        """A path in the workshop at which nothing is."""
        path = self.folder / name
        shutil.rmtree(self.folder / f".{name}.encoding", ignore_errors=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return path

    def text(self, name: str, text: str | bytes) -> Path:
        path = self.new(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def lines(self, name: str, change: Callable[[list[str]], list[str]]) -> Path:
        """A copy of the log with its lines changed."""
        return self.text(name, "\n".join(change(self.log.read_text().splitlines())) + "\n")

    def copy(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.new(name)))

    def snapshot(self) -> dict[str, str]:
        """Digest of every file and name of every folder."""
        return {
            str(path.relative_to(self.folder)): hashlib.md5(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(self.folder.rglob("*"))
        }
