"""Whether the disk has room for what a command is going to write, asked before anything is trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments.settings import RunConfig, full_plan, split_control
from embtrim.system.folders import folder_bytes
from embtrim.training.settings import TrainConfig

logger = logging.getLogger(__name__)

# Tables in a checkpoint: the present ones, the best ones, and the states of the optimiser for each value.
STATES = {"adam": 2, "adagrad": 1, "sgd": 0}


class Room(NamedTuple):
    """Bytes that some work takes on disk, counted from its tables and its vocabulary; other layers come on top.

    Attributes:
        results: What stays: bundles or weights.
        trained: The tables of the full model, which are kept until its results are saved.
        states: Two checkpoints, of which one is written while the other is there.
    """

    results: int
    trained: int
    states: int


def room_of_training(data: EncodedDataset, config: RunConfig) -> Room:
    """What the training of a full model takes."""
    tables = full_plan(data, config).num_bytes()
    return Room(tables + _vocabulary_bytes(data), tables, _checkpoint_bytes(tables, config.train))


def room_of_run(data: EncodedDataset, config: RunConfig) -> Room:
    """What a run takes; a compact model whose budget is not known before counts as its vocabulary alone."""
    full = room_of_training(data, config)
    controls = [split_control(control)[1] or config.stored_bits for control in config.controls]
    compact = sum(_compact_bytes(data, config.replace(bits=bits)) for bits in (config.stored_bits, *controls))
    if data.folder is None:  # data made in memory have no bundles
        return full._replace(results=0)
    return full._replace(results=config.seeds * (full.results + compact))


def room_of_grid(data: EncodedDataset, configs: Sequence[RunConfig], seeds: int, jobs: int) -> Room:
    """What a grid takes, of which the weights of the full models stay; `configs` has one for each base model."""
    tables = [full_plan(data, config).num_bytes() for config in configs]
    states = max(_checkpoint_bytes(size, config.train) for size, config in zip(tables, configs, strict=True))
    return Room(seeds * sum(tables), jobs * max(tables), jobs * states)


def check_room(out: Path, room: Room, *present: Path) -> None:
    """Check that the disk of a path has room for some work, less what an interrupted start has left in `present`.

    A warning says so if there is room for the results alone, and not for the checkpoints.

    Raises:
        DataError: The disk has no room for the results.
    """
    free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.exists())).free
    written = sum(folder_bytes(path) for path in present if path.is_dir())
    needed = room.results + room.trained - written
    if needed > free:
        raise DataError(
            f"the disk of {out} has {_mb(free)} free, and what is going to be written there takes at least {_mb(needed)}; "
            "free space or choose another --out"
        )
    if (wanted := needed + room.states - room.trained) > free:
        logger.warning(
            "the disk of %s has %s free, and %s with checkpoints of the training: it may not go on from where it was if it "
            "is interrupted; free space, or set train.checkpoint_seconds higher",
            out, _mb(free), f"{_mb(wanted)} are needed",
        )  # fmt: skip


def _compact_bytes(data: EncodedDataset, config: RunConfig) -> int:
    """Most bytes of a compact model's bundle."""
    if config.limit is None or config.max_loss is not None:
        return _vocabulary_bytes(data)
    stored = full_plan(data, config).with_bits(4 if config.stored_bits == "mixed" else config.stored_bits)
    most = min(stored.num_bytes(config.target), stored.max_bytes(config.limit, config.target))
    return int(most) + _vocabulary_bytes(data)


def _vocabulary_bytes(data: EncodedDataset) -> int:
    names = ("schema.json", "vocab.parquet", "transforms.json", "hash_maps.npz")
    paths = [] if data.folder is None else [data.folder / name for name in names]
    return sum(path.stat().st_size for path in paths if path.exists())


def _checkpoint_bytes(table_bytes: int, train: TrainConfig) -> int:
    return 2 * (2 + STATES[train.optimizer]) * table_bytes


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
