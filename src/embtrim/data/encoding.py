"""Encode a raw log into an EncodedDataset: schema, splits, vocabulary from the training rows, ids on disk.

Passes. All fields are read once, chunk by chunk; another thread reads a chunk while the one before it is in use. Values
get codes in the order in which they first occur (numbering.py), and rows are written with these codes, 4 bytes a value.
The codes of the training rows are then counted, which gives the vocabulary and its ids, and the codes are rewritten as
ids. Two shorter passes come first where they are needed: one over the time column, if the split is by quantiles of
time, and one over the columns whose transform is learned (quantile edges, mean and std). Only training rows are learned
from.

Memory does not grow with the number of rows: about 600 MB for 16 MB chunks of text or slices of parquet, plus about 150
bytes for each distinct text (none for a hashed field). Quantiles, of fields and of time, are exact up to SAMPLE_ROWS
values; beyond that, they come from a seeded sample of that many rows. Disk: twice the ids, until the end.

Splits do not depend on the size of chunks: a row's part is a hash (splitmix64) of the seed and of its index in the log.

The output is written to a working folder beside the target and then renamed, so a run that fails or is interrupted
leaves the target as it was. The working folder of an interrupted or killed run holds a checkpoint, from which the same
call goes on (see encoding_state.py). Finished passes are not repeated.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim._version import __version__
from embtrim.data.cells import log_columns
from embtrim.data.dataset import ARRAYS_VERSION, FORMAT_VERSION, SPLITS, EncodedDataset
from embtrim.data.drafting import draft_schema, is_label_rule
from embtrim.data.encoder import Encoder
from embtrim.data.encoding_state import CHECKPOINT_VERSION, Coded, WorkingFolder, check_target, working_folder
from embtrim.data.kinds import kinds_of_log
from embtrim.data.learning import learned_fields, new_encoder
from embtrim.data.log_file import CHUNK_BYTES
from embtrim.data.numbering import Numbering
from embtrim.data.parts import Part
from embtrim.data.passes import InProcess, OnEngine
from embtrim.data.profile import Profile
from embtrim.data.profiling import finish_profile, note_training_rows, skipped_lines
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import RawLog, Source, open_log
from embtrim.data.splitting import Split, Splitter, check_splits, choose_split
from embtrim.data.transforms import noted_rounding
from embtrim.engines.engine import Engine
from embtrim.engines.local import Local
from embtrim.errors import DataError, EmbtrimError, shown
from embtrim.schema import Schema
from embtrim.system.progress import Counter
from embtrim.system.ranks import refuse_ranks

logger = logging.getLogger(__name__)


def encode(
    source: Source,
    schema: Schema | str | Path | None = None,
    *,
    label: str | None = None,
    where: str | None = None,
    time: str | None = None,
    time_format: str | None = None,
    out: str | Path,
    split: Split | str | None = None,
    valid: Source | None = None,
    test: Source | None = None,
    seed: int = 0,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    checkpoint_seconds: float | None = 60.0,
    engine: Engine | None = None,
    parts: bool = False,
) -> EncodedDataset:
    """Encode a raw log into a folder and open it.

    If the run is interrupted, killed, or out of disk space, its work stays in `.<name of out>.encoding` beside `out`.
    The same call then goes on from the last checkpoint, to the same result. It starts from the beginning, with a
    warning, if anything that the result depends on has changed: a source (by size and modification time), the schema,
    the split, the seed, the read options, or the version of embtrim, polars or numpy. A fault in the data removes the
    work. A run over a DataFrame makes no checkpoints.

    Args:
        source: Path, paths, glob, folder or DataFrame (polars, pandas); the training rows if `valid` or `test` is given.
        schema: The fields, or a TOML file with them; None infers a draft and writes it to `<out>.schema.toml`.
        label: The label column, or a rule that makes the label, such as "rating >= 8" (see rules.py); needed without a
            schema, unless the column has a usual name (label, click, ..).
        where: A rule that chooses the rows, such as "rating > 0"; the log counts as one that has only these rows.
        time: Column that orders rows for a split by time, instead of the schema's.
        time_format: Form of the times in text, as strptime takes it, such as "%d/%m/%Y %H:%M"; see docs/values.md.
        out: Folder to write.
        split: How `source` is divided, such as "8:1:1" (the default) or "time:8:1:1". With `valid` or `test`, all
            of `source` is for training; a split given as well must not have parts for these logs.
        valid: Log with the validation rows.
        test: Log with the test rows.
        seed: Seed of the random split and of the sample for quantiles.
        options: How the logs are read; None finds out from their names and content.
        overwrite: Replace an encoded dataset at `out`. A folder of anything else is never replaced.
        progress: Show a progress bar on stderr once the run has taken two seconds.
        chunk_bytes: Bytes of text read at a time.
        checkpoint_seconds: Least time between two checkpoints while the log is read and ids are written; None makes no
            checkpoints.
        engine: Has workers read each file of the logs apart, see `embtrim.engines` and docs/engines.md; None has this
            process read them one after the other. The result is the same.
        parts: Write the rows of each file of the log as parquet parts (format version 2), not as arrays; see docs/engines.md.

    Raises:
        EmbtrimError: `engine` is not an engine, or its package is not installed.
        DataError: A column is missing; a label, number or weight cannot be used (with file and line); a split is empty
            or has one class only; `out` exists, or another run is writing it; the disk is full.
        KeyboardInterrupt: At Ctrl-C, with a message if the same call can go on.

    Example:
        >>> import polars as pl, tempfile
        >>> log = pl.DataFrame({"click": [0, 1] * 50, "user": ["ann", "bob", "eve", "eve"] * 25})
        >>> data = encode(log, label="click", out=tempfile.mkdtemp() + "/data")
        >>> data.schema.tables
        {'user': 4}
    """
    refuse_ranks("encode")
    engine = Local(jobs=1) if engine is None and parts else engine
    if engine is not None:
        _check_engine(engine, [source, valid, test])
    options, target = options or ReadOptions(), Path(out).expanduser()
    check_target(target, overwrite)
    given = {"train": source} | {name: log for name, log in (("valid", valid), ("test", test)) if log is not None}
    logs = {name: open_log(log, options) for name, log in given.items()}
    chosen = choose_split(split, given=[name for name in logs if name != "train"])
    draft_path = target.with_name(target.name + ".schema.toml") if schema is None else None
    rules = {"label": label, "where": where, "time": time, "time_format": time_format}
    schema = _draft_of(schema, rules, logs["train"])
    if draft_path is not None:
        _check_draft(schema, draft_path)
    _check_logs(logs, schema, chosen)
    data = _encode_logs(
        target, logs, schema, None, chosen, seed, options,
        lambda decided, vocabularies, transforms, _: new_encoder(decided, vocabularies, transforms), {}, overwrite=overwrite,
        progress=progress, chunk_bytes=chunk_bytes, checkpoint_seconds=checkpoint_seconds, engine=engine, parts=parts,
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
    profile: Profile | None,
    progress: bool = False,
) -> EncodedDataset:
    """Encode another log with an existing encoder, extended by the values of the log's training rows.

    An interrupted run goes on as that of `encode` does.

    Args:
        source: The log, as for `encode`.
        encoder: The encoder whose fields, labels and transforms are kept.
        extend: Makes the extended encoder from two arguments. The first holds the values that occur at least
            `min_count` times in the training rows: by table a frame of value, id and count, see
            `Numbering.vocabularies`. The second is the folder of the data, where `extend` may write files of its own.
        out: Folder to write; an encoded dataset there is replaced.
        split: How `source` is divided, as for `encode`.
        min_count: Least count of a value, for all listed fields; None takes each field's own.
        seed: Seed of the random split.
        options: How the log is read.
        inputs: Everything that `extend` depends on, as JSON values.
        profile: Profile of the data that trained the encoder; the folder then holds against.json, see profiling.py.
        progress: Show a progress bar on stderr.

    Raises:
        DataError: The same faults as for `encode`.
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
        lambda _, vocabularies, __, folder: extend(vocabularies, folder), inputs,
        overwrite=True, progress=progress, chunk_bytes=CHUNK_BYTES, checkpoint_seconds=60.0, earlier=(encoder, profile),
    )  # fmt: skip


def _check_engine(engine: Engine, sources: Sequence[Source | None]) -> None:
    """Check an engine, and that its workers can read the logs apart from this process.

    Raises:
        EmbtrimError: It is not an engine.
        DataError: A log is a DataFrame or a pipe.
    """
    if isinstance(engine, type) or not isinstance(engine, Engine):
        raise EmbtrimError(
            f"engine is {shown(engine)}; it takes embtrim.engines.Local(jobs=2), Ray() or Spark(session), or None"
        )
    for source in sources:
        paths = [source] if isinstance(source, (str, Path)) else source
        if not isinstance(paths, (Sequence, type(None))):
            raise DataError(
                f"a {type(source).__name__} lies in the memory of this process, where the workers of an engine cannot read it; "
                "write it to parquet files, or leave engine and parts out"
            )
        for path in map(Path, paths or ()):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise DataError(
                    f"{path} is neither a file nor a folder: it can be read once, and an engine reads a file several times; write "
                    "it to files, or leave engine and parts out"
                )


def _check_logs(logs: Mapping[str, RawLog], schema: Schema, chosen: Split | None) -> None:
    """Raise DataError unless the schema has ids, and the logs have the columns that the schema and the split need."""
    if not schema.id_fields:
        raise DataError(
            "all fields of the schema are dense, so there is no table to shrink; declare a field categorical, or numeric "
            "with transform = 'log2' or 'quantile:k'"
        )
    if chosen is not None and chosen.by == "time" and schema.time is None:
        raise DataError(
            "a split by time needs the schema's time column; set time = '<column>' in the schema (--time COLUMN)"
        )
    for name, log in logs.items():
        by_time = name == "train" and chosen is not None and chosen.by == "time"
        is_label_rule(schema.label, log)
        log.choose_rows(schema.where, schema.nulls)
        log.require(log_columns(schema, with_time=by_time))


def _encode_logs(
    target: Path,
    logs: Mapping[str, RawLog],
    schema: Schema,
    transforms: Mapping[str, Mapping[str, Any]] | None,
    chosen: Split | None,
    seed: int,
    options: ReadOptions,
    fit: Callable[[Schema, dict[str, pl.DataFrame], Mapping[str, Mapping[str, Any]], Path], Encoder],
    more_inputs: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
    chunk_bytes: int,
    checkpoint_seconds: float | None,
    earlier: tuple[Encoder, Profile | None] | None = None,
    engine: Engine | None = None,
    parts: bool = False,
) -> EncodedDataset:
    """Make the encoder and write all rows as its ids.

    `fit` makes the encoder from the schema, the vocabularies of the training rows, the transforms and the data's
    folder. If `transforms` is None, the data are new: transforms and kinds are learned from the training rows.
    """
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
        # The checkpoints of engines, and of parts, hold other files.
        "engine": None if engine is None else "parts" if parts else "arrays",
        **more_inputs,
    }
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(working_folder(target, overwrite, inputs, checkpoint_seconds))
        bar = stack.enter_context(Counter(progress, after=2.0))
        seconds_before = work.state.seconds
        splitter = Splitter(chosen, schema, seed)
        if engine is None:
            passes = InProcess(logs, seed, chunk_bytes, bar, work)
        else:
            if engine != Local(jobs=1) and all(len(log.files) == 1 for log in logs.values()):
                logger.warning(
                    "the log is one file, which one worker reads; divide it into several files to use more workers"
                )
            passes = OnEngine(stack.enter_context(engine.started()), logs, seed, chunk_bytes, bar, work, parts)
        _learn_cuts(passes, splitter, schema, work)
        undecided: frozenset[str] = frozenset()
        if transforms is None:
            schema, undecided = kinds_of_log(schema, logs["train"])
            transforms = {**_learned_transforms(passes, splitter, schema, work), **noted_rounding(schema)}
        numbering = Numbering(schema, transforms, undecided)
        coded = passes.write_codes(numbering, splitter)
        num_rows = {name: sum(coded.blocks[name]) for name in SPLITS if name in coded.blocks}
        positives = {name: coded.positives[name] for name in num_rows}
        check_splits(num_rows, positives, schema.label, chosen, list(logs))
        if work.state.is_fitted:
            encoder = Encoder.load(work.folder)
        else:
            passes.count(numbering, coded)
            decided, vocabularies = numbering.vocabularies()
            encoder = fit(decided, vocabularies, transforms, work.folder)
            encoder.save(work.folder)
            note_training_rows(numbering, encoder, None if earlier is None else earlier[0], work.folder)
        others = passes.write_ids(numbering, encoder, coded)
        numbers = passes.numbers(schema, coded)
        finish_profile(schema, others, numbers, coded, work.folder, None if earlier is None else earlier[1])
        seconds = seconds_before + time.perf_counter() - started
        meta = _meta(logs, options, splitter, coded, seed, passes.parts) | {"seconds": round(seconds, 3)}
        (work.folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    listed = ", ".join(f"{name} {n:,}" for name, n in num_rows.items())
    logger.info("encoded %s rows into %s in %.1f s", listed, target, seconds)
    return EncodedDataset.load(target)


def _meta(
    logs: Mapping[str, RawLog],
    options: ReadOptions,
    splitter: Splitter,
    coded: Coded,
    seed: int,
    parts: Mapping[str, Sequence[Part]] | None,
) -> dict[str, Any]:
    """What meta.json holds, but for the seconds."""
    names, chosen = [name for name in SPLITS if name in coded.blocks], splitter.split
    meta = {
        "format_version": ARRAYS_VERSION if parts is None else FORMAT_VERSION,
        "num_rows": {name: sum(coded.blocks[name]) for name in names},
        "positives": {name: coded.positives[name] for name in names},
        "sources": {name: log.describe() for name, log in logs.items()},
        "read_options": options.model_dump(mode="json", exclude_none=True),
        "split": chosen and {**chosen.model_dump(mode="json"), "cuts": splitter.cut_texts() or None},
        "seed": seed,
        "skipped": {name: lines.model_dump() for name, lines in skipped_lines(coded).items()},
    }
    if parts is not None:
        meta["parts"] = {name: [part.model_dump() for part in parts[name]] for name in names}
    return meta


def _learn_cuts(passes: InProcess | OnEngine, splitter: Splitter, schema: Schema, work: WorkingFolder) -> None:
    """Find the moments at which to cut, if the split is by time; the checkpoint may have them."""
    if splitter.column is None:
        return
    if work.state.cuts is not None:
        splitter.cuts, splitter.clock = list(work.state.cuts), work.state.clock
    else:
        passes.learn_cuts(splitter, schema)
        work.save(cuts=tuple(splitter.cuts or ()), clock=splitter.clock)
    logger.info("split by time: %s", splitter.describe())


def _learned_transforms(
    passes: InProcess | OnEngine, splitter: Splitter, schema: Schema, work: WorkingFolder
) -> dict[str, dict[str, Any]]:
    """The learned transforms by field, from the checkpoint if it has them."""
    if work.state.transforms is not None:
        return work.state.transforms
    if not learned_fields(schema):
        return {}
    transforms = passes.learn_transforms(splitter, schema)
    work.save(transforms=transforms)
    return transforms


# --- the schema of a run ----------------------------------------------------------------------------------------------


def _draft_of(schema: Schema | str | Path | None, rules: Mapping[str, str | None], log: RawLog) -> Schema:
    """The schema as given, read from a file, or inferred from the log; without the sizes that encoding fills in.

    `rules` holds the keys label, where, time and time_format; those that are not None go before the schema's.
    """
    if schema is None:
        schema = draft_schema(log, **rules)
    elif isinstance(schema, (str, Path)):
        schema = Schema.load_draft(schema)
    fields = tuple(spec.replace(vocab_size=None) for spec in schema.fields)
    given = {key: value for key, value in rules.items() if value is not None}
    return schema.replace(**given, fields=fields, vocabulary_digest=None)


def _check_draft(schema: Schema, path: Path) -> None:
    if path.exists() and Schema.load_draft(path) != schema:
        raise DataError(
            f"{path} exists and differs from the schema that would be inferred now; pass it as schema (--schema), or "
            "remove it"
        )


def _write_draft(schema: Schema, path: Path) -> None:
    if path.exists():
        return
    schema.save_draft(path)
    logger.info("wrote the inferred schema to %s; edit it and pass it as schema to encode again", path)
