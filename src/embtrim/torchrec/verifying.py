"""Proof, on real batches of all ranks, that a compact model gives what the full one gives without what the plan removes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from embtrim.compaction.verification import MODULE_TOLERANCE, Verification
from embtrim.errors import ModelError
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import evaluating, unwrapped
from embtrim.tasks.table_parts import chunks_of
from embtrim.torchrec.ranks import largest, summed
from embtrim.torchrec.sites import Shard, configs_of, find_collections, name_of, shards_of
from embtrim.torchrec.task import Task


@torch.no_grad()
def verify(full: nn.Module, small: nn.Module, plan: SizePlan, task: Task, max_rows: int = 65_536) -> Verification:
    """Compare a compact model that inherited its weights with the masked full model: losses of validation batches.

    All ranks call it. The entries that the plan removes are zero in the full model meanwhile, and as they were afterwards.

    Args:
        full: Full model, sharded or not.
        small: Compact model after `inherit`, before it is trained further.
        plan: Plan of the compact model.
        task: Task of the full model; its loss is compared batch by batch.
        max_rows: Most rows to compare on all ranks together.

    Raises:
        ModelError: There are no validation batches.
    """
    full, small = unwrapped(full), unwrapped(small)
    worst, rows = 0.0, 0.0
    with evaluating(full), evaluating(small), _masked(full, plan):
        for batch in task.batches("valid"):
            expected, found = task.loss(full, batch).double(), task.loss(small, batch).double()
            weight = task.weight_of(batch)
            if weight:
                worst = max(worst, float((found - expected).abs() / (1 + expected.abs())))
            rows += float(summed(torch.tensor(weight, dtype=torch.float64)))
            if rows >= max_rows:
                break
    if not rows:
        raise ModelError("verify compared no row: the Task's valid batches are empty or spent; give some to read again")
    worst = float(largest(torch.tensor(worst, dtype=torch.float64)))
    return Verification(worst, int(rows), MODULE_TOLERANCE, worst <= MODULE_TOLERANCE, "masked", {"loss": worst})


@contextmanager
def _masked(model: nn.Module, plan: SizePlan) -> Iterator[None]:
    """Set what a plan removes to zero inside a `with` block, piece by piece on each rank."""
    tables = {table.name: table for table in plan.tables}
    kept: list[tuple[Shard, torch.Tensor]] = []
    try:
        for path, module in find_collections(model):
            for config in configs_of(module):
                table = tables.get(name_of(path, module, config))
                if table is None or (not table.has_dropped and table.output_width == table.width):
                    continue
                for shard in shards_of(module, [config]):
                    kept.append((shard, shard.weight_RC.clone()))
                    for places, part_RC in chunks_of(shard.weight_RC):
                        rows = range(shard.rows.start + places.start, shard.rows.start + places.stop)
                        mask_RC = torch.from_numpy(table.kept_mask(rows)[:, shard.columns])
                        part_RC.mul_(mask_RC.to(part_RC.device))
        yield
    finally:
        for shard, values in kept:
            shard.weight_RC.copy_(values)
