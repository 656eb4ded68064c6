"""What searching, compacting and retraining a sharded model take on many devices: memory, network and time, on paper.

    python benchmarks/sizing.py --devices 8 64
    python benchmarks/sizing.py --check

Prints Markdown tables. The first form takes the unit costs of this machine from small runs, in one process with one thread;
`--check` runs two ranks and prints what they held and sent beside the formulas. It needs torchrec (docs/torchrec.md).

Symbols: N devices; B rows of a batch on each; T tables, one feature each; L ids a row and feature; V_t rows and W_t stored
columns of table t; D columns of the full tables; P dense parameters in Q tensors; K batches of a device in a pass. Device r
holds R_t rows of table t: with tables cut by rows, ceil(V_t / N) of every table (the last devices may hold fewer); with whole
tables on devices, all V_t rows of tables r, r + N, .. and none of others. W is the sum of all W_t, and W_r that of the tables
of which r holds rows. The tables printed take the device with the largest value.

Memory of a device, in bytes. Activations of the model, and the peak within FBGEMM, are not in it:

    tables and state     sum R_t (4 W_t + 4): fp32, and row-wise Adagrad's number for each row
    exchange buffer      4 B max(N W_r, W), the largest one of embeddings

Bytes that a device sends. A ring is assumed: an all-reduce of n bytes sends 2 (N - 1) / N n, a reduce-scatter of n bytes
(N - 1) / N n, an all-gather of n bytes (N - 1) n, a broadcast n.

    ids                  24 (N - 1) for the sizes;
                         by rows 4 T B (N - 1) for lengths and 8 T B L (N - 1) / N, if every device gets equally many ids;
                         by tables (4 + 8 L) B for each table of other devices
    outputs              4 (N - 1) B W_r
    gradients            by rows 4 (N - 1) B W, by tables 4 B (W - W_r)
    dense                all-reduce of 4 P + 4 Q

    lookup               ids + outputs
    training step        lookup + gradients + dense
    search (sseds)       K + 1 lookups; all-reduces of 8 (K + 2), 8 T and 8 (W + 1); broadcasts of 8 and of the pickled plan
    counts of rows       K lookups; all-reduces of 8 (K + 1), 8 K N and 8 T; K all-gathers of 8 T B L. In host memory a device
                         holds 32 sum R_t: counts of its rows, and their order (frequency)
    inherit              all-reduce of 4 D sum V_t, in chunks; both models are held
    verify               K lookups in both models; all-reduces of 16 K + 16; both models and a copy of the full tables are held

Seconds are estimates: rows of a device / rows a second of a device, and bytes sent / bandwidth. For inherit: 4 D sum V_t /
bytes a second of a device, since each device goes through all rows, + twice 4 D sum V_t / bandwidth of the host's bus.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import embtrim
from embtrim.methods import SSEDSConfig
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan, padded_width
from embtrim.tables.packing import CHUNK_ROWS

SHARDINGS = {"row_wise": "by rows", "table_wise": "by tables"}
VERIFIED_ROWS = 65_536  # which `verify` compares unless told otherwise

Tables = list[tuple[int, int]]
"""Rows and stored columns of each table."""


# ---- formulas ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Sizes of a job, and what one of its devices holds and sends, in bytes; see the symbols above.

    Attributes:
        devices: N.
        batch: B.
        ids: L.
        dense: P.
        dense_tensors: Q.
        sharding: "row_wise" or "table_wise".
        rank: r, the number of the device.
    """

    devices: int
    batch: int
    ids: int
    dense: int
    dense_tensors: int
    sharding: str
    rank: int = 0

    def ranks(self) -> Iterator[Job]:
        """The job seen from each device."""
        return (dataclasses.replace(self, rank=rank) for rank in range(self.devices))

    def own(self, tables: Tables) -> Tables:
        """The pieces of tables that the device holds."""
        if self.sharding == "table_wise":
            return tables[self.rank :: self.devices]
        most = [(-(-rows // self.devices), rows, width) for rows, width in tables]
        return [(max(0, min(part, rows - self.rank * part)), width) for part, rows, width in most]

    def held(self, tables: Tables) -> int:
        """Tables and the state of their optimiser."""
        return sum(rows * (4 * width + 4) for rows, width in self.own(tables))

    def values(self, tables: Tables) -> int:
        """Tables alone."""
        return sum(4 * rows * width for rows, width in self.own(tables))

    def buffer(self, tables: Tables) -> int:
        """The largest buffer of the exchange of embeddings."""
        return 4 * self.batch * max(self.devices * columns(self.own(tables)), columns(tables))

    def all_reduce(self, num_bytes: float) -> float:
        """Sent in an all-reduce."""
        return 2 * (self.devices - 1) / self.devices * num_bytes

    def lookup(self, tables: Tables) -> float:
        """Sent in a forward pass."""
        peers, own = self.devices - 1, self.own(tables)
        if self.sharding == "row_wise":
            ids = 4 * len(tables) * self.batch * peers + 8 * len(tables) * self.batch * self.ids * peers / self.devices
        else:
            ids = (4 + 8 * self.ids) * self.batch * (len(tables) - len(own))
        return 24 * peers + ids + 4 * peers * self.batch * columns(own)

    def step(self, tables: Tables) -> float:
        """Sent in a training step."""
        own, every = columns(self.own(tables)), columns(tables)
        gradients = (self.devices - 1) * every if self.sharding == "row_wise" else every - own
        dense = self.all_reduce(4 * self.dense + 4 * self.dense_tensors)
        return self.lookup(tables) + 4 * self.batch * gradients + dense

    def search(self, tables: Tables, steps: int, plan_bytes: int) -> float:
        """Sent in a search with sseds, of so many batches."""
        own = self.all_reduce(8 * (steps + 2) + 8 * len(tables) + 8 * (columns(tables) + 1))
        return (steps + 1) * self.lookup(tables) + own + 8 + plan_bytes

    def counts(self, tables: Tables, steps: int) -> float:
        """Sent while rows are counted over so many batches."""
        own = self.all_reduce(8 * (steps + 1) + 8 * steps * self.devices + 8 * len(tables))
        ids = 8 * len(tables) * self.batch * self.ids * (self.devices - 1)
        return steps * (self.lookup(tables) + ids) + own

    def counted(self, tables: Tables) -> int:
        """Host memory of the counts of rows and of their order."""
        return 32 * sum(rows for rows, _ in self.own(tables))

    def inherit(self, tables: Tables) -> float:
        """Sent to give a compact model the rows of a full one, all of which are kept."""
        return self.all_reduce(sum(4 * rows * width for rows, width in tables))

    def verify(self, tables: Tables, small: Tables, steps: int) -> float:
        """Sent to compare both models over so many batches."""
        return steps * (self.lookup(tables) + self.lookup(small)) + self.all_reduce(16 * steps + 16)


def columns(tables: Tables) -> int:
    """Columns of all tables together."""
    return sum(width for _, width in tables)


def dense_of(hidden: list[int], width: int) -> tuple[int, int]:
    """P and Q of a Net whose tables have so many columns together."""
    sizes = [width, *hidden, 1]
    return sum(a * b + b for a, b in itertools.pairwise(sizes)), 2 * (len(sizes) - 1)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, without the network: rows, and for inherit bytes of the full tables."""

    training: float
    scoring: float
    counting: float
    retraining: float
    inherit: float


def narrow_plan(full: SizePlan, kept: int) -> SizePlan:
    """The plan that keeps so many columns of every table, with the scores that a plan of sseds holds."""
    plan = full.with_columns({table.name: range(kept) for table in full.tables})
    scores = np.random.default_rng(0).random(sum(table.width for table in full.tables)).tolist()
    return plan.made_by(
        "sseds", embtrim.Budget.parse("50%"), 0, {"config": SSEDSConfig().model_dump(), "scores": scores}
    )


# ---- sizes on paper -----------------------------------------------------------------------------------------------------


def estimates(given: argparse.Namespace, job: Job, rates: Rates) -> Iterator[tuple[str, ...]]:
    """Cells of a line for each part of the work."""
    tables: Tables = [(-(-given.rows // given.tables), given.width)] * given.tables
    small: Tables = [(rows, padded_width(given.columns)) for rows, _ in tables]
    full_plan = SizePlan(
        "",
        0,
        tuple(
            TablePlan(f"ebc.embedding_bags.t{i}", rows, width, (Block(rows, tuple(range(width))),))
            for i, (rows, width) in enumerate(tables)
        ),
    )
    plan_bytes = len(pickle.dumps(narrow_plan(full_plan, given.columns)))
    together = job.devices * job.batch
    trained, scored, compared = (-(-rows // together) for rows in (given.train_rows, given.score_rows, VERIFIED_ROWS))
    table_bytes = sum(4 * rows * width for rows, width in tables)
    chunks = sum(-(-rows // CHUNK_ROWS) for rows, _ in tables)

    def most(of_device: Callable[[Job], float]) -> float:
        return max(map(of_device, job.ranks()))

    def line(what: str, held: float, sent: float, steps: int, seconds: float) -> tuple[str, ...]:
        network = sent / given.network / 1e9
        return (
            what, f"{held / 1e9:.1f}", f"{steps:,}", f"{sent / steps / 1e6:,.1f}", f"{sent / 1e9:,.1f}",
            f"{sent * job.devices / 1e9:,.0f}", f"{seconds:,.0f}", f"{network:,.1f}",
        )  # fmt: skip

    full = most(lambda j: j.held(tables) + j.buffer(tables))
    both = most(lambda j: j.held(tables) + j.held(small))
    copied = most(lambda j: j.held(tables) + j.held(small) + j.values(tables) + j.buffer(tables))
    share = job.devices
    yield line(
        "an epoch of the full model",
        full,
        trained * most(lambda j: j.step(tables)),
        trained,
        given.train_rows / share / rates.training,
    )
    yield line(
        "search, sseds",
        full,
        most(lambda j: j.search(tables, scored, plan_bytes)),
        scored,
        given.score_rows / share / rates.scoring,
    )
    yield line(
        "counts of rows",
        full,
        most(lambda j: j.counts(tables, trained)),
        trained,
        given.train_rows / share / rates.counting,
    )
    moved = table_bytes / rates.inherit + 2 * table_bytes / given.host_bus / 1e9
    yield line("inherit", both, most(lambda j: j.inherit(tables)), chunks, moved)
    yield line(
        "verify",
        copied,
        most(lambda j: j.verify(tables, small, compared)),
        compared,
        2 * VERIFIED_ROWS / share / rates.counting,
    )
    yield line(
        "an epoch of the compact model",
        most(lambda j: j.held(small) + j.buffer(small)),
        trained * most(lambda j: j.step(small)),
        trained,
        given.train_rows / share / rates.retraining,
    )


def print_sizes(given: argparse.Namespace) -> None:
    """Tables of memory, network and time for each number of devices."""
    if given.rates:
        rates = Rates(*given.rates)
    else:
        from sizing_runs import measured_rates

        rates = measured_rates(given)
    dense, tensors = dense_of(given.hidden, given.tables * given.width)
    rows = -(-given.rows // given.tables)
    print(
        f"{given.tables} tables of {rows:,} rows x {given.width} columns, {4 * rows * given.tables * given.width / 1e9:,.0f} GB; the plan keeps "
        f"{given.columns} columns; {given.batch:,} rows a step and device, {given.ids} id(s) a feature; {dense:,} dense parameters; "
        f"{given.score_rows:,} rows are scored, {given.train_rows:,} are trained on; {given.network:g} GB/s of network a device, "
        f"{given.host_bus:g} GB/s between a device and its host.\n"
    )
    print(f"| unit cost of a device, {'as given' if given.rates else 'one thread of this CPU'} | a second |\n|---|---|")
    names = {
        "training": "rows", "scoring": "rows", "counting": "rows", "retraining": "rows", "inherit": "bytes of full tables",
    }  # fmt: skip
    for name, unit in names.items():
        print(f"| {name} | {getattr(rates, name):,.0f} {unit} |")
    for devices in given.devices:
        for sharding, words in SHARDINGS.items():
            job = Job(devices, given.batch, given.ids, dense, tensors, sharding)
            counted = max(j.counted([(rows, given.width)] * given.tables) for j in job.ranks()) / 1e9
            print(f"\n{devices} devices, sharded {words}; counts of rows take {counted:.1f} GB of host memory:\n")
            print(
                "| part | memory of a device, GB | steps | sent by a device in a step, MB | in all, GB | by all devices, GB | "
                "own work, s | network, s |\n" + "|---" * 8 + "|"
            )
            for cells in estimates(given, job, rates):
                print(f"| {' | '.join(cells)} |")


def print_check() -> None:
    """Two ranks beside the formulas."""
    from sizing_runs import checked  # which needs torchrec; the formulas do not

    ranks = checked()
    print("| bytes | sharded | rank 0, measured | formula | rank 1, measured | formula |\n" + "|---" * 6 + "|")
    for sharding in SHARDINGS:
        for name in ranks[0][sharding]:
            cells = " | ".join(f"{value:,.0f}" for rank in ranks for value in rank[sharding][name])
            print(f"| {name} | {SHARDINGS[sharding]} | {cells} |")


def whole(text: str) -> int:
    """A number of rows, such as 1e9."""
    number = float(text)
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(number)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Run two ranks and print them beside the formulas.")
    parser.add_argument("--rows", type=whole, default=10**9, help="Rows of all tables together (1e9).")
    parser.add_argument("--width", type=whole, default=64, help="Columns of the full tables, D (64).")
    parser.add_argument("--columns", type=whole, default=16, help="Columns that the plan keeps of each table (16).")
    parser.add_argument("--tables", type=whole, default=64, help="Tables, all of one size, T (64).")
    parser.add_argument("--devices", type=whole, nargs="+", default=[8, 64], help="Numbers of devices, N (8 64).")
    parser.add_argument("--batch", type=whole, default=4096, help="Rows of a batch on each device, B (4096).")
    parser.add_argument("--ids", type=whole, default=1, help="Ids of a row for each feature, L (1).")
    parser.add_argument("--hidden", type=whole, nargs="+", default=[512, 256], help="Hidden layers (512 256).")
    parser.add_argument("--score-rows", type=whole, default=10**7, help="Validation rows that are scored (1e7).")
    parser.add_argument("--train-rows", type=whole, default=10**9, help="Training rows of an epoch (1e9).")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s that a device sends (50).")
    parser.add_argument("--host-bus", type=float, default=25.0, help="GB/s between a device and its host (25).")
    parser.add_argument(
        "--rates", type=float, nargs=5, metavar=("TRAINING", "SCORING", "COUNTING", "RETRAINING", "INHERIT"),
        help="What your device does in a second: rows, and bytes of the full tables for INHERIT; instead of measuring here.",
    )  # fmt: skip
    parser.add_argument(
        "--unit-rows", type=whole, default=4000, help="Rows of each table in the runs that measure (4000)."
    )
    parser.add_argument(
        "--unit-batch", type=whole, default=1024, help="Rows of a batch in the runs that measure (1024)."
    )
    given = parser.parse_args(words)
    if given.columns > given.width:
        parser.error(f"--columns {given.columns} is more than --width {given.width}; a plan keeps at most all columns")
    for name, values in {"network": [given.network], "host-bus": [given.host_bus], "rates": given.rates or []}.items():
        if not all(value > 0 for value in values):
            parser.error(f"--{name} must be above 0, given {' '.join(f'{value:g}' for value in values)}")
    return given


def main() -> None:
    given = arguments()
    if given.check:
        print_check()
    else:
        print_sizes(given)


if __name__ == "__main__":
    main()
