"""compare: a grid of base models, methods, budgets and seeds on one data set; one record per cell, resumable.

Existing records are kept, so an interrupted grid is continued where it stopped (within a training, from its last
checkpoint), and a grid can be extended. The full model of a (model, seed) is trained once, kept on disk, and shared by
all methods. Several worker processes make the same cells with the same seeds; their records differ only in times and
memory, provided that every process has as many threads (matrix products of other thread counts round differently).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError

from embtrim.config import to_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError, EmbtrimError
from embtrim.experiments import estimates
from embtrim.experiments.grid import (
    Cell,
    CompareConfig,
    Skipped,
    cell_config,
    check_compare,
    finished,
    grid,
    read_skipped,
    record_path,
    resolve,
    run_config,
    settings_by_label,
    weights_path,
    write_skipped,
)
from embtrim.experiments.records import RunRecord, Trained, code_version
from embtrim.experiments.room import check_room, room_of_grid
from embtrim.experiments.steps import shrink, train_full_swept, with_l2
from embtrim.models import build
from embtrim.system.files import write_then_rename
from embtrim.system.holding import check_written, hold_folder, watch
from embtrim.system.interrupts import going_on_with
from embtrim.system.processes import in_processes
from embtrim.system.progress import Counter, shows_bars, stage
from embtrim.system.ranks import refuse_ranks
from embtrim.system.unfinished import OtherTrainingError, holds_work
from embtrim.training.callbacks import Callback, Epoch, ForModel, checked, tell_epoch, tell_record
from embtrim.training.devices import device_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The result of a grid.

    Attributes:
        records: Records of the cells, in the order of the grid.
        skipped: Cells that could not be made.
    """

    records: list[RunRecord]
    skipped: list[Skipped]


class Made(NamedTuple):
    """A cell that was tried, its record or why it has none, and the epochs of its trainings."""

    cell: Cell
    outcome: RunRecord | Skipped
    epochs: list[Epoch]


class Worker:
    """Makes cells in one process; keeps the last full model it used."""

    def __init__(
        self, data: EncodedDataset, config: CompareConfig, out: Path, progress: bool, callbacks: Sequence[Callback]
    ) -> None:
        self.data, self.config, self.out, self.progress, self.callbacks = data, config, out, progress, callbacks
        self._full: tuple[Cell, Trained] | None = None

    def make(self, cell: Cell) -> Made:
        """Train the model of a cell and write its record; a fault that a user can mend is a reason to skip the cell."""
        unfinished, told = self.out / "unfinished" / cell.name, ForModel(self.callbacks, cell.name)
        try:
            with stage(cell.name, False):
                trained = self._trained(cell, unfinished, told)
        except EmbtrimError as error:
            if error is told.raised:
                raise
            return Made(cell, _skip(cell, str(error)), told.epochs)
        if trained.plan is not None:
            trained.plan.save(self.out / "plans" / f"{cell.name}.json")
        trained.record.save(record_path(self.out, cell))
        shutil.rmtree(unfinished, ignore_errors=True)
        return Made(cell, trained.record, told.epochs)

    def _trained(self, cell: Cell, unfinished: Path, told: ForModel) -> Trained:
        """The trained model of a cell."""
        if cell.budget is None:
            return self._train_full(cell, unfinished, told)
        full = self.full(cell.full)
        config = with_l2(cell_config(self.config, cell), full.record.train["embedding_l2"])
        return shrink(
            full, self.data, config, label=cell.label, progress=self.progress, unfinished=unfinished, callbacks=[told]
        )

    def _train_full(self, cell: Cell, unfinished: Path, told: ForModel) -> Trained:
        """Train the full model of a cell and write its weights."""
        config = cell_config(self.config, cell)
        try:
            trained = train_full_swept(self.data, config, self.progress, unfinished, [told])
        except OtherTrainingError as error:
            logger.warning("%s: this training starts again", error)
            shutil.rmtree(unfinished)
            trained = train_full_swept(self.data, config, self.progress, unfinished, [told])
        state = {name: value.detach().cpu().contiguous() for name, value in trained.model.state_dict().items()}
        weights = safetensors.torch.save(state)
        # Weights are written before the record: if the record exists, so do they.
        write_then_rename(weights_path(self.out, cell), lambda file: file.write(weights))
        self._full = (cell, trained)
        return trained

    def full(self, cell: Cell) -> Trained:
        """The full model of a cell, from memory or disk.

        Raises:
            DataError: Its weights are damaged.
        """
        if self._full is None or self._full[0] != cell:
            self._full = None  # before the next one is loaded: one at a time in memory
            config, path = cell_config(self.config, cell), weights_path(self.out, cell)
            model = build(cell.model, self.data.schema, **{**config.hparams, "seed": cell.seed})
            try:
                model.load_state_dict(safetensors.torch.load_file(path))
            except (SafetensorError, RuntimeError) as error:
                raise DataError(f"{path} is damaged ({error}); remove it, and it is trained again") from None
            model.to(device_of(config.train)).eval()
            self._full = (cell, Trained(model, RunRecord.load(record_path(self.out, cell))))
        return self._full[1]


def start_worker(
    data: EncodedDataset | Path, config: CompareConfig, out: Path, progress: bool, callbacks: Sequence[Callback]
) -> Callable[[Cell], Made]:
    """`make` of a new Worker; data on disk may be given as their folder."""
    watch(out)
    return Worker(EncodedDataset.load(data) if isinstance(data, Path) else data, config, out, progress, callbacks).make


class Outcomes:
    """The records and the skipped cells of a grid, as they come in; skipped.json on disk is kept in step with them."""

    def __init__(
        self, cells: list[Cell], records: dict[Cell, RunRecord], out: Path, callbacks: Sequence[Callback]
    ) -> None:
        self.cells, self.records, self.out, self.callbacks = cells, records, out, callbacks
        self.skipped = {s.cell.name: s for s in read_skipped(out)}

    def keep(self, cell: Cell, outcome: RunRecord | Skipped) -> None:
        """Take the outcome of one cell."""
        before = self.skipped.pop(cell.name, None)
        if isinstance(outcome, RunRecord):
            self.records[cell] = outcome
        else:
            self.skipped[cell.name] = outcome
            logger.warning("%s skipped: %s", cell.name, outcome.reason)
        if before != self.skipped.get(cell.name):
            write_skipped(self.out, self.skipped.values())
        if isinstance(outcome, RunRecord):
            tell_record(self.callbacks, outcome, len(self.records), len(self.cells))

    def in_order(self) -> Comparison:
        """All outcomes in the order of the grid."""
        return Comparison(
            [self.records[cell] for cell in self.cells if cell in self.records],
            [self.skipped[cell.name] for cell in self.cells if cell.name in self.skipped],
        )


def compare(
    data: EncodedDataset,
    config: CompareConfig,
    out: str | Path,
    *,
    jobs: int = 1,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Comparison:
    """Make the cells of a grid that have no record yet.

    Writes into `out`: `config.toml` (of the latest start), `skipped.json`, and the folders `records`, `plans` and `full`.
    `write_comparison` makes the tables and the page.

    Args:
        data: Encoded data with splits train, valid and test.
        config: Settings of the grid.
        out: A new folder, or the folder of an earlier start, to continue or extend its grid.
        jobs: Number of worker processes; 1 works in this process. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        progress: Show a progress bar on stderr.
        callbacks: Objects that are told of each epoch of the full and the compact models and of each new record, see
            `embtrim.training.callbacks`. They are called in this process: with several jobs they are told of the epochs
            of a cell when it is finished. If one raises an error, it goes through; started again, the grid is continued.

    Raises:
        ConfigError: A callback has no `on_epoch` or `on_record`. An unknown model, method, setting or budget.
        DataError: A split is missing; a record in `out` was made with other settings; `out` is written by another process,
            or cannot be written; or its disk has no room for the full models.
        RemovedError: `out` was removed while the grid was writing into it.
        EmbtrimError: A worker process died.
    """
    refuse_ranks("compare")
    out, callbacks = Path(out), checked(callbacks)
    config = resolve(config)
    check_compare(data, config)
    cells = grid(config)
    finished(cells, data, config, out)
    configs = [run_config(config, model) for model in config.models]
    check_room(out, room_of_grid(data, configs, config.seeds, jobs), out)
    with hold_folder(out), going_on_with(out, lambda: holds_work(out)):
        made = _make_cells(data, config, out, cells, jobs, progress, callbacks)
    return made


def _make_cells(
    data: EncodedDataset,
    config: CompareConfig,
    out: Path,
    cells: list[Cell],
    jobs: int,
    progress: bool,
    callbacks: Sequence[Callback],
) -> Comparison:
    """Make the cells that have no record yet; see `compare`."""
    records = finished(cells, data, config, out)  # once more: another process may have been faster
    _warn_of_other_code(records.values(), out)
    write_then_rename(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
    pending = [cell for cell in cells if cell.budget is not None and cell not in records]
    needed = {cell.full for cell in pending}
    fulls = [cell for cell in cells if cell.budget is None]
    fulls = [c for c in fulls if c not in records or (c in needed and not weights_path(out, c).exists())]
    outcomes = Outcomes(cells, {cell: record for cell, record in records.items() if cell not in fulls}, out, callbacks)
    # Workers open a folder themselves: memory-mapped data are not copied.
    source = data if jobs == 1 or data.folder is None else data.folder
    # A bar over the cells leaves no room for bars of their trainings; lines have room.
    lines = progress and not shows_bars()
    told = callbacks if jobs == 1 else ()  # callbacks stay in this process
    with (
        Counter(progress, "cells", each=True) as bar,
        in_processes(jobs, start_worker, source, config, out, lines, told) as make,
    ):
        bar.begin("grid", len(cells), len(outcomes.records))

        def keep(made: Iterable[Made]) -> None:
            for cell, outcome, epochs in made:
                bar.advance()
                for epoch in epochs if jobs > 1 else ():
                    tell_epoch(callbacks, epoch)
                outcomes.keep(cell, outcome)

        keep(make(fulls))
        failed = [cell for cell in pending if cell.full.name in outcomes.skipped]
        keep(Made(cell, _skip(cell, "its full model could not be made"), []) for cell in failed)
        keep(make(cell for cell in pending if cell not in failed))
    for cell in outcomes.records:  # a process that was killed after its record may have left them
        shutil.rmtree(out / "unfinished" / cell.name, ignore_errors=True)
    with suppress(OSError):
        (out / "unfinished").rmdir()
    check_written(out / "config.toml", *(record_path(out, cell) for cell in outcomes.records))
    return outcomes.in_order()


def _warn_of_other_code(records: Iterable[RunRecord], out: Path) -> None:
    others = sorted({record.versions["embtrim"] for record in records} - {code_version()})
    if others:
        logger.warning(
            "%s has records of embtrim %s, this is %s: changes between them may show in a comparison",
            out, ", ".join(others), code_version(),
        )  # fmt: skip


def _skip(cell: Cell, reason: str) -> Skipped:
    return Skipped(
        model=cell.model, label=cell.label, budget=cell.budget and cell.budget.text, seed=cell.seed, reason=reason
    )


def estimate(data: EncodedDataset, config: CompareConfig, out: Path | None = None) -> dict[str, Any]:
    """Estimate a grid: its cells, those with a record in `out`, and ranges of time, memory and disk for the others in turn.

    Raises:
        ConfigError, DataError: See `compare`.
    """
    config = resolve(config)
    check_compare(data, config)
    cells, labels = grid(config), settings_by_label(config)
    done = {} if out is None else finished(cells, data, config, out)
    seconds = disk = memory = estimates.ZERO
    hparams: dict[str, Any] = {}
    for name in config.models:
        left = [cell for cell in cells if cell.model == name and cell not in done]
        if not left:
            continue
        model = build(name, data.schema, **run_config(config, name).hparams)
        hparams[f"hparams_{name}"] = dict(model.hparams)
        measured = estimates.measure(model, data, config.train)
        for cell in left:
            of_cell = estimates.full_seconds if cell.budget is None else estimates.compact_seconds
            seconds += of_cell(measured, data, cell_config(config, cell))
        fulls = sum(cell.budget is None for cell in left)
        disk += estimates.Range(fulls, fulls) * estimates.Range(measured.model_bytes, measured.model_bytes)
        disk += estimates.unfinished_bytes(measured)
        memory = max(memory, estimates.memory_bytes(measured), key=lambda found: found.most)
    return {
        "models": list(config.models),
        "labels": list(labels),
        "budgets": [budget.text for budget in config.budgets],
        **hparams,
        **{f"search_{label}": setup.search for label, setup in labels.items() if setup.search},
        "num_cells": len(cells),
        "num_cells_on_disk": len(done),
        "seconds": seconds.to_dict(1),
        "memory_bytes": memory.to_dict(),
        "disk_bytes": disk.to_dict(),
    }
