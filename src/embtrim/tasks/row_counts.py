"""Counts of the rows that batches read from the tables of a foreign model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from embtrim.system.modules import evaluating, left_as_found, uncompiled
from embtrim.tasks.sites import ModuleSite, weights_kept
from embtrim.tasks.watching import Read, reads_seen


def count_rows(
    model: nn.Module, sites: Sequence[ModuleSite], loss: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
) -> tuple[dict[str, np.ndarray], int]:
    """How often batches read each row, int64 (V,) by table name, and the number of batches.

    Rows that are indexed out of a weight count as often as their indices; all rows count once where it is read whole.
    """
    totals = [np.zeros(sum(site.num_rows), np.int64) for site in sites]
    num_batches = 0
    with (
        torch.no_grad(),
        left_as_found(model),
        evaluating(model),
        weights_kept(model),
        uncompiled(),
        ExitStack() as stack,
    ):
        for site, total_V in zip(sites, totals, strict=True):
            stack.enter_context(reads_seen(site, partial(_count, total_V)))
        for batch in batches:
            loss(model, batch)
            num_batches += 1
    counts = {
        name: part
        for site, total_V in zip(sites, totals, strict=True)
        for name, part in zip(site.names, np.split(total_V, np.cumsum(site.num_rows)[:-1]), strict=True)
    }
    return counts, num_batches


def _count(total_V: np.ndarray, read: Read) -> None:
    if read.ids is None:
        total_V += 1
    else:
        total_V += torch.bincount(read.ids.flatten(), minlength=len(total_V)).cpu().numpy()


def unread(sites: Sequence[ModuleSite], counts: dict[str, np.ndarray]) -> list[str]:
    """Tables of which no row is read, or the padding row alone, which holds no embedding."""
    found = []
    for site in sites:
        for name, padding in zip(site.names, site.reserved_rows, strict=True):
            read_V = counts[name] > 0
            if padding is not None:
                read_V[padding] = False
            if not read_V.any():
                found.append(name)
    return found
