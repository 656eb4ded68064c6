"""The whole way, from csv files to a model: embtrim to a small one, FuxiCTR to a full one.

    python benchmarks/whole_way.py --peers-python benchmarks/.peers-venv/bin/python
    python benchmarks/whole_way.py --only frappe --repeats 1

embtrim runs as its users run it: `embtrim encode`, then `embtrim run --budget 10%`, two commands. FuxiCTR runs its preprocessing,
its `fit` with its early stopping, and its metrics, in one process; once with its Ray loader, as shipped, and once with batches
from memory. Both train the same DeepFM with the same settings. Repeats take turns. Prints a Markdown table of medians: CPU seconds
of the process tree, wall seconds, peak memory, test AUC, epochs of the full model, bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import embtrim
import measure
import synthetic

HERE = Path(__file__).parent
SYNTHETIC_ROWS = 2_000_000
MLP = {"hidden_units": [400, 400, 400], "dropout": 0.2}


@dataclass(frozen=True)
class Log:
    """A log in three csv files.

    Attributes:
        files: csv files by split.
        label: Column of the label.
        kinds: How FuxiCTR reads each field: "int", "float" (to buckets) or "str".
        width: Embedding width of the full model.
        embedding_l2: L2 of the embeddings, for both.
    """

    files: dict[str, Path]
    label: str
    kinds: dict[str, str]
    width: int
    embedding_l2: float

    def write_schema(self, path: Path) -> Path:
        """Write embtrim's schema of the same fields: every value has a row, and floats go to log2 buckets."""
        kinds = {"float": {"type": "numeric", "transform": "log2"}}
        fields = [{"name": name, "min_count": 1, **kinds.get(kind, {})} for name, kind in self.kinds.items()]
        embtrim.Schema.parse({"label": self.label, "fields": fields}).save_draft(path)
        return path


def frappe(folder: Path, data: Path) -> Log:
    """Frappe with the settings that the BARS benchmark found best for DeepFM."""
    files = unpacked({name: data / "frappe_x1" / f"{name}.csv" for name in ("train", "valid", "test")}, folder)
    return Log(files, "label", kinds_of(files["train"], "label"), width=10, embedding_l2=0.05)


def movielens(folder: Path, data: Path) -> Log:
    """MovieLens-1M as a CTR log of nine fields, with the L2 that embtrim's sweep on validation rows chooses."""
    files = unpacked({name: data / "ml-1m" / f"ctr_{name}.csv" for name in ("train", "valid", "test")}, folder)
    return Log(files, "label", kinds_of(files["train"], "label"), width=16, embedding_l2=0.1)


def generated(folder: Path, data: Path) -> Log:
    """A generated log in Criteo's layout, 8:1:1."""
    files = {}
    for seed, (name, share) in enumerate((("train", 0.8), ("valid", 0.1), ("test", 0.1))):
        whole = folder / f"{name}.tsv"
        synthetic.write_log(whole, int(SYNTHETIC_ROWS * share), seed)
        files[name] = whole.with_suffix(".csv")
        pl.scan_csv(whole, separator="\t").sink_csv(files[name])
        whole.unlink()
    kinds = {**dict.fromkeys(synthetic.NUMERIC, "float"), **dict.fromkeys(synthetic.CATEGORICAL, "str")}
    return Log(files, synthetic.LABEL, kinds, width=16, embedding_l2=0.0)


LOGS = {"frappe": frappe, "movielens": movielens, "generated": generated}


def unpacked(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The files as plain csv in a folder: FuxiCTR reads no gz."""
    found = {}
    for name, path in files.items():
        found[name] = folder / f"{name}.csv"
        packed = path.with_name(path.name + ".gz")
        with gzip.open(packed, "rb") if packed.exists() else open(path, "rb") as source, open(found[name], "wb") as out:
            shutil.copyfileobj(source, out)
    return found


def kinds_of(path: Path, label: str) -> dict[str, str]:
    """Fields of a csv file: whole numbers are "int", all others "str"."""
    columns = pl.scan_csv(path, infer_schema_length=10_000).collect_schema()
    return {name: "int" if kind.is_integer() else "str" for name, kind in columns.items() if name != label}


def of_embtrim(log: Log, folder: Path, budget: str) -> list[str]:
    """Command of a worker that runs embtrim's two commands."""
    encode = ["encode", str(log.files["train"]), "--valid", str(log.files["valid"]), "--test", str(log.files["test"])]
    folder.mkdir()
    encode += ["--schema", str(log.write_schema(folder / "schema.toml")), "--out", str(folder / "data"), "--quiet"]
    hparams = {"embedding_dim": log.width, **MLP, "batch_norm": True}
    settings = [f"--set=hparams.{name}={json.dumps(value)}" for name, value in hparams.items()]
    run = ["run", str(folder / "data"), "--model", "deepfm", "--budget", budget, "--controls", "", "--quiet", *settings]
    run += [f"--set=train.embedding_l2={log.embedding_l2}", "--out", str(folder / "run")]
    return worker(sys.executable, "ours.py", {"out": str(folder), "commands": [encode, run]})


def of_fuxictr(python: str, log: Log, folder: Path, loader: str) -> list[str]:
    """Command of a worker that runs FuxiCTR."""
    model = {
        "width": log.width, "hidden": MLP["hidden_units"], "dropout_rates": MLP["dropout"], "batch_norm": True,
        "learning_rate": 1e-3, "embedding_regularizer": log.embedding_l2 or None,
    }  # fmt: skip
    files = {name: str(path) for name, path in log.files.items()}
    settings = {"files": files, "fields": log.kinds, "label": log.label, "out": str(folder), "loader": loader}
    return worker(python, "peers.py", {**settings, "model": model, "batch_size": 4096})


def worker(python: str, script: str, settings: dict[str, Any]) -> list[str]:
    """Command of a job `whole_way` on one thread, whose CPU seconds do not count threads that wait."""
    return [python, str(HERE / script), json.dumps(["whole_way", 1, "cpu", settings])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LOGS, default=list(LOGS), help="Logs to run, instead of all.")
    parser.add_argument("--contenders", nargs="+", choices=("embtrim", "memory", "ray"),
                        default=("embtrim", "memory", "ray"), help="embtrim, and FuxiCTR by loader.")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--peers-python", default=str(HERE / ".peers-venv" / "bin" / "python"),
                        help="Python of the peers' environment, which bench.py makes.")  # fmt: skip
    given = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    print(
        "| log | contender | CPU s | wall s | peak MB | test AUC | epochs | table bytes | runs |\n" + "|---" * 9 + "|"
    )
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="embtrim-whole-way-") as temporary:
            folder = Path(temporary)
            log = LOGS[name](folder, given.data)
            found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in given.contenders}
            for repeat in range(given.repeats):
                for contender, runs in found.items():
                    out = folder / f"{contender}-{repeat}"
                    command = (
                        of_embtrim(log, out, given.budget)
                        if contender == "embtrim"
                        else of_fuxictr(given.peers_python, log, out, contender)
                    )
                    runs.append(measure.run_alone(command, env))
                    print(json.dumps({"log": name, "contender": contender, **runs[-1]}), file=sys.stderr, flush=True)
                    shutil.rmtree(out, ignore_errors=True)
            for contender, runs in found.items():
                print(line(name, contender, runs), flush=True)


def line(name: str, contender: str, runs: list[dict[str, Any]]) -> str:
    """The medians of a contender's runs as a line of the table."""
    label = "embtrim, small" if contender == "embtrim" else f"FuxiCTR, full, {contender}"
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        return f"| {name} | {label} | {failed[0]} |"
    middle = {
        key: statistics.median(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], int | float)
    }
    return (
        f"| {name} | {label} | {middle['cpu_seconds']:.0f} | {middle['wall_seconds']:.0f} | {middle['peak_bytes'] / 1e6:.0f} | "
        f"{middle['auc']:.4f} | {middle['epochs']:.0f} | {middle['table_bytes']:,.0f} | {len(runs)} |"
    )


if __name__ == "__main__":
    main()
