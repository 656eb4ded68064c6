"""Encode a raw log into an EncodedDataset: schema, splits, vocabulary from the training rows, ids on disk.

All fields are read once, chunk by chunk, each by another thread while the one before it is in use. Their values get
codes in the order in which they come (numbering.py), and rows go to disk with these codes, 4 bytes a value. Then the codes of the
training rows are counted, which gives the vocabulary and its ids, and the codes are written again as ids. Before that are
passes over single columns, where they are needed: over the time column if a split by quantiles of time asks for it, and over
those whose transform is learned (quantile edges, mean and std). Only training rows are learned from.

Memory: bounded whatever the number of rows, by about 600 MB for 16 MB chunks of text or slices of parquet, plus what
distinct values take: about 150 bytes for each distinct text, or none for a hashed field. Quantiles (of fields and of time) are
exact up to SAMPLE_ROWS values, and beyond that come from a seeded sample of that many rows. Disk: twice the ids, until
the end.

Splits do not depend on the size of chunks: a row's part is a hash (splitmix64) of the seed and of its index in the log.

The output is written to a working folder beside the target and renamed: a run that fails, or is interrupted, leaves the
target as it was. The working folder of an interrupted or killed run holds a checkpoint, from which the same call goes on
(see encoding_state.py); passes that are finished are not made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from embtrim._version import __version__
from embtrim.data.cells import log_columns, number_columns, to_numbers
from embtrim.data.dataset import FORMAT_VERSION, SPLITS, EncodedDataset
from embtrim.data.drafting import draft_schema
from embtrim.data.encoder import Encoder, digest
from embtrim.data.encoding_state import CHECKPOINT_VERSION, Work, check_target, working_folder
from embtrim.data.log_file import CHUNK_BYTES
from embtrim.data.numbering import Numbering
from embtrim.data.read_options import Format, ReadOptions
from embtrim.data.reading import RawLog, Source, open_log, read_ahead
from embtrim.data.splitting import Sample, Split, Splitter, check_splits, choose_split
from embtrim.data.transforms import Moments, quantile_edges
from embtrim.data.writing import groups_of_training_codes, write_codes, write_ids
from embtrim.errors import DataError
from embtrim.schema import Schema
from embtrim.system.progress import StageBar

logger = logging.getLogger(__name__)


def encode(
    source: Source,
    schema: Schema | str | Path | None = None,
    *,
    label: str | None = None,
    out: str | Path,
    split: Split | str | None = None,
    valid: Source | None = None,
    test: Source | None = None,
    seed: int = 0,
    format: Format | None = None,
    header: bool = True,
    columns: Sequence[str] | None = None,
    separator: str | None = None,
    encoding: Literal["utf-8", "latin-1"] = "utf-8",
    quoted: bool | None = None,
    overwrite: bool = False,
    progress: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    checkpoint_seconds: float | None = 60.0,
) -> EncodedDataset:
    """Encode a raw log into a folder and open it.

    Interrupted, killed, or out of disk space, it leaves its work in `.<name of out>.encoding` beside `out`, and the same call
    goes on from the last checkpoint there, to the same result. It starts anew, with a warning, if anything that the result
    depends on has changed since: a source (by size and time of change), the schema, the split, the seed, how the log is
    read, or the version of embtrim, polars or numpy. A fault in the data removes the work. For a frame there are no
    checkpoints.

    Args:
        source: path, paths, glob, folder or polars DataFrame; the training rows if `valid` or `test` is given.
        schema: the fields, or a TOML file with them; None infers a draft and writes it to `<out>.schema.toml`.
        label: the label column; needed without a schema unless the column has a usual name (label, click, ..).
        out: folder to write.
        split: how `source` is divided, such as "8:1:1" (the default) or "time:8:1:1"; with `valid` and `test` given,
            all of `source` is for training, unless a split is asked for whose parts for the given files are 0.
        valid: a log with the validation rows.
        test: a log with the test rows.
        seed: of the random split and of the sample for quantiles.
        format: see `ReadOptions`, like `header`, `columns`, `separator`, `encoding` and `quoted`.
        header: whether the first line of text names the columns.
        columns: names of the columns.
        separator: between cells of text.
        encoding: of text.
        quoted: whether `"` quotes cells.
        overwrite: replace an encoded dataset at `out`; anything else there is never touched.
        progress: show a bar on stderr for what takes longer than two seconds.
        chunk_bytes: bytes of text read at a time.
        checkpoint_seconds: least time between two checkpoints while values are counted and ids written; None makes no
            checkpoint at all.

    Raises:
        DataError: a column is missing; a label, number or weight cannot be used (with file and line); a split is empty or
            has one class only; `out` exists, or another run is making it; the disk is full.
        KeyboardInterrupt: at Ctrl-C, with a message if the same call can go on.

    Example:
        >>> import polars as pl, tempfile
        >>> log = pl.DataFrame({"click": [0, 1] * 50, "user": ["ann", "bob", "eve", "eve"] * 25})
        >>> data = encode(log, label="click", out=tempfile.mkdtemp() + "/data")
        >>> data.schema.tables
        {'user': 4}
    """
    options = ReadOptions(
        format=format,
        header=header,
        columns=None if columns is None else tuple(columns),
        separator=separator,
        encoding=encoding,
        quoted=quoted,
    )
    target = Path(out).expanduser()
    check_target(target, overwrite)
    logs = {"train": open_log(source, options)}
    for name, given in (("valid", valid), ("test", test)):
        if given is not None:
            logs[name] = open_log(given, options)
    chosen = choose_split(split, given=[name for name in logs if name != "train"])
    draft_path = None
    if schema is None:
        schema = draft_schema(logs["train"], label)
        draft_path = target.with_name(target.name + ".schema.toml")
        _check_draft(schema, draft_path)
    elif isinstance(schema, (str, Path)):
        schema = Schema.load_draft(schema)
    if label is not None and label != schema.label:
        schema = schema.replace(label=label)
    schema = _as_draft(schema)
    _check_logs(logs, schema, chosen)
    data = _encode_logs(
        target, logs, schema, None, chosen, seed, options, partial(_fit_encoder, schema), {}, overwrite=overwrite,
        progress=progress, chunk_bytes=chunk_bytes, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    if draft_path is not None:
        _write_draft(schema, draft_path)
    return data


def encode_further(
    source: Source,
    encoder: Encoder,
    extend: Callable[[dict[str, pl.DataFrame], Path], Encoder],
    *,
    out: str | Path,
    split: str | None = None,
    min_count: int | None = None,
    seed: int = 0,
    options: ReadOptions,
    inputs: Mapping[str, Any],
    progress: bool = False,
) -> EncodedDataset:
    """Encode another log of an encoder's columns, with the encoder extended by values of its training rows.

    Interrupted, it goes on as `encode` does.

    Args:
        source: the log, as for `encode`.
        encoder: its fields, labels and transforms are taken as they are.
        extend: makes the encoder from the values that occur at least `min_count` times in the training rows - by table a
            frame of value, id and count, as `Numbering.vocabularies` gives them - and from the folder, in which files
            that it writes stay with the data.
        out: folder to write; an encoded dataset there is replaced.
        split: as for `encode`.
        min_count: of all listed fields; None takes each field's own.
        seed: of the random split.
        options: how the log is read.
        inputs: all that `extend` depends on, as JSON.
        progress: show a bar on stderr.

    Raises:
        DataError: as `encode`.
    """
    target = Path(out)
    check_target(target, overwrite=True)
    logs = {"train": open_log(source, options)}
    chosen = choose_split(split, given=[])
    counted = encoder.schema
    if min_count is not None:
        listed = {f.name for f in counted.id_fields if not f.hash_size}
        fields = [f.replace(min_count=min_count) if f.name in listed else f for f in counted.fields]
        counted = counted.replace(fields=tuple(fields))
    _check_logs(logs, counted, chosen)
    return _encode_logs(
        target, logs, counted, encoder.transforms, chosen, seed, options,
        lambda vocabularies, _, folder: extend(vocabularies, folder), inputs,
        overwrite=True, progress=progress, chunk_bytes=CHUNK_BYTES, checkpoint_seconds=60.0,
    )  # fmt: skip


def _check_logs(logs: Mapping[str, RawLog], schema: Schema, chosen: Split | None) -> None:
    """Raise DataError unless the logs have the columns that the schema and the split need."""
    if chosen is not None and chosen.by == "time" and schema.time is None:
        raise DataError("a split by time needs the schema's time column; set time = '<column>' in the schema")
    for name, log in logs.items():
        by_time = name == "train" and chosen is not None and chosen.by == "time"
        log.require(log_columns(schema, with_time=by_time))


def _encode_logs(
    target: Path,
    logs: Mapping[str, RawLog],
    schema: Schema,
    transforms: Mapping[str, Mapping[str, Any]] | None,
    chosen: Split | None,
    seed: int,
    options: ReadOptions,
    fit: Callable[[dict[str, pl.DataFrame], Mapping[str, Mapping[str, Any]], Path], Encoder],
    more_inputs: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
    chunk_bytes: int,
    checkpoint_seconds: float | None,
) -> EncodedDataset:
    """Make the encoder by `fit`, of the vocabularies and transforms of the training rows (None: to be learned), and write all
    rows as its ids."""
    started = time.perf_counter()
    sources = {name: log.identity() for name, log in logs.items()}
    if None in sources.values():
        checkpoint_seconds = None
    inputs = {
        "versions": [CHECKPOINT_VERSION, __version__, pl.__version__, np.__version__],
        "schema": schema.model_dump(mode="json"),
        "split": None if chosen is None else chosen.model_dump(mode="json"),
        "seed": seed,
        "read options": options.model_dump(mode="json"),
        "chunk_bytes": chunk_bytes,
        "source files": sources,
        **more_inputs,
    }
    bar = StageBar(progress)
    with working_folder(target, overwrite, inputs, checkpoint_seconds) as work, bar:
        seconds_before = work.checkpoint.seconds
        splitter = Splitter(chosen, schema, seed)
        _learn_cuts(splitter, logs["train"], chunk_bytes, bar, work)
        if transforms is None:
            transforms = work.checkpoint.transforms
        if transforms is None:
            transforms = _fit_transforms(schema, logs["train"], splitter, seed, chunk_bytes, bar)
            if transforms:
                work.save(transforms=transforms)
        numbering = Numbering(schema, transforms)
        parts = {name: (log, splitter if name == "train" else SPLITS.index(name)) for name, log in logs.items()}
        coded = write_codes(numbering, parts, chunk_bytes, bar, work)
        num_rows = {name: sum(coded.blocks[name]) for name in SPLITS if name in coded.blocks}
        positives = {name: coded.positives[name] for name in num_rows}
        check_splits(num_rows, positives, schema.label, chosen, list(logs))
        if work.checkpoint.is_fitted:
            encoder = Encoder.load(work.folder)
        else:
            encoder = fit(
                numbering.vocabularies(groups_of_training_codes(coded, schema, bar, work)), transforms, work.folder
            )
            encoder.save(work.folder)
        write_ids(numbering, encoder, coded, bar, work)
        seconds = seconds_before + time.perf_counter() - started
        meta = {
            "format_version": FORMAT_VERSION,
            "num_rows": num_rows,
            "positives": positives,
            "sources": {name: log.describe() for name, log in logs.items()},
            "read_options": options.model_dump(mode="json", exclude_none=True),
            "split": None if chosen is None else {**chosen.model_dump(mode="json"), "cuts": splitter.cuts},
            "seed": seed,
            "seconds": round(seconds, 3),
        }
        (work.folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    listed = ", ".join(f"{name} {n:,}" for name, n in num_rows.items())
    logger.info("encoded %s rows into %s in %.1f s", listed, target, seconds)
    return EncodedDataset.load(target)


# --- fitting ----------------------------------------------------------------------------------------------------------


def _learn_cuts(splitter: Splitter, log: RawLog, chunk_bytes: int, bar: StageBar, work: Work) -> None:
    """Find the moments at which to cut, if the split is by time."""
    if splitter.column is None:
        return
    if work.checkpoint.cuts is not None:
        splitter.cuts, splitter.is_text = list(work.checkpoint.cuts), work.checkpoint.times_are_text
        return
    splitter.learn_cuts(log, chunk_bytes, bar.update)
    work.save(cuts=splitter.cuts, times_are_text=splitter.is_text)


def _fit_transforms(
    schema: Schema, log: RawLog, splitter: Splitter, seed: int, chunk_bytes: int, bar: StageBar
) -> dict[str, dict[str, Any]]:
    """Quantile edges, and mean and std, from the training rows."""
    fitted = [f for f in schema.fields if f.transform == "standard" or (f.transform or "").startswith("quantile:")]
    if not fitted:
        return {}
    samples = {f.name: Sample(seed) for f in fitted if f.transform != "standard"}
    moments = {f.name: Moments() for f in fitted if f.transform == "standard"}
    columns = [f.raw_column for f in fitted]
    numbers = set(columns) & set(number_columns(schema))
    if splitter.column is not None:
        columns.append(splitter.column)
    for chunk in read_ahead(log.chunks(columns, chunk_bytes, numbers=numbers)):
        is_train_N = splitter.assign(chunk) == 0
        values = to_numbers(chunk.frame, fitted, schema, chunk.locate)
        for name in samples:
            rows = np.flatnonzero(is_train_N & values[name].is_not_null().to_numpy())
            samples[name].add(chunk.first_row, values[name].gather(rows), rows)
        for name, moment in moments.items():
            moment.add(values[name].filter(pl.Series(is_train_N)).drop_nulls().to_numpy())
        bar.update("reading numbers", chunk.done)
    transforms: dict[str, dict[str, Any]] = {}
    for f in fitted:
        if f.transform == "standard":
            transforms[f.name] = moments[f.name].result()
        else:
            num_buckets = int((f.transform or "").partition(":")[2])
            transforms[f.name] = {"edges": quantile_edges(samples[f.name].values().to_numpy(), num_buckets)}
    return transforms


def _fit_encoder(
    schema: Schema,
    vocabularies: dict[str, pl.DataFrame],
    transforms: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> Encoder:
    """The encoder of a new dataset."""
    fields = []
    for field_spec in schema.fields:
        if field_spec.type != "dense":
            kept = field_spec.hash_size or vocabularies[field_spec.table_name].height
            field_spec = field_spec.replace(vocab_size=1 + kept)
        fields.append(field_spec)
    encoded = schema.replace(fields=tuple(fields), vocabulary_digest=digest(vocabularies, transforms))
    return Encoder(encoded, vocabularies, transforms)


# --- labels and weights -----------------------------------------------------------------------------------------------


# --- writing ----------------------------------------------------------------------------------------------------------


# --- the schema of a run ----------------------------------------------------------------------------------------------


def _as_draft(schema: Schema) -> Schema:
    """The schema without what encoding fills in."""
    fields = tuple(spec.replace(vocab_size=None) for spec in schema.fields)
    return schema.replace(fields=fields, vocabulary_digest=None)


def _check_draft(schema: Schema, path: Path) -> None:
    if path.exists() and Schema.load_draft(path) != schema:
        raise DataError(
            f"{path} exists and is not what would be inferred now; pass it as schema (--schema), or remove it"
        )


def _write_draft(schema: Schema, path: Path) -> None:
    if path.exists():
        return
    schema.save_draft(path)
    logger.info("wrote the inferred schema to %s; edit it and pass it as schema to encode again", path)
