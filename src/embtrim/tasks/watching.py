"""What a foreign model reads of its tables, seen while it runs: ids that are looked up, and weights that are read whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from embtrim.system.modules import evaluating, left_as_found, reads_given, uncompiled
from embtrim.tables.lazy_weights import WeightSource, lazy_weight
from embtrim.tasks.sites import ModuleSite, read_call, weights_kept

# Ids of a column that a batch reads, the lowest and the highest, and whether they differ.
Column = tuple[int, int, bool]
# Least rows of a batch whose columns are looked at, and the most columns.
LEAST_IDS, MOST_COLUMNS = 8, 1024


class Read(NamedTuple):
    """One read of a table.

    Attributes:
        how: "call" of its module; "index" of its weight; "product" of vectors with all of the weight; "whole" for any other
            operation on the weight.
        ids: Ids that are looked up; None where all rows are read.
    """

    how: Literal["call", "index", "product", "whole"]
    ids: Tensor | None = None


See = Callable[[Read], None]


@dataclass
class BatchReads:
    """What a model reads of one table in a batch.

    Attributes:
        counts: Number of reads of each kind.
        columns: The columns of ids, each a field of a flat table or a place in a list.
    """

    counts: Counter[str] = field(default_factory=Counter)
    columns: list[Column] = field(default_factory=list)

    def add(self, read: Read) -> None:
        """Add one read."""
        self.counts[read.how] += 1
        if read.ids is None or len(self.columns) > MOST_COLUMNS:
            return
        ids = read.ids.reshape(-1, read.ids.shape[-1] if read.ids.ndim > 1 else 1)[:, :MOST_COLUMNS]
        if len(ids) >= LEAST_IDS:
            low_C, high_C = ids.aminmax(dim=0)
            self.columns.extend(
                (low, high, low != high) for low, high in zip(low_C.tolist(), high_C.tolist(), strict=True)
            )

    def stretches(self) -> list[Column]:
        """The columns in order of their ids, if none meets another: the fields of a flat table; otherwise empty."""
        found = sorted(self.columns)
        is_apart = all(before[1] < after[0] for before, after in itertools.pairwise(found))
        return found if len(found) > 1 and is_apart and any(varies for *_, varies in found) else []


@torch.no_grad()
def reads_of_batch(
    model: nn.Module, sites: Sequence[ModuleSite], loss: Callable[[nn.Module, Any], Any], batch: Any
) -> dict[str, BatchReads]:
    """What a model reads of each table in the loss of a batch, by the path of the table."""
    found = {site.path: BatchReads() for site in sites}
    with left_as_found(model), evaluating(model), weights_kept(model), uncompiled(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(reads_seen(site, found[site.path].add))
        loss(model, batch)
    return found


@contextmanager
def reads_seen(site: ModuleSite, see: See) -> Iterator[None]:
    """Show every read of a site inside a `with` block: calls of its modules, and what is read of its weight."""
    called: list[nn.Module] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        called.append(module)
        see(Read("call", read_call(args, kwargs)[0]))

    def read(module: nn.Module) -> Tensor:
        return site.weight if module in called else lazy_weight(_Watched(site, see))

    with ExitStack() as stack:
        for module, name in site.holders:
            stack.enter_context(reads_given(module, name, partial(read, module)))
        for module in site.modules:
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            after = module.register_forward_hook(lambda module, _args, _output: called.remove(module), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


class _Watched(WeightSource):
    """The weight of a site, which shows what is read of it."""

    def __init__(self, site: ModuleSite, see: See) -> None:
        self.weight, self.see = site.weight, see
        self.what, self.shape = f"the weight of {site.path!r}", (site.weight.shape[0], site.weight.shape[1])
        self.dtype, self.device, self.parameters = site.weight.dtype, site.weight.device, (site.weight,)

    def all_rows(self) -> Tensor:
        """See WeightSource."""
        self.see(Read("whole"))
        return self.weight

    def rows_at(self, ids: Tensor) -> Tensor:
        """See WeightSource."""
        self.see(Read("index", ids))
        return self.weight[ids]

    def products(self, input: Tensor) -> Tensor:
        """See WeightSource."""
        self.see(Read("product"))
        return nn.functional.linear(input, self.weight)
