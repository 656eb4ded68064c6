"""What a process, and each of two ranks, really do in the parts of a job on shards; see sizing.py."""

from __future__ import annotations

import argparse
import itertools
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan

import embtrim
from embtrim import torchrec as on_ranks
from embtrim.methods import SSEDSConfig
from embtrim.methods.sseds import slot_gradients
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import padded_width
from embtrim.torchrec.sites import find_collections
from sizing import SHARDINGS, Job, Rates, Tables, columns, dense_of, narrow_plan

# ---- a model of tables of one size, and two ranks that hold it -------------------------------------------------------------


class Net(nn.Module):
    """Pooled embeddings of all features and a network over them.

    Args:
        tables: Rows and columns of each table.
        hidden: Widths of the hidden layers.
        device: Where the tables are made.
    """

    def __init__(self, tables: Tables, hidden: list[int], device: str = "cpu") -> None:
        super().__init__()
        self.names = [f"t{number}" for number in range(len(tables))]
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=width, feature_names=[name])
            for name, (rows, width) in zip(self.names, tables, strict=True)
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, device=torch.device(device))
        sizes = [columns(tables), *hidden]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.over = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.ebc(
            features
        ).to_dict()  # found[name] of a KeyedTensor would make a gradient of all columns for each feature
        return self.over(torch.cat([found[name] for name in self.names], 1)).squeeze(1)


def loss(model: nn.Module, batch: tuple[Tensor, KeyedJaggedTensor]) -> Tensor:
    labels, features = batch
    return nn.functional.binary_cross_entropy_with_logits(model(features), labels)


def batches(tables: Tables, rows: int, ids: int, number: int, seed: int) -> list[tuple[Tensor, KeyedJaggedTensor]]:
    """Batches whose ids are in turn in the first and in the second half of each table."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        values = []
        for num_rows, _ in tables:
            half = -(-num_rows // 2)
            low, high = rng.integers(half, size=rows * ids), rng.integers(half, num_rows, size=rows * ids)
            values.append(np.where(np.arange(rows * ids) % 2, high, low))
        names, lengths = (
            [f"t{i}" for i in range(len(tables))],
            torch.full((rows * len(tables),), ids, dtype=torch.int32),
        )
        flat = torch.from_numpy(np.concatenate(values))
        labels = torch.from_numpy(rng.integers(2, size=rows).astype(np.float32))
        found.append((labels, KeyedJaggedTensor.from_lengths_sync(names, flat, lengths)))
    return found


def shard(model: nn.Module, path: str, sharding: str) -> DistributedModelParallel:
    """The model on all ranks, with fused row-wise Adagrad."""
    world, collection = dist.get_world_size(), model.get_submodule(path)
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    configs: Any = collection.embedding_bag_configs()  # type: ignore[operator]
    own = {
        c.name: row_wise(compute_kernel="fused")
        if sharding == "row_wise"
        else table_wise(rank=number % world, compute_kernel="fused")
        for number, c in enumerate(configs)
    }
    plan = construct_module_sharding_plan(
        collection, own, sharder=sharder, device_type="cpu", world_size=world, local_size=world
    )
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        plan=ShardingPlan({path: plan}),
        sharders=[sharder],  # type: ignore[list-item]
    )


class Traffic(TorchDispatchMode):
    """Counts what this rank sends inside a `with` block, from the tensors that the collectives of all libraries get.

    Attributes:
        sent: Bytes, by the rules for rings in the head of this file.
        largest: Bytes of the largest tensor that an exchange of embeddings took or gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.largest = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if "c10d" in space:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        world = dist.get_world_size()
        if name == "allreduce_":
            self.sent += sum(t.nbytes for t in args[0]) * 2 * (world - 1) / world
        elif name == "broadcast_":
            self.sent += sum(t.nbytes for t in args[0])
        elif name in ("alltoall_base_", "_reduce_scatter_base_", "_allgather_base_"):
            output, given = args[0], args[1]
            self.largest = max(self.largest, output.nbytes, given.nbytes)
            if name == "_allgather_base_":
                self.sent += given.nbytes * (world - 1)
            elif name == "_reduce_scatter_base_" or not args[4]:
                self.sent += given.nbytes * (world - 1) / world
            else:
                self.sent += given.nbytes - given[0].nbytes * args[4][dist.get_rank()]
        else:
            raise AssertionError(f"the collective {name!r} is not counted")


def held_by(model: nn.Module) -> int:
    """Bytes of the tables and of their optimiser's state that this rank holds."""
    modules = [m for _, c in find_collections(model) for lookup in c._lookups for m in lookup.modules()]  # type: ignore[union-attr]
    values = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    names = ("weights_host", "momentum1_host")
    found = [t for m in modules for name in names if (t := getattr(m, name, None)) is not None]
    assert {t.data_ptr() for t in values if t.nbytes > 1024} <= {t.data_ptr() for t in found}, "an unknown large buffer"
    return sum(t.nbytes for t in found)


def stored(plan: SizePlan) -> Tables:
    """Rows and stored columns of the compact tables, in FBGEMM's layout."""
    return [(table.num_compact_rows, padded_width(table.output_width)) for table in plan.tables]


def compared(rank: int, sharding: str) -> dict[str, tuple[float, float]]:
    """What this rank held and sent in each step, and what the formulas say; to be called on all ranks of a group."""
    tables: Tables = [(601, 8), (400, 16), (301, 16), (200, 8), (90, 8)]
    hidden, batch, ids, steps = [16], 32, 2, 3
    dense, tensors = dense_of(hidden, columns(tables))
    job = Job(dist.get_world_size(), batch, ids, dense, tensors, sharding, rank)
    torch.manual_seed(0)
    own = batches(tables, batch, ids, steps, seed=rank)
    full = shard(Net(tables, hidden), "ebc", sharding)
    task = on_ranks.Task(full, loss, own, own)
    task.progress = False

    sizes: list[int] = []  # of the pickled plan, before it is sent

    def agreed(plan: SizePlan) -> SizePlan:
        sizes.append(len(pickle.dumps(plan)))
        return on_ranks.Task.agreed(task, plan)

    task.agreed = agreed
    with (forward := Traffic()):
        loss(full.module, own[0])
    with (training := Traffic()):
        loss(full, own[0]).backward()
    with (searching := Traffic()):
        plan = embtrim.search(task, SSEDSConfig(min_dim=1), "50%")
    with (counting := Traffic()):
        task.count_scores()
    small = shard(on_ranks.compact(lambda: Net(tables, hidden, "meta"), plan), "ebc.collection", sharding)
    with (giving := Traffic()):
        on_ranks.inherit(full, small, plan)
    with (comparing := Traffic()):
        on_ranks.verify(full, small, plan, task).require()
    with (retraining := Traffic()):
        loss(small, own[0]).backward()

    kept = stored(plan)
    return {
        "full tables and state, held": (held_by(full), job.held(tables)),
        "compact tables and state, held": (held_by(small), job.held(kept)),
        "largest buffer of a training step": (training.largest, job.buffer(tables)),
        "lookup, sent": (forward.sent, job.lookup(tables)),
        "training step, sent": (training.sent, job.step(tables)),
        "search, sent": (searching.sent, job.search(tables, steps, sizes[0])),
        "counts of rows, sent": (counting.sent, job.counts(tables, steps)),
        "inherit, sent": (giving.sent, job.inherit(tables)),
        "verify, sent": (comparing.sent, job.verify(tables, kept, steps)),
        "retraining step, sent": (retraining.sent, job.step(kept)),
    }


def write_compared(rank: int, folder: str) -> None:
    """Compare both shardings on one of two ranks."""
    quiet()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {sharding: compared(rank, sharding) for sharding in SHARDINGS}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def checked() -> list[dict[str, dict[str, tuple[float, float]]]]:
    """Measured and computed bytes of each of two ranks, by sharding and name."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(write_compared, (folder,), 2)
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(2)]


# ---- unit costs of this machine ------------------------------------------------------------------------------------------


def quiet() -> None:
    """One thread, and no warnings of torchrec about CPUs."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def cpu_seconds(call: Callable[[], Any]) -> float:
    """The least CPU seconds of three calls, after one that warms up."""
    found = []
    for _ in range(4):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found[1:])


def measured_rates(given: argparse.Namespace) -> Rates:
    """Rates of one process with one thread, with tables of few rows."""
    threads = torch.get_num_threads()
    quiet()
    rows, number = given.unit_batch, 2
    tables: Tables = [(given.unit_rows, given.width)] * given.tables
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            full = shard(Net(tables, given.hidden), "ebc", "row_wise")
            own = batches(tables, rows, given.ids, number, seed=0)
            task = on_ranks.Task(full, loss, own, own)
            task.progress = False
            plan = narrow_plan(task.full_plan(), given.columns)
            small = shard(
                on_ranks.compact(lambda: Net(tables, given.hidden, "meta"), plan), "ebc.collection", "row_wise"
            )

            def trained(model: nn.Module) -> None:
                for batch in own:
                    loss(model, batch).backward()

            seconds = {
                "training": cpu_seconds(lambda: trained(full)),
                "scoring": cpu_seconds(lambda: slot_gradients(task, task.model, SSEDSConfig(), 0)),
                "counting": cpu_seconds(task.count_scores),
                "retraining": cpu_seconds(lambda: trained(small)),
            }
            inherited = cpu_seconds(lambda: on_ranks.inherit(full, small, plan))
            rates = {name: round(number * rows / value) for name, value in seconds.items()}
            return Rates(**rates, inherit=round(sum(4 * r * w for r, w in tables) / inherited))
        finally:
            dist.destroy_process_group()
            torch.set_num_threads(threads)
