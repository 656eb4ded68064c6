"""run: the whole way from encoded data to smaller, retrained, verified models, with one record per trained model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embtrim.config import first_change, read_toml, to_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments.records import RunRecord, Trained
from embtrim.experiments.room import check_room, room_of_run
from embtrim.experiments.settings import RunConfig, check_run, split_control
from embtrim.experiments.steps import shrink, train_full_swept, with_l2
from embtrim.experiments.tolerance import smallest_within
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import counts_vocabulary, target_settings
from embtrim.plan.table import Target
from embtrim.serving.bundle import note_spread, save
from embtrim.system.files import write_then_rename
from embtrim.system.folders import folder_bytes
from embtrim.system.holding import check_written, content, hold_folder
from embtrim.system.interrupts import going_on_with
from embtrim.system.progress import say, stage, time_left
from embtrim.system.ranks import refuse_ranks
from embtrim.system.unfinished import holds_work
from embtrim.training.callbacks import Callback, ForModel, checked, tell_record


def run(
    data: EncodedDataset,
    config: RunConfig,
    out: str | Path,
    *,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
) -> list[RunRecord]:
    """Train the full model, search, compact, verify, retrain, and save, for the method and the controls.

    Writes into `out`: `config.toml` (resolved), and the folders `records`, `plans` and `bundles`. `write_report` makes the page.
    Unfinished work keeps its state in `out`/unfinished, written every `train.checkpoint_seconds`. If a run is
    interrupted and started again, it is continued from there, and its results are those of an uninterrupted run.

    Args:
        data: Encoded data with splits train, valid and test.
        config: Settings of the run.
        out: A new folder, or the folder of an earlier start with the same config.
        progress: Show progress bars on stderr.
        callbacks: Objects that are told of each epoch of the full and the compact models and of each new record, see
            `embtrim.training.callbacks`. If one raises an error, it goes through; started again, the run is continued.

    Returns:
        The records: for each seed the full model, the method, the controls.

    Raises:
        ConfigError: A callback has no `on_epoch` or `on_record`.
        DataError: A split is missing; `out` holds something else, is written by another process, or cannot be written; or
            its disk has no room for the results.
        RemovedError: `out` was removed while the run was writing into it.
        BudgetError: The budget is below the smallest plan.
    """
    refuse_ranks("run")
    out, callbacks = Path(out), checked(callbacks)
    config = config.replace(bits=config.stored_bits)
    check_run(data, config)
    _check_folder(out, config)
    check_room(out, room_of_run(data, config), out)
    with hold_folder(out), going_on_with(out, lambda: holds_work(out)):
        _check_folder(out, config)  # another process may have been faster
        write_then_rename(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
        records, count = [], _count(data, config, out, progress, callbacks)
        for seed in range(config.seed, config.seed + config.seeds):
            with stage(f"seed {seed}", False):
                records += _run_seed(data, config.replace(seed=seed), out, progress, callbacks, count)
        shutil.rmtree(out / "unfinished", ignore_errors=True)
        if config.seeds > 1:
            _note_spread(records, out)
        check_written(out / "config.toml", *(record_path(out, record.variant, record.seed) for record in records))
    return records


def _count(
    data: EncodedDataset, config: RunConfig, out: Path, progress: bool, callbacks: Sequence[Callback]
) -> Callable[[RunRecord], None]:
    """Tells callbacks of each new record, and says how many models are made, and the time that the others may take."""
    seeds, variants = range(config.seed, config.seed + config.seeds), _variants(config)
    left = [_finished(out, _label(v), seed, data, config.target) is None for seed in seeds for v in variants]
    started, total, before = time.monotonic(), len(left), len(left) - sum(left)
    done = before
    if 0 < before < total:
        say(f"{before} of {total} models are made already", progress)

    def count(record: RunRecord) -> None:
        nonlocal done
        done += 1
        tell_record(callbacks, record, done, total)
        if done < total:
            rest = time_left(time.monotonic() - started, done - before, total - done)
            say(f"{done} of {total} models are made, about {rest}", progress)

    return count


def _variants(config: RunConfig) -> tuple[str, ...]:
    return ("full", *dict.fromkeys((config.method, *config.controls)))


def _run_seed(
    data: EncodedDataset,
    config: RunConfig,
    out: Path,
    progress: bool,
    callbacks: Sequence[Callback],
    on_record: Callable[[RunRecord], None],
) -> list[RunRecord]:
    """The records of one seed: the full model, the method, the controls; finished ones are read."""
    variants = _variants(config)
    finished = {name: _finished(out, _label(name), config.seed, data, config.target) for name in variants}
    if all(finished.values()):
        return [record for record in finished.values() if record is not None]
    unfinished = out / "unfinished" / f"seed{config.seed}"
    if (before := finished["full"]) is not None:
        config = with_l2(config, before.train["embedding_l2"])
    # If a run is continued, its last checkpoint gives the full model.
    full = train_full_swept(data, config, progress, unfinished, _for_model(callbacks, config, "full"))
    full.record = before or _keep(full, data, out, on_record)
    config = with_l2(config, full.record.train["embedding_l2"])
    records, budget = [full.record], config.limit
    for variant in variants[1:]:
        record, work = finished[variant], unfinished / _label(variant)
        if record is None:
            told = _for_model(callbacks, config, variant)
            if variant != config.method:
                name, bits = split_control(variant)
                settings = config.replace(
                    method=name, search={}, budget=budget, max_loss=None, bits=bits or config.bits
                )
                label = None if bits is None else _label(variant)
                trained = shrink(full, data, settings, label=label, progress=progress, unfinished=work, callbacks=told)
            elif config.max_loss is None:
                trained = shrink(full, data, config, progress=progress, unfinished=work, callbacks=told)
            else:
                trained = smallest_within(full, data, config, progress=progress, unfinished=work, callbacks=told)
            record = _keep(trained, data, out, on_record)
            shutil.rmtree(work, ignore_errors=True)
        if variant == config.method:
            assert record.budget is not None
            budget = Budget.parse(record.budget)  # with "auto" and max_loss the one that was found
        records.append(record)
    shutil.rmtree(unfinished, ignore_errors=True)
    return records


def _for_model(callbacks: Sequence[Callback], config: RunConfig, variant: str) -> list[Callback]:
    """The callbacks for the trainings of one model."""
    return [ForModel(callbacks, f"{config.model}-{_label(variant)}-seed{config.seed}")]


def record_path(out: Path, variant: str, seed: int) -> Path:
    """File of a model's record."""
    return out / "records" / f"{variant}-seed{seed}.json"


def _label(variant: str) -> str:
    """The name of a variant in records and files."""
    return variant.replace(":", "-")


def _check_folder(out: Path, config: RunConfig) -> None:
    """Raise DataError unless `out` is free or belongs to a run with the same config."""
    if not out.exists() or (out.is_dir() and not content(out)):
        return
    settings = out / "config.toml"
    values = read_toml(settings) if settings.is_file() else {}
    if "method" not in values:
        raise DataError(f"output folder {out} exists and is not empty; choose another or remove it")

    def settings_of(config: RunConfig) -> dict[str, Any]:
        values = config.model_dump(mode="json", exclude={"train": {"checkpoint_seconds"}})
        return {**values, **target_settings(config.limit, config.target)}

    # A release without this setting trained on clicks alone.
    before = RunConfig.parse({"teacher": 0.0, **values}, where=str(settings))
    change = first_change(settings_of(before), settings_of(config))
    if change is not None:
        raise DataError(
            f"{out} belongs to a run with {change}; choose another --out, or give the earlier settings to continue the run"
        )


def _finished(out: Path, variant: str, seed: int, data: EncodedDataset, target: Target | None) -> RunRecord | None:
    """The record of a finished model, or None; DataError if it was made on other data or counted its budget otherwise."""
    path = record_path(out, variant, seed)
    if not path.exists():
        return None
    record = RunRecord.load(path)
    if record.data["fingerprint"] != data.schema.fingerprint:
        raise DataError(
            f"{path} was made on data {record.data['fingerprint']}, given are {data.schema.fingerprint}; choose another --out"
        )
    if (
        record.budget
        and counts_vocabulary(Budget.parse(record.budget), target)
        and record.counted_vocabulary_bytes is None
    ):
        raise DataError(
            f"{path} was made with the vocabulary beside its budget of {record.budget}; choose another --out"
        )
    return record


def _keep(trained: Trained, data: EncodedDataset, out: Path, on_record: Callable[[RunRecord], None]) -> RunRecord:
    """Write the bundle, the plan and the record of a trained model."""
    name = f"{trained.record.variant}-seed{trained.record.seed}"
    record = trained.record
    if data.folder is not None:
        save(
            trained.model,
            out / "bundles" / name,
            data,
            plan=trained.plan,
            metrics={"valid": record.valid, "test": record.test},
            seed=record.seed,
            overwrite=True,  # a run that was killed may have written the bundle, but not the record
        )
        bundle = out / "bundles" / name
        record = record.replace(bundle_bytes=folder_bytes(bundle), vocabulary_bytes=folder_bytes(bundle / "encoder"))
    if trained.plan is not None:
        trained.plan.save(out / "plans" / f"{name}.json")
    record.save(record_path(out, record.variant, record.seed))
    on_record(record)
    return record


def _note_spread(records: list[RunRecord], out: Path) -> None:
    """Write into the bundles of each variant how its metrics spread over the seeds."""
    for variant in dict.fromkeys(record.variant for record in records):
        metrics = {r.seed: {"valid": r.valid, "test": r.test} for r in records if r.variant == variant}
        for seed in metrics:
            bundle = out / "bundles" / f"{variant}-seed{seed}"
            if bundle.exists():  # data made in memory have no bundles
                note_spread(bundle, metrics)
