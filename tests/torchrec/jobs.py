"""What each of two ranks does in test_ranks.py; all of it in step with the other rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import embtrim
from embtrim import torchrec as on_ranks
from embtrim.methods import (
    FrequencyConfig,
    MagnitudeConfig,
    MDEConfig,
    RandomConfig,
    SSEDSConfig,
    UniformConfig,
)
from embtrim.methods.sseds import slot_gradients
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.torchrec.sites import configs_of, find_collections, shards_of
from tests.torchrec.models import NUM_ROWS, SHARDINGS, Pooled, Sequences, batches, loss, make_model, sharded

KINDS = {"ebc": Pooled, "ec": Sequences}
METHODS = {
    "sseds": SSEDSConfig(),
    "uniform": UniformConfig(),
    "random": RandomConfig(),
    "mde": MDEConfig(popularity="occurrences", align="scatter"),
    "frequency": FrequencyConfig(),
    "magnitude": MagnitudeConfig(),
    "magnitude of rows": MagnitudeConfig(unit="rows"),
}


def own_batches(rank: int) -> list[Any]:
    """Five batches on rank 0; three and an empty one on rank 1."""
    return batches(0, 1280) if rank == 0 else [*batches(1280, NUM_ROWS), *batches(NUM_ROWS, NUM_ROWS + 1)]


def task_of(model: Any, rank: int) -> on_ranks.Task:
    return on_ranks.Task(model, loss, own_batches(rank), own_batches(rank))


def whole_task(kind: Any) -> embtrim.Task:
    """The same work in one process."""
    return embtrim.Task(make_model(kind), loss, batches(0, NUM_ROWS), batches(0, NUM_ROWS))


def weights_here(model: Any) -> list[torch.Tensor]:
    return [shard.weight_RC for _, m in find_collections(model) for shard in shards_of(m, configs_of(m))]


def scores(rank: int, folder: Path) -> dict[str, float]:
    """Largest difference of SSEDS's scores from one process, relative to the largest; infinite if a table moved."""
    found = {}
    for path, kind in KINDS.items():
        whole = whole_task(kind)
        expected = slot_gradients(whole, whole.model, SSEDSConfig(), 0)
        for sharding in SHARDINGS:
            task = task_of(sharded(make_model(kind), path, sharding), rank)
            before = [weight.clone() for weight in weights_here(task.model)]
            gradients = slot_gradients(task, task.model, SSEDSConfig(), 0)
            moved = not all(map(torch.equal, before, weights_here(task.model)))
            worst = float(np.abs(gradients - expected).max() / np.abs(expected).max())
            found[f"{path} {sharding}"] = np.inf if moved else worst
    return found


def plans(rank: int, folder: Path) -> dict[str, tuple[str, str]]:
    """Digests of the plans of each method, on these ranks and in one process."""
    found = {}
    for path, sharding in (("ebc", "mixed"), ("ebc", "column_wise"), ("ec", "row_wise")):
        task, whole = task_of(sharded(make_model(KINDS[path]), path, sharding), rank), whole_task(KINDS[path])
        for name, config in METHODS.items():
            both = [embtrim.search(t, config, "30%", seed=1) for t in (task, whole)]
            found[f"{path} {sharding} {name}"] = (both[0].digest, both[1].digest)
    return found


def cut_plan(rank: int, path: str) -> SizePlan:
    """Some columns of every table, the first rows of one, scattered rows of another, and nothing of a third."""
    plan = embtrim.search(whole_task(KINDS[path]), SSEDSConfig(min_dim=1), "40%")
    rows = {"t_user": np.arange(200), "t_item": np.arange(0, 300, 3)}

    def cut(table: Any) -> Any:
        name = table.name.rpartition(".")[2]
        if name == "t_hour":
            return dataclasses.replace(table, blocks=())
        if name not in rows:
            return table
        return dataclasses.replace(
            table, blocks=(Block(len(rows[name]), table.columns, "scatter", rows[name].astype(np.int32)),)
        )

    return dataclasses.replace(plan, tables=tuple(map(cut, plan.tables)))


def compaction(rank: int, folder: Path) -> dict[str, float]:
    """Largest difference of compact and masked model for each sharding of both, and of a model opened from a checkpoint."""
    found = {}
    for path, kind in KINDS.items():
        plan = cut_plan(rank, path)
        inner = "ebc.collection" if path == "ebc" else None
        for given, taken in zip(SHARDINGS, (*SHARDINGS[1:], SHARDINGS[0]), strict=True):
            full = sharded(make_model(kind), path, given)
            small: Any = on_ranks.compact(lambda kind=kind, inner=inner: kind("meta" if inner else "cpu"), plan)
            if inner is not None:
                small = sharded(small, inner, taken)
            on_ranks.inherit(full, small, plan)
            result = on_ranks.verify(full, small, plan, task_of(full, rank))
            found[f"{path} {given} -> {taken}"] = result.max_difference if result.num_rows == NUM_ROWS else np.inf
            if inner is not None and taken == "row_wise":
                found |= reopened(small, plan, folder, rank)
    return found


def reopened(small: Any, plan: SizePlan, folder: Path, rank: int) -> dict[str, float]:
    """Train a step, save, open under another sharding: difference of the logits."""
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    loss(small, batches(0, 256)[0]).backward()
    optimizer.step()
    dcp.save(small.state_dict(), checkpoint_id=folder / "checkpoint")
    other = sharded(on_ranks.compact(lambda: Pooled("meta"), plan), "ebc.collection", "table_wise")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    other.load_state_dict(state)
    with torch.no_grad():
        features = batches(0, 256)[0][1]
        expected, found = small(features), other(features)
    if rank == 0:
        plan.save(folder / "plan.json")
        torch.save(expected, folder / "logits.pt")
    dist.barrier()
    return {"reopened": float((expected - found).abs().max())}


def sizes(rank: int, folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Bytes that this rank held and sent, and those of the formulas of benchmarks/sizing.py."""
    from sizing import SHARDINGS
    from sizing_runs import compared

    return {sharding: compared(rank, sharding) for sharding in SHARDINGS}
