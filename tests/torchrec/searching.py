"""Searches that train or read a model, on two ranks and in one process, of the same batches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.optim.optimizers import in_backward_optimizer_filter

import embtrim
from embtrim import torchrec as on_ranks
from embtrim.methods import GuidedConfig, HardMaskConfig, OptEmbedConfig, PMEConfig, SSEDSConfig
from embtrim.methods.readings import read
from tests.torchrec.models import RATE, SIZES, Pooled, Sequences, batches, loss, make_model, sharded

KINDS = {"ebc": Pooled, "ec": Sequences}
# Rows that rank 0 has of each batch of 256: of equal batches, and of others. Unequal ones end with some of rank 0 alone.
HALF, MORE = 128, 160
TRAINED = {
    "hard_mask": HardMaskConfig(epochs=2, mask_lr=4.0, orthogonality=1.0, orthogonality_every=1),
    "quantile": HardMaskConfig(mode="quantile", epochs=2, start="initial", single_level=True),
    "optembed": OptEmbedConfig(epochs=3, threshold_lr=2.0, threshold_weight=0.05, population=6, generations=2),
}
# Collection, sharding, rows of rank 0, and methods. Tables that are cut by rows train on equal batches.
CASES = (
    ("ebc", "mixed", HALF, ("hard_mask", "optembed")),
    ("ec", "row_wise", HALF, ("quantile", "optembed")),
    ("ebc", "table_wise", MORE, ("hard_mask", "optembed")),
)
# Sharding, rows of rank 0, and settings. The dense kernel has an optimiser beside it, which the warm-up uses.
SIZED = (
    ("mixed", HALF, PMEConfig(warmup_epochs=1, search_fraction=0.5)),
    ("column_wise", MORE, PMEConfig()),
    ("row_wise", HALF, PMEConfig(score="magnitude")),
)
READ = (("ebc", "mixed"), ("ec", "column_wise"))
BUDGETS = (("30%", 32), ("10%", 32), ("6%", "mixed"))


def parts(number: int, cut: int, rank: int | None) -> list[Any]:
    """What a rank has of the first batches of 256 rows, and after unequal ones of another; all for rank None."""
    whole = [(start, start + 256) for start in range(0, number * 256, 256)]
    if rank is not None:
        whole = [(start, start + cut) if rank == 0 else (start + cut, stop) for start, stop in whole]
    if cut != HALF and rank in (None, 0):
        whole.append((number * 256, number * 256 + 100))
    return [batches(*ends)[0] for ends in whole]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD at the rate of the fused one, for all that it leaves."""
    return torch.optim.SGD([p for _, p in in_backward_optimizer_filter(model.named_parameters())], RATE)


def task_of(path: str, sharding: str | None, rank: int | None, cut: int = HALF, kernel: str = "fused") -> on_ranks.Task:
    """The task of a rank; of one process for rank None."""
    kind = KINDS[path]

    def fresh(seed: int) -> nn.Module:
        model = make_model(kind, seed)
        return model if sharding is None else sharded(model, path, sharding, kernel, EmbOptimType.EXACT_SGD)

    train, valid = parts(5, cut, rank), parts(5, MORE, rank)
    return on_ranks.Task(fresh(7), loss, train, valid, exclude="*.t_hour", optimizer=optimizer, fresh=fresh)


def searches(rank: int | None, folder: Path | None = None) -> dict[str, tuple[str, Any]]:
    """Digest of each method's plan, and what it says of how it was found."""
    found = {}
    for path, sharding, cut, names in CASES:
        for name in names:
            task = task_of(path, None if rank is None else sharding, rank, cut)
            before = task.valid_score(task.model)
            plan = embtrim.search(task, TRAINED[name], "40%", seed=1)
            assert task.valid_score(task.model) == before, "a search changed the model"
            scores = plan.details.get("scores") or [*plan.details["thresholds"], plan.details["fitness"]]
            found[f"{path} {sharding} {name}"] = plan.digest, scores
    return found


def sized(rank: int | None, folder: Path | None = None) -> dict[str, str]:
    """Digests of the plans of pme."""
    found = {}
    for sharding, cut, config in SIZED:
        task = task_of("ebc", None if rank is None else sharding, rank, cut, "dense")
        before = [value.clone() for _, value in values_of(task)]
        found[sharding] = embtrim.search(task, config, "40%", seed=1).digest
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, values_of(task), strict=True)), "pme moved a weight"
    return found


def readings(rank: int | None, folder: Path | None = None) -> dict[str, tuple[list[str], list[float]]]:
    """Digests of the plans of guided, and the numbers of its readings."""
    found = {}
    for path, sharding in READ:
        task = task_of(path, None if rank is None else sharding, rank, MORE)
        before = [value.clone() for _, value in values_of(task)]
        task.readings = read(task)
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, values_of(task), strict=True)), (
            "reading moved a weight"
        )
        tables = task.readings.tables.values()
        numbers = [task.readings.score, *(t.absence or 0.0 for t in tables)]
        for curve in (task.readings.rows, task.readings.widths, task.readings.bits):
            numbers += [*curve.errors, *curve.losses]
        for table in tables:
            numbers += [*table.lost_D, *table.noise.values(), *np.concatenate(list(table.segments.noise.values()))]
            numbers += [*table.energies.sums(np.arange(0, table.energies.num_rows + 1, 20))]
        plans = [embtrim.search(task, GuidedConfig(), budget, bits=bits) for budget, bits in BUDGETS]
        found[f"{path} {sharding}"] = [plan.digest for plan in plans], list(map(float, numbers))
    return found


def values_of(task: on_ranks.Task) -> list[tuple[str, torch.Tensor]]:
    """The pieces of tables that this process holds."""
    return [(shard.table, shard.weight_RC) for site in task.sites(task.model) for shard in site.shards()]


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """What is said of searches that cannot run, and the digest of one that can."""
    found: dict[str, str] = {}

    @contextlib.contextmanager
    def noted(what: str) -> Any:
        try:
            yield
        except embtrim.EmbtrimError as error:
            found[what] = str(error)

    task = task_of("ebc", "row_wise", rank)
    with noted("patience"):
        task.fit(task.model, 1, 0, patience=1)
    task._train = parts(3, MORE, rank)[:3]
    with noted("unequal"):
        embtrim.search(task, HardMaskConfig(), "40%")
    for what, path, kernel, config, bits in (
        ("fused", "ebc", "fused", PMEConfig(), 32),
        ("sequences", "ec", "dense", PMEConfig(), 32),
        ("control", "ebc", "dense", PMEConfig(score="random"), 32),
        ("mixed bits", "ebc", "fused", SSEDSConfig(), "mixed"),
    ):
        with noted(what):
            embtrim.search(task_of(path, "table_wise", rank, kernel=kernel), config, "40%", bits=bits)
    with noted("export"):
        on_ranks.export(task.model, task.full_plan(), folder / "exported")
    pooled = task_of("ebc", "table_wise", rank)
    pooled._train = pooled._valid = two_ids(parts(3, HALF, rank), rank)
    for name in ("hard_mask", "optembed"):
        with noted(f"pooled {name}"):
            embtrim.search(pooled, TRAINED[name], "40%")
    found["without rows"] = embtrim.search(pooled, HardMaskConfig(orthogonality=0), "40%").digest
    pooled._fresh = None
    with noted("copy"):
        embtrim.search(pooled, HardMaskConfig(), "40%")
    return found


def two_ids(given: list[Any], rank: int) -> list[Any]:
    """The batches, in which each sample of rank 1 has two users."""
    return [(labels, pairs(features) if rank else features) for labels, features in given]


def pairs(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    parts = features.to_dict()
    lengths = torch.stack([parts[name].lengths() * (2 if name == "user" else 1) for name in parts])
    ids = [p.values().repeat_interleave(2) if name == "user" else p.values() for name, p in parts.items()]
    return KeyedJaggedTensor.from_lengths_sync(list(parts), torch.cat(ids), lengths.flatten())


def orders(rank: int, folder: Path) -> dict[str, Any]:
    """The order of a collection's output by sharding, and how far reads by position and by name are from one process."""
    features, found = parts(1, HALF, rank)[0][1], {}
    with torch.no_grad():
        plain = make_model(Pooled).ebc(features)
        for sharding in ("table_wise", "row_wise"):
            output = sharded(make_model(Pooled), "ebc", sharding).module.ebc(features)
            by_name = max(float((output[name] - plain[name]).abs().max()) for name in SIZES)
            by_place = float((output.values() - plain.values()).abs().max())
            found[sharding] = list(output.keys()), by_name, by_place
    return found
