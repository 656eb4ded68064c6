"""update: adapt a bundle to a new log. New values get rows, dropped values return, and training goes on.

The rules:

- A new value is one that the vocabulary of a listed table lacks; a returned value is one that reads the DROPPED row. Both
  need `min_count` occurrences in the *training* rows of the new log, so that no row stays untrained. If a plan dropped the
  OOV row as well, the bundle does not list the dropped values, and they come back as new ones.
- A value with a row of its own keeps its id, unless `renumber` is set. New rows are added at the end (see `TableShape.grown`),
  rows of returned values first. They are as wide as the table or, in a table of several widths, as its narrowest rows. The
  DROPPED row stays the last of its block.
- A new row starts as the row that its value read before, OOV or DROPPED, so that the grown model gives its parent's scores
  until it is trained. In a table of several widths, a row whose width differs from that row's starts at zero.
- `renumber` sorts the rows of one width as encoding the new log from scratch would number their values: by descending count
  in its training rows. Values that such an encoding would not list follow, in the order they had. The OOV row and the
  DROPPED row keep their places. A row moves with its value, so no score changes.
- Hashed tables, quantile buckets, and means of dense fields do not change.

Axes: V rows of a table, N rows of the log, D full width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import Field, field_validator

from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder import Encoder, digest
from embtrim.data.encoding import encode_further
from embtrim.data.profile import TOLERANCE, Profile, shares_of
from embtrim.data.profiling import Against
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import Source
from embtrim.data.splitting import Split
from embtrim.errors import BundleError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import PlanShape
from embtrim.plan.table import TableShape
from embtrim.schema import OOV, Schema
from embtrim.serving.bundle import check_out, load_bundle, save
from embtrim.serving.drift import check_drift
from embtrim.system.folders import file_digest, folder_bytes
from embtrim.system.progress import stage
from embtrim.system.unfinished import unfinished
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.training.evaluation import evaluate, logits_of_split, metrics_of_logits
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig

# Far fewer than for a new model: a trained one overfits a day's log within a few passes.
EPOCHS = 5
# Entries of a model's state that have a row per value.
_ROWS = ("tables.weight", "tables.first_order")


class UpdateConfig(Config):
    """How a bundle is updated.

    Attributes:
        split: Split of the new log, such as "8:1:1" or "time:8:1:1". Without validation rows, training runs all its epochs.
        min_count: Occurrences in the training rows of the new log that give a value its row; None takes each field's own
            `min_count`.
        train: Settings of training; the default for epochs is 5.
        renumber: Give the values of each table new ids, by their frequency in the new log. Otherwise values keep their ids.
        seed: Seed of the random split, of shuffling and of dropout.
        drift_tolerance: Share by which the unseen or missing values of a field may exceed those of the parent's validation
            rows before a warning is logged; see profile.py.
        strict: Fail instead of warning.
        read: How the log is read.
    """

    split: str = "8:1:1"
    min_count: int | None = Field(default=None, ge=1)
    renumber: bool = False
    train: TrainConfig = TrainConfig(epochs=EPOCHS)
    seed: int = Field(default=0, ge=0, lt=2**63)
    drift_tolerance: float = Field(default=TOLERANCE, ge=0, le=1)
    strict: bool = False
    read: ReadOptions = ReadOptions()

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: str) -> str:
        Split.from_text(value)
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _fewer_epochs(cls, value: Any) -> Any:
        return {"epochs": EPOCHS, **value} if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class TableChange:
    """What an update did to one table.

    Attributes:
        table: Name of the table.
        rows_before: Rows stored before, with those of OOV and DROPPED.
        new: Values that got a row for the first time.
        returned: Values that read the DROPPED row and got a row of their own.
        rows_after: Rows stored after, with those of OOV and DROPPED.
        dropped: Rows of the full table that still read the DROPPED row. If OOV is among them, values that came back as new
            ones are counted too.
    """

    table: str
    rows_before: int
    new: int
    returned: int
    rows_after: int
    dropped: int


@dataclass(frozen=True)
class UpdateReport:
    """What an update changed.

    Attributes:
        bundle: Folder of the new bundle.
        version: Version of plan and schema: one more than the parent's. A bundle that is not an update has version 1.
        of: SHA-256 of the parent's bundle.json.
        schema_before: Fingerprint of the parent's schema.
        schema_after: Fingerprint of the new schema.
        plan_before: Digest of the parent's layout.
        plan_after: Digest of the new layout.
        renumbered: Whether values that stay got new ids.
        tables: Changes of each table.
        table_bytes_before: Bytes of the parent's embedding tables, projections and first-order weights, as the plan's target
            stores them.
        table_bytes_after: Bytes of the new ones.
        bundle_bytes_before: Bytes of the parent's folder, vocabulary included.
        bundle_bytes_after: Bytes of the new folder, vocabulary included.
        num_rows: Rows of the new log, by split.
        epochs: Passes over the training rows.
        before: Metrics of the parent on the new validation and test rows, by split; see Metrics.
        after: Metrics of the new model on the same rows, by split.
        drift: Fields whose unseen or missing values exceed what the parent's validation rows saw; see Drift.
        shares: For each field the share of unseen and missing values in the training rows of the new log, as the parent reads
            them, beside those of the parent's validation rows.
        seconds: Wall time, reading the log included.
    """

    bundle: str
    version: int
    of: str
    schema_before: str
    schema_after: str
    plan_before: str
    plan_after: str
    renumbered: bool
    tables: tuple[TableChange, ...]
    table_bytes_before: int
    table_bytes_after: int
    bundle_bytes_before: int
    bundle_bytes_after: int
    num_rows: dict[str, int]
    epochs: int
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    drift: list[dict[str, Any]]
    shares: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Attributes as a JSON-able dict."""
        return {**dataclasses.asdict(self), "tables": [dataclasses.asdict(table) for table in self.tables]}


def update(
    bundle: str | Path,
    source: Source,
    *,
    out: str | Path,
    config: UpdateConfig | None = None,
    retrain: bool = True,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> UpdateReport:
    """Adapt a bundle to a new log: give new values rows, let dropped values return, train on, and save a new bundle.

    A call that is interrupted or killed leaves its work in `.<name of out>.unfinished` beside `out`. The same call resumes
    it, with the same result; only a log that was already encoded is encoded again.

    Args:
        bundle: Folder of a bundle, full or compact; it is not changed.
        source: New log with the raw columns of the bundle's schema, the label included: path, paths, glob, folder or polars
            DataFrame.
        out: Folder of the new bundle, which predicts and can be updated like any other.
        config: Settings of the update.
        retrain: Whether to train; False adds rows and leaves all weights as they are.
        overwrite: Replace a bundle at `out`.
        progress: Show progress bars on stderr.
        settings: Fields of UpdateConfig by name, for short calls.

    Raises:
        BundleError: `bundle` is not a bundle or its version is newer; `out` exists, or is or holds `bundle`.
        DataError: The log lacks a column, has no training rows, or has rows of one class only; or it has drifted and `strict`
            is set.

    Example:
        >>> embtrim.update("bundles/monday", "tuesday.parquet", out="bundles/tuesday")  # doctest: +SKIP
    """
    started = time.perf_counter()
    config = (config or UpdateConfig()).replace(**settings) if settings else config or UpdateConfig()
    folder, target = Path(bundle), Path(out)
    _check_apart(folder, target)
    check_out(target, overwrite)
    parent, encoder = _opened(folder)
    with unfinished(target) as work:
        data = encode_further(
            source, encoder, partial(extend, encoder, parent.plan, renumber=config.renumber), out=work / "data",
            split=config.split, min_count=config.min_count, seed=config.seed, options=config.read,
            inputs={"bundle": parent.digest, "renumber": config.renumber}, profile=parent.profile, progress=progress,
        )  # fmt: skip
        against = Against.load(work / "data")
        drift = check_drift(
            parent.profile, against.counts, against.examples, config.drift_tolerance, config.strict, str(folder)
        )
        plan = PlanShape.load(work / "data" / "plan.json")
        ids_before = parent_ids(encoder, parent.plan, plan, Encoder.load(work / "data"))
        del encoder  # training needs the memory
        splits = [name for name in ("valid", "test") if name in data.splits]
        train = config.train.replace(seed=config.seed)
        old = parent.model()
        model = grown_model(old, data.schema, plan, ids_before)
        before = {name: _metrics_before(old, data.with_id_maps(ids_before), name, train) for name in splits}
        del old, ids_before
        # The ids on disk are the model's own; for tables whose ids differ from a full table's, the maps say so.
        data = data.with_id_maps({t.name: np.arange(t.num_rows, dtype=np.int32) for t in plan.tables if t.renumbers})
        epochs = 0
        if retrain:
            with stage("training", progress):
                fitted = fit(model, data, train, progress=progress, checkpoint=work / "training.safetensors")
            epochs = len(fitted.history)
        if plan.is_quantized:
            counts = data.value_counts()  # the ids are the model's own, and those of rows that it dropped are not used
            model.tables.quantize_({table.name: counts[table.name][: table.num_compact_rows] for table in plan.tables})
        after = {name: evaluate(model, data, name, train).to_dict() for name in splits}
        changes = table_changes(parent.plan, plan)
        note = {
            "of": parent.digest,
            **_lineage(parent, config, changes),
            "num_rows": {name: data.num_rows(name) for name in data.splits},
            "epochs": epochs,
            "metrics_before": before,
            "drift": [found.model_dump(mode="json") for found in drift],
        }
        save(
            model, target, data, metrics=after, seed=config.seed if retrain else parent.info["seed"],
            version=parent.info["version"] + 1, update=note, overwrite=overwrite,
        )  # fmt: skip
    shares = shares_of(parent.profile, against.counts)
    return _report(folder, target, parent, plan, note, changes, after, shares, time.perf_counter() - started)


@dataclass(frozen=True)
class _Parent:
    """The bundle to update without its model and vocabularies, which fill the memory: each is held while it is read.

    Attributes:
        folder: Folder of the bundle.
        digest: SHA-256 of its bundle.json.
        plan: Layout of its tables.
        info: Contents of its bundle.json.
        profile: Profile of the data that trained it, or None.
    """

    folder: Path
    digest: str
    plan: PlanShape
    info: dict[str, Any]
    profile: Profile | None

    def model(self) -> CTRModel:
        """The model in fp32.

        Raises:
            BundleError: Another bundle has taken the place of this one meanwhile.
        """
        model = load_bundle(self.folder).model
        if file_digest(self.folder / "bundle.json") != self.digest:
            raise BundleError(f"{self.folder} was replaced while the log was encoded; start the update again")
        model.tables.dequantize_()
        return model


def _opened(folder: Path) -> tuple[_Parent, Encoder]:
    """What a bundle says, and its encoder; its model is opened too, so that a damaged bundle is refused at once."""
    bundle = load_bundle(folder)
    digest_of_folder = file_digest(folder / "bundle.json")
    parent = _Parent(folder, digest_of_folder, bundle.model.tables.plan, bundle.info, bundle.profile)
    return parent, bundle.encoder


def _lineage(parent: _Parent, config: UpdateConfig, changes: Sequence[TableChange]) -> dict[str, Any]:
    """What a bundle notes of its parent's layout, and of what became of it."""
    return {
        "schema_before": parent.plan.fingerprint,
        "plan_before": parent.plan.digest,
        "renumbered": config.renumber,
        "tables": {c.table: {"new": c.new, "returned": c.returned} for c in changes if c.new or c.returned},
    }


def _check_apart(bundle: Path, out: Path) -> None:
    """Raise BundleError if writing an update to `out` would replace the bundle to update."""
    if out.exists() and bundle.resolve().is_relative_to(out.resolve()):
        what = "is" if out.resolve() == bundle.resolve() else "holds"
        raise BundleError(f"{out} {what} the bundle to update, which stays as it is; choose another --out")


def _report(
    bundle: Path,
    out: Path,
    parent: _Parent,
    plan: PlanShape,
    note: Mapping[str, Any],
    changes: tuple[TableChange, ...],
    after: dict[str, dict[str, Any]],
    shares: list[dict[str, Any]],
    seconds: float,
) -> UpdateReport:
    """The report on an update that is saved.

    Args:
        bundle: Folder of the parent.
        out: Folder of the new bundle.
        parent: The parent.
        plan: Plan of the new model.
        note: What the new bundle.json notes about the update.
        changes: What changed in each table.
        after: Metrics of the new model by split.
        shares: Shares of unseen and missing values by field.
        seconds: Wall time.
    """
    return UpdateReport(
        bundle=str(out),
        version=parent.info["version"] + 1,
        of=note["of"],
        schema_before=note["schema_before"],
        schema_after=plan.fingerprint,
        plan_before=note["plan_before"],
        plan_after=plan.digest,
        renumbered=note["renumbered"],
        tables=changes,
        table_bytes_before=parent.plan.num_bytes(plan.target),
        table_bytes_after=plan.num_bytes(plan.target),
        bundle_bytes_before=folder_bytes(bundle),
        bundle_bytes_after=folder_bytes(out),
        num_rows=note["num_rows"],
        epochs=note["epochs"],
        before=note["metrics_before"],
        after=after,
        drift=note["drift"],
        shares=shares,
        seconds=seconds,
    )


def extend(
    encoder: Encoder, sizes: PlanShape, frequent: Mapping[str, pl.DataFrame], folder: Path, renumber: bool = False
) -> Encoder:
    """The parent's encoder with ids for new and returned values; writes the plan with their rows to `folder`/plan.json.

    Args:
        encoder: Encoder of the parent.
        sizes: Layout of the parent's tables.
        frequent: Values and counts by table, in the order in which they get rows; their ids are not read.
        folder: Folder that plan.json is written to.
        renumber: See UpdateConfig.
    """
    vocabularies, unseen_ids, tables = dict(encoder.vocabularies), dict(encoder.unseen_ids), []
    for table in sizes.tables:
        # A hashed table has no vocabulary, and a removed one stores nothing that a row could be added to.
        if table.name not in frequent or not (table.output_width or sizes.first_order):
            tables.append(table)
            continue
        known, unseen = vocabularies[table.name], unseen_ids.get(table.name, OOV)
        dropped = known.filter(pl.col("id") == table.dropped_id) if table.has_dropped else known.clear()
        returned = frequent[table.name].join(dropped, on="value", how="semi", nulls_equal=True, maintain_order="left")
        new = frequent[table.name].join(known, on="value", how="anti", nulls_equal=True, maintain_order="left")
        grown = table.grown(new.height, returned.height)
        tables.append(grown)
        if new.height or returned.height:
            added = pl.concat([returned, new])
            added = added.with_columns(pl.Series("id", added_ids(table, grown), pl.Int32))
            stays = known.join(returned, on="value", how="anti", nulls_equal=True, maintain_order="left")
            if table.dropped_id is not None and grown.dropped_id is not None:
                is_dropped = pl.col("id") == table.dropped_id
                stays = stays.with_columns(
                    pl.when(is_dropped).then(grown.dropped_id).otherwise("id").cast(pl.Int32).alias("id")
                )
                if unseen == table.dropped_id:
                    unseen_ids[table.name] = grown.dropped_id
            vocabularies[table.name] = pl.concat([stays, added.select(stays.columns)]).sort("id", maintain_order=True)
        if renumber:
            vocabularies[table.name] = renumbered(grown, vocabularies[table.name], frequent[table.name])
    schema = _grown_schema(encoder, vocabularies, {table.name: table.num_rows for table in tables})
    dataclasses.replace(sizes, fingerprint=schema.fingerprint, tables=tuple(tables)).save(folder / "plan.json")
    return Encoder(schema, vocabularies, encoder.transforms, unseen_ids, encoder.hash_maps)


def _grown_schema(encoder: Encoder, vocabularies: Mapping[str, pl.DataFrame], num_rows: Mapping[str, int]) -> Schema:
    """The schema with new sizes of its tables and the digest of their vocabularies."""
    fields = [f if f.type == "dense" else f.replace(vocab_size=num_rows[f.table_name]) for f in encoder.schema.fields]
    return encoder.schema.replace(fields=tuple(fields), vocabulary_digest=digest(vocabularies, encoder.transforms))


def added_ids(table: TableShape, grown: TableShape) -> np.ndarray:
    """int32 compact ids of the rows that `grown` has and `table` lacks, ascending."""
    taken = np.zeros(grown.num_compact_rows, bool)
    taken[: table.num_compact_rows] = True
    if table.has_dropped:
        taken[table.dropped_id] = False
    if grown.has_dropped:
        taken[grown.dropped_id] = True
    return np.flatnonzero(~taken).astype(np.int32)


def renumbered(table: TableShape, vocabulary: pl.DataFrame, frequent: pl.DataFrame) -> pl.DataFrame:
    """A table's vocabulary with new ids, in their order; see the module docstring.

    Args:
        table: Layout of the table.
        vocabulary: Values and their present ids.
        frequent: Values in the order of their new ids; all other values keep their order.
    """
    place = frequent.select("value", place=pl.int_range(pl.len()))
    own = vocabulary if table.dropped_id is None else vocabulary.filter(pl.col("id") != table.dropped_id)
    own = own.join(place, on="value", how="left", nulls_equal=True, maintain_order="left")
    own = own.with_columns(pl.Series("width", _row_widths(table)[own["id"].to_numpy()]))
    ordered = own.sort("width", "place", "id", nulls_last=True)
    ids = own.sort("width", "id")["id"]
    kept = vocabulary.join(own, on="value", how="anti", nulls_equal=True, maintain_order="left")
    return pl.concat([ordered.with_columns(ids).select(vocabulary.columns), kept]).sort("id", maintain_order=True)


def parent_ids(parent: Encoder, before: PlanShape, plan: PlanShape, encoder: Encoder) -> dict[str, np.ndarray]:
    """An int32 map for each table, from the new model's ids to the same values' ids in the parent."""
    maps = {}
    for table, grown in zip(before.tables, plan.tables, strict=True):
        ids_V = np.arange(grown.num_rows, dtype=np.int32)
        if table.dropped_id is not None and grown.dropped_id is not None:
            ids_V[grown.dropped_id] = table.dropped_id
        if table.name in encoder.vocabularies:
            unseen = parent.unseen_ids.get(table.name, OOV)
            known = parent.vocabularies[table.name].select("value", before="id")
            pairs = encoder.vocabularies[table.name].join(known, on="value", how="left", nulls_equal=True)
            ids_V[pairs["id"].to_numpy()] = pairs["before"].fill_null(unseen).to_numpy()
        maps[table.name] = ids_V
    return maps


def table_changes(before: PlanShape, after: PlanShape) -> tuple[TableChange, ...]:
    """What an update did to each table, from the plans before and after."""
    found = []
    for table, grown in zip(before.tables, after.tables, strict=True):
        new = grown.num_rows - table.num_rows
        returned = grown.num_kept - table.num_kept - new
        dropped = grown.num_rows - grown.num_kept
        rows_before, rows_after = table.num_compact_rows, grown.num_compact_rows
        found.append(TableChange(table.name, rows_before, new, returned, rows_after, dropped))
    return tuple(found)


@torch.no_grad()
def grown_model(parent: CTRModel, schema: Schema, plan: PlanShape, ids_before: Mapping[str, np.ndarray]) -> CTRModel:
    """The parent with the tables of `plan`; each row starts as the row that its value reads in the parent.

    Args:
        parent: Model to grow; it is not changed.
        schema: Schema with the sizes of the new tables.
        plan: The parent's plan with more rows.
        ids_before: Ids in the parent, see `parent_ids`.
    """
    model = type(parent)(schema, plan=plan, **parent.hparams).eval()
    state = parent.state_dict()
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in state.items() if k not in _ROWS}})
    for table, grown in zip(parent.tables.plan.tables, plan.tables, strict=True):
        width_V, width_before_V = _row_widths(grown), _row_widths(table)
        for start in range(0, grown.num_compact_rows, CHUNK_ROWS):
            ids = np.arange(start, min(start + CHUNK_ROWS, grown.num_compact_rows))
            before = ids_before[grown.name][ids]
            same = width_V[ids] == width_before_V[before]
            model.tables.set_rows(grown.name, ids[~same], torch.zeros(int((~same).sum()), plan.width))
            for positions, values in parent.tables.get_rows(table.name, before[same]):
                model.tables.set_rows(grown.name, ids[same][positions], values)
            if model.tables.first_order is not None and parent.tables.first_order is not None:
                rows = model.tables.storage_rows(grown.name, ids)
                rows_before = parent.tables.storage_rows(table.name, before)
                model.tables.first_order[torch.from_numpy(rows)] = parent.tables.first_order[
                    torch.from_numpy(rows_before)
                ]
    return model


def _row_widths(table: TableShape) -> np.ndarray:
    """Width of each compact row, int16."""
    return np.repeat(np.array([width for _, width in table.segments], np.int16), [rows for rows, _ in table.segments])


def _metrics_before(model: CTRModel, data: EncodedDataset, split: str, train: TrainConfig) -> dict[str, Any]:
    """Metrics of the parent, on data that hold its ids under the new schema."""
    return metrics_of_logits(data, split, logits_of_split(model, data, split, train)).to_dict()
