"""update: take a bundle to a new log: rows for new values, dropped values back, training on from its weights.

What decides:

- New is a value of a listed table that the vocabulary lacks, returned one that read the DROPPED row; both need `min_count`
  occurrences in the *training* rows of the new log, so that no row stays untrained. Where a plan dropped the OOV row as
  well, the bundle does not list what it dropped: such a value comes back as a new one.
- Nothing is re-numbered unless asked: a value with a row of its own keeps its id. Rows are added behind (see `TableShape.grown`), those
  of returned values first, and are as wide as the table, in a table of several widths as its narrowest rows. The DROPPED row
  stays the last of its rows.
- A row starts as what its value read before, OOV or DROPPED, so that the grown model gives the scores of its parent until
  it is trained. Rows of another width, in a table of several, start at zero.
- Re-numbered, the rows of one width are in the order in which encoding the new log afresh would number their values: by
  descending count in its training rows. Values that it would not list stay behind these in the order they had; the OOV row
  and the DROPPED row stay where they are. A row moves along with its value, so that no score changes.
- Hashed tables, buckets of quantiles, and means of dense fields stay as they are.

Axes: V rows of a table, N rows of the log, D full width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
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
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import Source
from embtrim.data.splitting import Split
from embtrim.errors import BundleError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import PlanShape
from embtrim.plan.table import TableShape
from embtrim.schema import OOV, Schema
from embtrim.serving.bundle import Bundle, check_out, load_bundle, save
from embtrim.system.folders import file_digest, folder_bytes
from embtrim.system.unfinished import unfinished
from embtrim.training.evaluation import evaluate, predict_logits
from embtrim.training.fitting import fit
from embtrim.training.metrics import compute_metrics
from embtrim.training.settings import TrainConfig

# Far fewer than for a model that starts from nothing: one that was trained overfits a day's log within a few passes.
EPOCHS = 5


class UpdateConfig(Config):
    """How a bundle is updated.

    Attributes:
        split: how the new log is divided, such as "8:1:1" or "time:8:1:1"; without validation rows, training makes all
            its epochs.
        min_count: occurrences in the training rows of the new log that a value needs for a row; None takes each field's
            own.
        train: as for a full model, but for at most 5 epochs unless it says otherwise.
        renumber: give the values of each table new ids, by their frequency in the new log; else values that stay keep theirs.
        seed: of the random split, and of shuffling and dropout.
        read: how the log is read.
    """

    split: str = "8:1:1"
    min_count: int | None = Field(default=None, ge=1)
    renumber: bool = False
    train: TrainConfig = TrainConfig(epochs=EPOCHS)
    seed: int = Field(default=0, ge=0)
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
        table: its name.
        rows_before, rows_after: rows stored, those of OOV and DROPPED included.
        new: values that got a row for the first time.
        returned: values that read the DROPPED row and got one of their own.
        dropped: rows of the full table that read the DROPPED row still. Too many by the values that came back as new ones,
            where OOV is among them.
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
        bundle: the new bundle's folder.
        version: of plan and schema: the parent's and one more; 1 is that of a bundle which is not an update.
        of: SHA-256 of the parent's bundle.json.
        schema_before, schema_after: fingerprints.
        plan_before, plan_after: digests of the layouts.
        renumbered: whether values that stay got new ids.
        tables: one entry a table.
        table_bytes_before, table_bytes_after: of embedding tables, projections and first-order weights, as the plan's
            target stores them.
        bundle_bytes_before, bundle_bytes_after: of the folders, vocabulary included.
        num_rows: rows of the new log, by split.
        epochs: passes over the training rows.
        before, after: metrics of the parent and of the new model on the new validation and test rows, by split, see Metrics.
        seconds: wall time, reading the log included.
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
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The attributes as a JSON-able dict."""
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
    """Give new values rows, let dropped ones return, train on from a bundle's weights, and save a new bundle.

    Interrupted or killed, it leaves its work in `.<name of out>.unfinished` beside `out`, and the same call goes on from
    there: to the same result, but that the log is encoded again if that had been done.

    Args:
        bundle: folder of a bundle, full or compact; it is not changed.
        source: the new log with the raw columns of the bundle's schema, the label among them: path, paths, glob, folder
            or polars DataFrame.
        out: folder of the new bundle, which predicts and can be updated as any other.
        config: see UpdateConfig; `settings` are its fields by name, for short calls.
        retrain: False only adds rows, and leaves all weights as they are.
        overwrite: replace a bundle at `out`.
        progress: show progress bars on stderr.

    Raises:
        BundleError: `bundle` is none or is of a newer version; `out` exists, or is or holds `bundle`.
        DataError: the log lacks a column, has no training rows, or rows of one class only.

    Example:
        >>> embtrim.update("bundles/monday", "tuesday.parquet", out="bundles/tuesday")  # doctest: +SKIP
    """
    started = time.perf_counter()
    config = (config or UpdateConfig()).replace(**settings) if settings else config or UpdateConfig()
    folder, target = Path(bundle), Path(out)
    _check_out(folder, target, overwrite)
    parent = load_bundle(folder)
    parent_digest = file_digest(folder / "bundle.json")
    with unfinished(target) as work:
        data = encode_further(
            source, parent.encoder, partial(extend, parent, renumber=config.renumber), out=work / "data",
            split=config.split, min_count=config.min_count, seed=config.seed, options=config.read,
            inputs={"bundle": parent_digest, "renumber": config.renumber}, progress=progress,
        )  # fmt: skip
        plan = PlanShape.load(work / "data" / "plan.json")
        ids_before = parent_ids(parent, plan, Encoder.load(work / "data"))
        splits = [name for name in ("valid", "test") if name in data.splits]
        train = config.train.replace(seed=config.seed)
        parent.model.tables.dequantize()
        model = grown_model(parent.model, data.schema, plan, ids_before)
        before = {name: _metrics_before(parent.model, data.with_id_maps(ids_before), name, train) for name in splits}
        # The ids on disk are those of the model; the maps say so, of the tables whose ids are not those of a full one.
        data = data.with_id_maps({t.name: np.arange(t.num_rows, dtype=np.int32) for t in plan.tables if t.renumbers})
        epochs = 0
        if retrain:
            fitted = fit(model, data, train, progress=progress, checkpoint=work / "training.safetensors")
            epochs = len(fitted.history)
        if plan.is_quantized:
            model.tables.quantize()
        after = {name: evaluate(model, data, name, train).to_dict() for name in splits}
        changes = table_changes(parent.model.tables.plan, plan)
        version = parent.info["version"] + 1
        step = {
            "of": parent_digest,
            "schema_before": parent.model.schema.fingerprint,
            "plan_before": parent.model.tables.plan.digest,
            "renumbered": config.renumber,
            "tables": {c.table: {"new": c.new, "returned": c.returned} for c in changes if c.new or c.returned},
            "num_rows": {name: data.num_rows(name) for name in data.splits},
            "epochs": epochs,
            "metrics_before": before,
        }
        save(
            model, target, data, metrics=after, seed=config.seed if retrain else parent.info["seed"], version=version,
            update=step, overwrite=overwrite,
        )  # fmt: skip
    return UpdateReport(
        bundle=str(target),
        version=version,
        of=parent_digest,
        schema_before=step["schema_before"],
        schema_after=data.schema.fingerprint,
        plan_before=step["plan_before"],
        plan_after=plan.digest,
        renumbered=config.renumber,
        tables=changes,
        table_bytes_before=parent.model.tables.plan.num_bytes(plan.target),
        table_bytes_after=plan.num_bytes(plan.target),
        bundle_bytes_before=folder_bytes(folder),
        bundle_bytes_after=folder_bytes(target),
        num_rows=step["num_rows"],
        epochs=epochs,
        before=before,
        after=after,
        seconds=time.perf_counter() - started,
    )


def _check_out(bundle: Path, out: Path, overwrite: bool) -> None:
    """Raise BundleError if an update of `bundle` may not be written to `out`."""
    if out.exists() and bundle.resolve().is_relative_to(out.resolve()):
        what = "is" if out.resolve() == bundle.resolve() else "holds"
        raise BundleError(f"{out} {what} the bundle to update, which stays as it is; choose another --out")
    check_out(out, overwrite)


def extend(parent: Bundle, frequent: Mapping[str, pl.DataFrame], folder: Path, renumber: bool = False) -> Encoder:
    """The parent's encoder with ids for new and returned values; writes the plan with their rows to `folder`/plan.json.

    Args:
        parent: the bundle.
        frequent: by table, values with ids of no meaning here and counts, those first that are to get rows first.
        folder: where the plan goes.
        renumber: see UpdateConfig.
    """
    encoder, sizes = parent.encoder, parent.model.tables.plan
    vocabularies, unseen_ids, tables = dict(encoder.vocabularies), dict(encoder.unseen_ids), []
    for table in sizes.tables:
        # A hashed table has no vocabulary; of a removed one nothing is stored that a row could be added to.
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
    """The schema with the tables' sizes and the digest of their vocabularies."""
    fields = [f if f.type == "dense" else f.replace(vocab_size=num_rows[f.table_name]) for f in encoder.schema.fields]
    return encoder.schema.replace(fields=tuple(fields), vocabulary_digest=digest(vocabularies, encoder.transforms))


def added_ids(table: TableShape, grown: TableShape) -> np.ndarray:
    """int32 compact ids of the rows that `grown` has and `table` has not, ascending."""
    taken = np.zeros(grown.num_compact_rows, bool)
    taken[: table.num_compact_rows] = True
    if table.has_dropped:
        taken[table.dropped_id] = False
    if grown.has_dropped:
        taken[grown.dropped_id] = True
    return np.flatnonzero(~taken).astype(np.int32)


def renumbered(table: TableShape, vocabulary: pl.DataFrame, frequent: pl.DataFrame) -> pl.DataFrame:
    """A table's vocabulary with new ids, and in their order; see the module docstring.

    Args:
        table: its layout.
        vocabulary: values and the ids that they have.
        frequent: values in the order in which they are to be numbered; of others the order stays.
    """
    place = frequent.select("value", place=pl.int_range(pl.len()))
    own = vocabulary if table.dropped_id is None else vocabulary.filter(pl.col("id") != table.dropped_id)
    own = own.join(place, on="value", how="left", nulls_equal=True, maintain_order="left")
    own = own.with_columns(pl.Series("width", _row_widths(table)[own["id"].to_numpy()]))
    ordered = own.sort("width", "place", "id", nulls_last=True)
    ids = own.sort("width", "id")["id"]
    kept = vocabulary.join(own, on="value", how="anti", nulls_equal=True, maintain_order="left")
    return pl.concat([ordered.with_columns(ids).select(vocabulary.columns), kept]).sort("id", maintain_order=True)


def parent_ids(parent: Bundle, plan: PlanShape, encoder: Encoder) -> dict[str, np.ndarray]:
    """By table, an int32 map from the new model's ids to those that the same values have in the parent."""
    maps = {}
    for table, grown in zip(parent.model.tables.plan.tables, plan.tables, strict=True):
        ids_V = np.arange(grown.num_rows, dtype=np.int32)
        if table.dropped_id is not None and grown.dropped_id is not None:
            ids_V[grown.dropped_id] = table.dropped_id
        if table.name in encoder.vocabularies:
            unseen = parent.encoder.unseen_ids.get(table.name, OOV)
            before = parent.encoder.vocabularies[table.name].select("value", before="id")
            pairs = encoder.vocabularies[table.name].join(before, on="value", how="left", nulls_equal=True)
            ids_V[pairs["id"].to_numpy()] = pairs["before"].fill_null(unseen).to_numpy()
        maps[table.name] = ids_V
    return maps


def table_changes(before: PlanShape, after: PlanShape) -> tuple[TableChange, ...]:
    """What an update did to each table, by the plans before and after."""
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
    """The parent with the tables of `plan`, whose rows are those that their values read in it.

    Args:
        parent: the model; it is not changed.
        schema: with the sizes of the new tables.
        plan: the parent's, with more rows.
        ids_before: see `parent_ids`.
    """
    model = type(parent)(schema, plan=plan, **parent.hparams).eval()
    state = parent.state_dict()
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in state.items() if k not in _ROWS}})
    for table, grown in zip(parent.tables.plan.tables, plan.tables, strict=True):
        ids = np.arange(grown.num_compact_rows)
        before = ids_before[grown.name][ids]
        same = _row_widths(grown) == _row_widths(table)[before]
        model.tables.set_rows(grown.name, ids[~same], torch.zeros(int((~same).sum()), plan.width))
        for positions, values in parent.tables.get_rows(table.name, before[same]):
            model.tables.set_rows(grown.name, ids[same][positions], values)
        if model.tables.first_order is not None and parent.tables.first_order is not None:
            rows, rows_before = (
                model.tables.storage_rows(grown.name, ids),
                parent.tables.storage_rows(table.name, before),
            )
            model.tables.first_order[torch.from_numpy(rows)] = parent.tables.first_order[torch.from_numpy(rows_before)]
    return model


_ROWS = ("tables.weight", "tables.first_order")


def _row_widths(table: TableShape) -> np.ndarray:
    """Width of each compact row."""
    return np.repeat([width for _, width in table.segments], [rows for rows, _ in table.segments])


def _metrics_before(model: CTRModel, data: EncodedDataset, split: str, train: TrainConfig) -> dict[str, Any]:
    """Metrics of the parent, on data that carry its ids under the new schema."""
    arrays = data.split(split)
    weights = None if arrays.weights is None else np.asarray(arrays.weights)
    return compute_metrics(np.asarray(arrays.labels), predict_logits(model, data, split, train), weights).to_dict()
