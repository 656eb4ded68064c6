"""compare: a grid of base models, methods, budgets and seeds on one data set; one record a cell, resumable.

A record that exists is not made again, so a grid that was killed goes on where it was - within a training too, from its
last checkpoint - and may grow. The full model of a
(model, seed) is trained once, kept on disk, and shared by all methods. With several worker processes the same cells are
made with the same seeds; records differ in nothing but times and memory, provided that each process has as many threads
(matrix products of other thread counts round differently).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from embtrim.config import to_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError, EmbtrimError
from embtrim.experiments.estimates import seconds_per_step
from embtrim.experiments.grid import (
    Cell,
    CompareConfig,
    Skipped,
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
from embtrim.experiments.steps import shrink, train_full
from embtrim.models import build
from embtrim.system.files import write_then_rename
from embtrim.system.processes import in_processes
from embtrim.system.progress import grid_bar
from embtrim.system.unfinished import OtherTrainingError
from embtrim.training.devices import device_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """What a grid gave: its records in the grid's order, and the cells that could not be made."""

    records: list[RunRecord]
    skipped: list[Skipped]


class Worker:
    """Makes cells in one process; keeps the last full model it used."""

    def __init__(self, data: EncodedDataset, config: CompareConfig, out: Path) -> None:
        self.data, self.config, self.out = data, config, out
        self.labels = settings_by_label(config)
        self._full: tuple[Cell, Trained] | None = None

    def make(self, cell: Cell) -> tuple[Cell, RunRecord | Skipped]:
        """Train the model of a cell and write its record; what a user can mend is a reason to skip it."""
        config, unfinished = run_config(self.config, cell.model), self.out / "unfinished" / cell.name
        try:
            if cell.budget is None:
                checkpoint = unfinished / "full.safetensors"
                try:
                    trained = train_full(self.data, config, cell.seed, checkpoint=checkpoint)
                except OtherTrainingError as error:
                    log.warning("%s: this training starts anew", error)
                    checkpoint.unlink()
                    trained = train_full(self.data, config, cell.seed, checkpoint=checkpoint)
                state = {name: value.detach().cpu().contiguous() for name, value in trained.model.state_dict().items()}
                weights = safetensors.torch.save(state)
                # Weights before the record: whoever finds the record may rely on them.
                write_then_rename(weights_path(self.out, cell), lambda file: file.write(weights))
                self._full = (cell, trained)
            else:
                variant = self.labels[cell.label]
                config = config.replace(bits=variant.bits, init=variant.init)
                trained = shrink(
                    self.full(cell.full), self.data, config, variant.method, variant.search, cell.budget, cell.seed,
                    label=cell.label, unfinished=unfinished,
                )  # fmt: skip
        except EmbtrimError as error:
            return cell, _skip(cell, str(error))
        if trained.plan is not None:
            trained.plan.save(self.out / "plans" / f"{cell.name}.json")
        trained.record.save(record_path(self.out, cell))
        shutil.rmtree(unfinished, ignore_errors=True)
        return cell, trained.record

    def full(self, cell: Cell) -> Trained:
        """The full model of a cell, from memory or disk.

        Raises:
            DataError: its weights are damaged.
        """
        if self._full is None or self._full[0] != cell:
            self._full = None  # before the next one is loaded: one at a time in memory
            config, path = run_config(self.config, cell.model), weights_path(self.out, cell)
            model = build(cell.model, self.data.schema, **{**config.hparams, "seed": cell.seed})
            try:
                model.load_state_dict(safetensors.torch.load_file(path))
            except (SafetensorError, RuntimeError) as error:
                raise DataError(f"{path} is damaged ({error}); remove it, and it is trained again") from None
            model.to(device_of(config.train)).eval()
            self._full = (cell, Trained(model, RunRecord.load(record_path(self.out, cell))))
        return self._full[1]


def start_worker(data: EncodedDataset | Path, config: CompareConfig, out: Path) -> Callable[[Cell], Any]:
    """`make` of a new Worker; data that are on disk may be given as their folder."""
    return Worker(EncodedDataset.load(data) if isinstance(data, Path) else data, config, out).make


def compare(
    data: EncodedDataset,
    config: CompareConfig,
    out: str | Path,
    *,
    jobs: int = 1,
    progress: bool = False,
    on_record: Callable[[RunRecord, int, int], None] | None = None,
) -> Comparison:
    """Make the cells of a grid that have no record yet.

    Writes into `out`: config.toml (of the latest start), records/*.json, plans/*.json, full/*.safetensors, skipped.json.
    The tables and the page are comparison_report.py's.

    Args:
        data: encoded data with splits train, valid and test.
        config: see CompareConfig.
        out: a new folder, or one of an earlier start, to go on or to grow.
        jobs: worker processes; 1 works in this process. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        progress: show a progress bar on stderr.
        on_record: called with each new record, the number of cells that are done, and of all.

    Raises:
        ConfigError: an unknown model, method, setting or budget.
        DataError: a split is missing, or a record in `out` was made with other settings.
        EmbtrimError: a worker process died.
    """
    out = Path(out)
    config = resolve(config)
    check_compare(data, config)
    cells = grid(config)
    records = finished(cells, data, config, out)
    others = sorted({record.versions["embtrim"] for record in records.values()} - {code_version()})
    if others:
        log.warning(
            "%s has records of embtrim %s, this is %s: what changed between them may show in a comparison",
            out, ", ".join(others), code_version(),
        )  # fmt: skip
    write_then_rename(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
    skipped = {s.cell.name: s for s in read_skipped(out)}
    pending = [cell for cell in cells if cell.budget is not None and cell not in records]
    needed = {cell.full for cell in pending}
    fulls = [cell for cell in cells if cell.budget is None]
    fulls = [c for c in fulls if c not in records or (c in needed and not weights_path(out, c).exists())]
    records = {cell: record for cell, record in records.items() if cell not in fulls}

    def keep(outcomes: Iterable[tuple[Cell, RunRecord | Skipped]]) -> None:
        for cell, outcome in outcomes:
            bar.advance(task)
            before = skipped.pop(cell.name, None)
            if isinstance(outcome, RunRecord):
                records[cell] = outcome
                if on_record is not None:
                    on_record(outcome, len(records), len(cells))
            else:
                skipped[cell.name] = outcome
                log.warning("%s skipped: %s", cell.name, outcome.reason)
            if before != skipped.get(cell.name):
                write_skipped(out, skipped.values())

    # Workers open a folder anew: what is memory-mapped is not copied.
    source = data if jobs == 1 or data.folder is None else data.folder
    with grid_bar(progress) as bar, in_processes(jobs, start_worker, source, config, out) as make:
        task = bar.add_task("cells", total=len(cells), completed=len(records), before=len(records))
        keep(make(fulls))
        keep((cell, _skip(cell, "its full model could not be made")) for cell in pending if cell.full.name in skipped)
        keep(make(cell for cell in pending if cell.full.name not in skipped))
    with suppress(OSError):
        (out / "unfinished").rmdir()
    return Comparison(
        [records[cell] for cell in cells if cell in records],
        [skipped[cell.name] for cell in cells if cell.name in skipped],
    )


def _skip(cell: Cell, reason: str) -> Skipped:
    return Skipped(model=cell.model, label=cell.label, budget=cell.budget, seed=cell.seed, reason=reason)


def estimate(data: EncodedDataset, config: CompareConfig, out: Path | None = None) -> dict[str, Any]:
    """What a grid would do: cells, those that `out` has, and the longest time of training them one after the other.

    It times a few training steps of each full model and assumes that every model trains all epochs. What the searches
    take comes on top.

    Raises:
        See `compare`.
    """
    config = resolve(config)
    check_compare(data, config)
    cells = grid(config)
    done = {} if out is None else finished(cells, data, config, out)
    steps = data.num_batches("train", config.train.batch_size) * config.train.epochs
    seconds = 0.0
    for name in config.models:
        model = build(name, data.schema, **run_config(config, name).hparams)
        cells_left = sum(cell.model == name and cell not in done for cell in cells)
        seconds += seconds_per_step(model, data, config.train) * steps * cells_left
    return {
        "models": list(config.models),
        "labels": list(settings_by_label(config)),
        "budgets": list(config.budgets),
        "num_cells": len(cells),
        "num_cells_on_disk": len(done),
        "seconds_at_most": seconds,
    }
