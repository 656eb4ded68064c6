"""What the examples share: the bundled flights data, and the way from a library's model to its outcome."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

import embtrim
from embtrim.compaction import compact_tables
from embtrim.metrics import compute_metrics

WIDTH = 16
EPOCHS = 2
DATA = embtrim.load("flights")
SIZES = {field.name: field.vocab_size for field in DATA.schema.id_fields}


def loader(split: str) -> DataLoader:
    """Batches (ids_BF, labels_B) of a split; those of training are shuffled."""
    arrays = DATA.split(split)
    rows = TensorDataset(torch.from_numpy(np.array(arrays.ids, np.int64)), torch.from_numpy(np.array(arrays.labels)))
    order = RandomSampler(rows) if split == "train" else SequentialSampler(rows)
    return DataLoader(rows, sampler=BatchSampler(order, batch_size=2048, drop_last=False), batch_size=None)


@torch.no_grad()
def auc(model: nn.Module, probability: Callable[[nn.Module, Tensor], Tensor], split: str) -> float:
    """AUC over a whole split."""
    model.eval()
    parts = [(probability(model, ids_BF), labels_B) for ids_BF, labels_B in loader(split)]
    found_N, labels_N = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return compute_metrics(labels_N, np.log(found_N / (1 - found_N))).auc


def trim(
    library: str, make_model: Callable[[int], nn.Module], probability: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Train a model, search it with SSEDS at 10%, compact, retrain, and print what came of it.

    Args:
        library: and its version.
        make_model: seed -> model.
        probability: (model, ids_BF) -> probability of a click (B,).
    """
    model = make_model(0)
    task = embtrim.Task(
        model,
        loss=lambda model, batch: nn.functional.binary_cross_entropy(probability(model, batch[0]), batch[1]),
        train=loader("train"),
        valid=loader("valid"),
        score=lambda model: auc(model, probability, "valid"),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
        fresh=make_model,
    )
    task.fit(model, epochs=EPOCHS, seed=0)
    plan = embtrim.search(task, embtrim.SSEDSConfig(), budget="10%")
    verified = embtrim.verify(model, plan, task)
    verified.require()
    small = embtrim.compact(make_model(0), plan)  # of a fresh model: dense layers are kept as given
    task.fit(small, epochs=EPOCHS, seed=0)

    tables = [tensor for table in compact_tables(small, plan) for tensor in table.state_dict().values()]
    lines = [line for line in Path(sys.argv[0]).read_text("utf-8").splitlines() if line.strip()]
    left = [finding for finding in task.survey() if not finding.found]
    outcome = {
        "library": library,
        "model": type(model).__name__,
        "lines of this script": len(lines),
        "tables found": len(plan.tables),
        "left alone": f"{len(left)}, {sum(f.num_bytes for f in left):,} bytes, such as {left[0]}" if left else "none",
        "test AUC": f"{auc(model, probability, 'test'):.4f} full, {auc(small, probability, 'test'):.4f} small",
        "table bytes": f"{4 * plan.num_full_params:,} full, {sum(t.nbytes for t in tables):,} small",
        "compact against masked": f"{verified.max_difference:.1e} over {verified.num_rows:,} rows",
    }
    for name, value in outcome.items():
        print(f"{name:>24}  {value}")
