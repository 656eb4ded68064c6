"""Task of a model whose collections TorchRec looks up, on one process or on the ranks of a process group."""

from __future__ import annotations

import copy
import dataclasses
import glob
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import evaluating
from embtrim.system.progress import tracked
from embtrim.tasks import task as plain
from embtrim.tasks.chosen import Patterns
from embtrim.tasks.entries import Entries
from embtrim.tasks.row_gradients import RowGradients
from embtrim.tasks.row_scores import RowScores
from embtrim.tasks.survey import Finding
from embtrim.tasks.table_parts import Change, TablePart, chunks_of
from embtrim.torchrec.entries import draw_weights, entries, entry_gradients
from embtrim.torchrec.inheriting import copy_weights
from embtrim.torchrec.parts import changed, count_rows, sharded_tables
from embtrim.torchrec.ranks import Filler, InStep, Running, from_first, gathered, largest, num_ranks, own_rank, summed
from embtrim.torchrec.sites import CollectionSite, configs_of, find_collections, is_sharded, name_of
from embtrim.torchrec.training import average_gradients, output_gradients, step_share
from embtrim.training.callbacks import Callback
from embtrim.training.settings import FitResult, Hooks, Optimizer

logger = logging.getLogger(__name__)


class Task(plain.Task):
    """A model with collections of TorchRec, with everything that a search may need.

    Every rank makes a Task of the same model, with its own part of the batches, and calls `search` with the same settings.
    Scores are summed over the ranks, so that they all get the same plan. Ranks may have unequal numbers of batches: those
    that have none left run their last one again, uncounted.

    Args:
        model: A DistributedModelParallel, or a model whose collections are not sharded. Searches never change it.
        loss: (model, batch) -> mean loss of the batch, a scalar tensor. It gets the model inside the
            DistributedModelParallel, and must read the collections' output by name, never `KeyedTensor.values()` by
            position: sharding changes the order.
        train: Training batches of this rank: an iterable that can be read again.
        valid: Validation batches of this rank, likewise.
        include: Names of the tables to search, such as "sparse.ebc.embedding_bags.t_user", or patterns such as "*.t_user";
            None searches all.
        exclude: Names or patterns of tables to leave alone, of those included.
        optimizer: model -> optimiser of all that TorchRec does not update within the backward pass. Searches that train
            need it. Their steps take the mean of the ranks' gradients, weighed by rows.
        fresh: seed -> model with initial weights, sharded as you like. Searches that train need it; the trained weights
            are copied into it where a search starts from them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        fresh: Callable[..., nn.Module] | None = None,
    ) -> None:
        running = Running()

        def of_batch(model: nn.Module, batch: Any) -> Tensor:
            running.batch = batch
            return loss(model, batch.batch if isinstance(batch, Filler) else batch)

        self._running = running
        super().__init__(
            model, of_batch, train, valid, optimizer=optimizer, fresh=fresh, include=include, exclude=exclude
        )

    def sites(self, model: nn.Module) -> list[CollectionSite]:  # type: ignore[override]
        """See Task."""
        found, names = [], []
        for path, module in find_collections(model):
            configs = configs_of(module)
            names += [name_of(path, module, config) for config in configs]
            chosen = [c for c in configs if not self._chosen.why_left([name_of(path, module, c)])]
            for width in dict.fromkeys(config.embedding_dim for config in chosen):
                of_width = [config for config in chosen if config.embedding_dim == width]
                found.append(CollectionSite(path, module, of_width))
        self._chosen.check(names)
        if not found:
            left = f"; all of {', '.join(names)} are left alone" if names else ", only what embtrim.Task searches"
            raise ModelError(f"no collection of torchrec to shrink was found in {type(model).__name__}{left}")
        return found

    def survey(self) -> list[Finding]:
        """Every table of every collection of the model: found, or left alone and why."""
        findings = []
        for path, module in find_collections(self.model):
            for config in configs_of(module):
                name, size = name_of(path, module, config), (config.num_embeddings, config.embedding_dim)
                why = self._chosen.why_left([name])
                note = why or f"features {', '.join(config.feature_names)}"
                findings.append(Finding(name, type(module).__name__, *size, not why, note, 4 * size[0] * size[1]))
        return findings

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """See Task. All ranks get equally many; the Fillers among them do not count."""
        return InStep(super().batches(split, seed), self._train, split, self.weight_of)

    def tracked_batches(self, split: str, what: str, seed: int | None = None) -> Iterable[Any]:
        """See Task. Rank 0 shows the progress."""
        own = self._train if split == "train" else self._valid
        total = len(own) if isinstance(own, Sized) else None
        return tracked(self.batches(split, seed), what, total, self.progress and own_rank() == 0)

    def num_batches(self, split: str) -> int:
        """See Task."""
        return sum(1 for _ in self.batches(split))

    def weight_of(self, batch: Any) -> float:
        """See Task. Batches of torchrec's datasets count by their labels."""
        if isinstance(batch, Filler):
            return 0.0
        labels = getattr(batch, "labels", None)
        return float(len(labels)) if isinstance(labels, Tensor) else super().weight_of(batch)

    def summed(self, values: Tensor) -> Tensor:
        """See OneProcess."""
        return summed(values)

    def largest(self, values: Tensor) -> Tensor:
        """See OneProcess."""
        return largest(values)

    def gathered(self, values_N: Tensor) -> Tensor:
        """See OneProcess."""
        return torch.cat(gathered(values_N))

    def averaged(self, values: Tensor, batch: Any) -> Tensor:
        """See OneProcess."""
        weight = torch.tensor([self.weight_of(batch)], dtype=torch.float64)
        *total, weights = summed(torch.cat([values.double().flatten().cpu() * weight, weight])).split(values.numel())
        return (total[0] / weights).view(values.shape).to(values)

    def step_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See Task.

        Raises:
            ModelError: Ranks have batches of unequal size, which tables that are cut by rows cannot be trained on.
        """
        return self.loss(model, batch) * step_share(self, model, batch)

    def average_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        """See OneProcess. Tables on shards have such gradients already."""
        average_gradients(self._trained, optimizers)

    def summed_parts(self, part: Tensor) -> Tensor:
        """See OneProcess. The step's gradients are means over ranks, so the own part counts as often as there are ranks."""
        return summed(part.detach()) + num_ranks() * (part - part.detach())

    def unshared(self, rows_U: Tensor) -> Tensor:
        """See OneProcess. Rows of a Filler are left out."""
        before = gathered(rows_U if self._running.counts else rows_U[:0])[: own_rank()]
        if not self._running.counts:
            return torch.zeros_like(rows_U, dtype=torch.bool)
        return ~torch.isin(rows_U, torch.cat([rows_U[:0], *before]))

    def place_of(self, num_samples: int) -> tuple[int, int]:
        """See OneProcess. Samples of a Filler do not count."""
        sizes = torch.zeros(num_ranks(), dtype=torch.int64)
        sizes[own_rank()] = num_samples if self._running.counts else 0
        sizes = summed(sizes)
        return int(sizes[: own_rank()].sum()), int(sizes.sum())

    def copied_model(self) -> nn.Module:
        """See Task. `fresh=` makes another sharded model, which gets the weights of this one."""
        if not is_sharded(self.model):
            return super().copied_model()
        if self._fresh is None:
            raise ModelError(
                "this search trains a copy of the model, and a sharded model cannot be copied; give the Task `fresh=` "
                "(seed -> model, sharded anew)"
            )
        model = self.fresh(0)
        copy_weights(self.model, model)
        return model

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> FitResult:
        """See Task: an epoch is one pass over the batches of all ranks in step.

        Raises:
            ModelError: The Task has no `optimizer=`; or what is asked for cannot be had on shards.
        """
        if is_sharded(model) and (patience is not None or lr_factor != 1 or self.checkpoints is not None):
            raise ModelError(
                "a sharded model is trained here without patience, lr_factor and checkpoints: its tables have optimisers of "
                "their own; train it in your own loop"
            )
        self._trained = model
        return super().fit(model, epochs, seed, hooks, patience, lr_factor, callbacks, **settings)

    def agreed(self, plan: SizePlan) -> SizePlan:
        """See OneProcess: the plan of rank 0."""
        return from_first(plan)

    def column_norms(self) -> dict[str, np.ndarray]:
        """See Task."""
        found: dict[str, Tensor] = {}
        for site in self.sites(self.model):
            found |= {n: torch.zeros(w, dtype=torch.float64) for n, w in zip(site.names, site.widths, strict=True)}
            for shard in site.shards():
                for _, part_RC in chunks_of(shard.weight_RC) if shard.counts else ():
                    squares = part_RC.double().square().sum(0).cpu()
                    found[site.by_config[shard.table]][shard.columns] += squares
        return {name: summed(squares).sqrt().numpy() for name, squares in found.items()}

    def row_norms(self) -> dict[str, RowScores]:
        """See Task."""
        found = {}
        for table in sharded_tables(self.sites(self.model)):
            parts = [part.double().norm(dim=1).cpu().numpy() for _, part in chunks_of(table.weight_ND)]
            found[table.name] = RowScores(np.concatenate([np.zeros(0), *parts]), table.first, table.num_rows, self)
        return found

    def count_scores(self) -> dict[str, RowScores]:
        """See Task."""
        parts = self.table_parts().items()
        return {name: RowScores(part.count_N, part.first, part.num_rows, self) for name, part in parts}

    def row_sizes(self, model: nn.Module) -> dict[str, np.ndarray]:
        """See Task."""
        found: dict[str, Tensor] = {}
        for site in self.sites(model):
            found |= {name: torch.zeros(rows) for name, rows in zip(site.names, site.num_rows, strict=True)}
            for shard in site.shards():
                if shard.counts:
                    found[site.by_config[shard.table]][shard.rows] += shard.weight_RC.abs().sum(1).cpu()
        return {name: summed(sizes).numpy() for name, sizes in found.items()}

    def draw_weights(self, model: nn.Module, std: float, seed: int) -> None:
        """See Task."""
        draw_weights(self.sites(model), std, seed)

    def entries(self, model: nn.Module) -> list[Entries]:
        """See Task."""
        return entries(self.sites(model))

    def entry_gradients(self, model: nn.Module, batches: Iterable[tuple[int, Any, float]]) -> list[Tensor]:
        """See Task."""
        return entry_gradients(self, model, batches)

    def row_counts(self) -> dict[str, np.ndarray]:
        """See Task: counts of all ranks, on each of them; `count_scores` leaves them where the rows are."""
        counts = {
            name: torch.zeros(rows, dtype=torch.int64)
            for site in self.sites(self.model)
            for name, rows in zip(site.names, site.num_rows, strict=True)
        }

        def count(name: str, ids: Tensor) -> None:
            counts[name] += torch.bincount(ids.flatten().cpu(), minlength=len(counts[name]))

        self._look_up(self.batches("train"), count)
        return {name: summed(count_V).numpy() for name, count_V in counts.items()}

    def table_parts(self) -> dict[str, TablePart]:
        """See Task: the rows that this rank holds. No rank gathers a table, and none counts the rows of others."""
        tables = sharded_tables(self.sites(self.model))
        counts = count_rows({t.name: (t.num_rows, t.rows) for t in tables}, self._ids_read())
        return {t.name: TablePart(t.name, t.first, t.num_rows, t.weight_ND, counts[t.name]) for t in tables}

    def _ids_read(self) -> Iterator[dict[str, list[Tensor]]]:
        """The ids that each train batch of this rank reads, by table; none for a Filler."""
        read: dict[str, list[Tensor]] = {}
        for _ in self._looked_up(self.batches("train"), lambda name, ids: read.setdefault(name, []).append(ids)):
            yield read
            read.clear()

    def changed(self, changes: Mapping[str, Change]) -> AbstractContextManager[None]:
        """See Task."""
        return changed(sharded_tables(self.sites(self.model)), changes)

    def row_gradients(self, batch: Any, place: int) -> list[RowGradients]:
        """See Task."""
        return output_gradients(
            self.sites(self.model), lambda: self.weight_of(batch) * self.loss(self.model, batch), place
        )

    def unread_tables(self) -> list[str]:
        """See Task. The ranks exchange a number for each table, not for each row."""
        if isinstance(self._train, Iterator):
            return []
        first = self._unread(itertools.islice(iter(self.batches("train")), 1))
        return self._unread(self.batches("train")) if first else []

    def _unread(self, batches: Iterable[Any]) -> list[str]:
        """Names of the tables of which no rank reads a row in its batches."""
        names = [name for site in self.sites(self.model) for name in site.names]
        num_ids = dict.fromkeys(names, 0)

        def add(name: str, ids: Tensor) -> None:
            num_ids[name] += ids.numel()

        self._look_up(batches, add)
        total = summed(torch.tensor(list(num_ids.values()), dtype=torch.int64)).tolist()
        return [name for name, number in zip(names, total, strict=True) if not number]

    def _look_up(self, batches: Iterable[Any], see: Callable[[str, Tensor], None]) -> None:
        """Run batches, and call `see` with the name of a table and the ids of each of its features; not those of Fillers."""
        for _ in self._looked_up(batches, see):
            pass

    def _looked_up(self, batches: Iterable[Any], see: Callable[[str, Tensor], None]) -> Iterator[Any]:
        """See `_look_up`; gives each batch after it ran."""

        def see_counted(name: str, ids: Tensor) -> None:
            if self._running.counts:
                see(name, ids)

        with evaluating(self.model), ExitStack() as stack:
            for site in self.sites(self.model):
                stack.enter_context(site.rows_seen(see_counted))
            for batch in batches:
                with torch.no_grad():
                    self.loss(self.model, batch)
                yield batch

    def without_tables(self, names: Collection[str]) -> Task:
        """This task without some of its tables."""
        task = copy.copy(self)
        excluded = (*self._chosen.exclude, *map(glob.escape, names))
        task._chosen = dataclasses.replace(self._chosen, exclude=excluded)
        return task
