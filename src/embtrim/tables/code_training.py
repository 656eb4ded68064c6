"""CodeGate: train tables as their codes read them, so that the network learns to live with the rounding.

A forward pass reads each row as its codes would give it; the gradient passes straight through to the fp32
row (Bengio et al. 2013, arXiv 1308.3432). The scales follow the tables: they are fitted again every so many steps, by the
same `fit_codes` that stores the rows at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtrim.plan.table import CODE_BITS
from embtrim.tables.codes import as_coded
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.layout import Group
from embtrim.tables.packing import fit_each


class Stretches(NamedTuple):
    """Codes of one group's rows: T stretches, each the rows of one table at one width and precision.

    Attributes:
        start_T: First storage row of each stretch, ascending.
        bits_T: Bits of each stretch.
        scale_TW: Step from one code to the next.
        offset_TW: Value of code 0.
    """

    start_T: Tensor
    bits_T: Tensor
    scale_TW: Tensor
    offset_TW: Tensor


class CodeGate:
    """A row gate for `EmbeddingTables.gated`; see the module docstring.

    Args:
        tables: Tables in training, whose plan has fewer than 32 bits somewhere.
        steps_per_fit: Steps after which the scales are fitted again.
        counts: How often each stored row occurs in the training data, by table; see `quantize_` of the tables.
    """

    def __init__(
        self, tables: EmbeddingTables, steps_per_fit: int, counts: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.tables, self.steps_per_fit = tables, steps_per_fit
        self.count_R = None if counts is None else tables.by_storage_row(counts)
        self.coded = [
            group for group in tables.layout.groups if group.bits <= CODE_BITS and group.width and group.num_rows
        ]
        self.stretches: dict[int, Stretches] = {}
        self.fit()

    @torch.no_grad()
    def fit(self) -> None:
        """Fit the scales to the present rows."""
        self.tables.settle()
        for group in self.coded:
            runs = self._runs(group)
            starts = [start for start, _ in runs]
            sizes = [end - start for start, end in zip(starts, [*starts[1:], group.stop], strict=True)]
            counts = None if self.count_R is None else self.count_R[group.start : group.stop].split(sizes)
            fitted = fit_each(self.tables.group_view(group).split(sizes), [bits for _, bits in runs], counts)
            scales, offsets = zip(*fitted, strict=True)
            start_T, bits_T = (torch.tensor(values, device=scales[0].device) for values in zip(*runs, strict=True))
            self.stretches[group.start] = Stretches(start_T, bits_T, torch.stack(scales), torch.stack(offsets))

    def _runs(self, group: Group) -> list[tuple[int, int]]:
        """(first storage row, bits) of the stretches of a group."""
        runs = []
        for name in group.tables:
            table, starts = self.tables.layout.tables[name], self.tables.layout.segment_starts[name]
            if table.mixed:
                runs += [(start, table.bits) for start in starts if group.start <= start < group.stop]
                continue
            start = starts[0]
            for rows, bits in table.bands:
                runs.append((start, bits))
                start += rows
        return sorted(runs)

    def __call__(self, rows_U: Tensor, found_UW: Tensor) -> Tensor:
        """The rows as their codes read; the gradient is that of the rows."""
        group = next((g for g in self.coded if len(rows_U) and g.start <= int(rows_U[0]) < g.stop), None)
        if group is None:
            return found_UW
        stretches = self.stretches[group.start]
        place_U = torch.searchsorted(stretches.start_T, rows_U.long(), right=True) - 1
        scale_UW, offset_UW = stretches.scale_TW[place_U], stretches.offset_TW[place_U]
        with torch.no_grad():
            rounding = as_coded(found_UW, scale_UW, offset_UW, stretches.bits_T[place_U, None]) - found_UW
        return found_UW + rounding

    def on_step(self, step: int) -> None:
        """Fit the scales again where it is time; the hook of a training."""
        if step % self.steps_per_fit == 0:
            self.fit()

    def state_dict(self) -> dict[str, Any]:
        """The scales, for checkpoints."""
        return {str(start): list(stretches) for start, stretches in self.stretches.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the scales of a checkpoint."""
        self.stretches = {int(start): Stretches(*tensors) for start, tensors in state.items()}
