"""The profile of a raw log, alone or as the encoder of an earlier log reads it; one pass in bounded memory.

Memory grows with the different texts of the log as it does when the log is encoded, and not with its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embtrim.data.cells import dense_values, needed_columns, number_columns
from embtrim.data.drafting import NO_LABEL, draft_schema
from embtrim.data.encoder import Encoder
from embtrim.data.kinds import kinds_of_log
from embtrim.data.numbering import Numbering
from embtrim.data.profile import TOLERANCE, Counts, FieldProfile, LogProfile, Profile, find_drift
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import RawLog, Source, open_log, read_ahead
from embtrim.data.tally import Tally, sample_of
from embtrim.errors import DataError
from embtrim.rules import parse_rule
from embtrim.schema import FieldSpec, Schema
from embtrim.system.holding import undo_replacement

logger = logging.getLogger(__name__)

SPLIT = "log"


def profile(
    source: Source,
    against: str | Path | None = None,
    options: ReadOptions | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> LogProfile:
    """Count what the fields of a raw log hold, alone or beside an earlier log.

    Args:
        source: The log: a path or URL, several of them, a glob, a folder or a DataFrame. It needs no label.
        against: Folder of encoded data or of a bundle: its fields are counted as its encoder reads them, over the rows that
            its schema's `where` chooses, and compared with its profile. A log without the columns of `where`, such as
            one without labels, counts whole. None counts the fields that a draft would have.
        options: How the log is read.
        tolerance: Share by which unseen or missing values may exceed those of validation; see profile.py.

    Returns:
        Counts, most frequent values and quantiles by field, and the fields that have drifted.

    Raises:
        DataError: The log cannot be read, lacks a column that `against` reads, or `against` is neither encoded data nor a
            bundle.

    Example:
        >>> import polars as pl
        >>> found = profile(pl.DataFrame({"user": ["ann", "bob", "ann", None]}))
        >>> [(field.distinct, field.top[0]) for field in found.profile.fields]
        [(2, ('ann', 2))]
    """
    log = open_log(source, options)
    if against is None:
        encoder, earlier = None, None
        schema, undecided = kinds_of_log(_plain(draft_schema(log, NO_LABEL, None)), log)
        numbering = Numbering(schema, {}, undecided)
    else:
        encoder, earlier = _open(Path(against))
        schema = encoder.schema
        _choose_rows(log, schema)
        numbering = Numbering(schema, encoder.transforms)
    tally = Tally(schema, sample_of(schema, log), earlier)
    numbering.count(_codes(log, numbering, encoder, tally))
    numbering.vocabularies()
    counts, quantiles, seen = tally.counts(), tally.quantiles(), numbering.seen
    fields = []
    for spec in schema.fields:
        found = counts[spec.name]
        if encoder is None and spec.type in ("categorical", "multi"):
            found = Counts(rows=found.rows, missing=seen.missing[spec.name])
        fields.append(
            FieldProfile(
                name=spec.name,
                type=spec.type,
                distinct=seen.distinct.get(spec.name),
                top=() if spec.type == "numeric" else tuple(seen.top.get(spec.name, ())),
                quantiles=quantiles.get(spec.name, ()),
                counts={SPLIT: found},
            )
        )
    drift = [] if earlier is None else find_drift(earlier, counts, tolerance, tally.examples)
    skipped = {SPLIT: log.skipped} if log.skipped.num_lines else {}
    held = Profile(fields=tuple(fields), skipped=skipped)
    return LogProfile(log=log.name, rows=seen.rows, profile=held, against=earlier, drift=tuple(drift))


def _choose_rows(log: RawLog, schema: Schema) -> None:
    """Let the log leave out the rows that the schema leaves out, if it has the columns that say which."""
    missing = [] if schema.where is None else [n for n in parse_rule(schema.where).columns if n not in log.columns]
    if missing and not log.is_sparse:
        logger.warning(
            "%s has no column %s, which where = %r reads: all its rows are counted",
            log.name, ", ".join(map(repr, missing)), schema.where,
        )  # fmt: skip
        return
    log.choose_rows(schema.where, schema.nulls)


def _codes(log: RawLog, numbering: Numbering, encoder: Encoder | None, tally: Tally) -> Iterator[list[np.ndarray]]:
    """The codes of a log's rows, chunk by chunk, while the tally counts them."""
    schema = numbering.schema
    for chunk in read_ahead(log.chunks(needed_columns(schema), numbers=number_columns(schema))):
        codes_CN = numbering.codes(chunk)
        if encoder is None:
            dense_NE = dense_values(chunk.frame, schema, {}, chunk.locate)
            tally.add_rows(chunk, codes_CN, dense_NE)
        else:
            encoder.encode_chunk(chunk, tally)
        yield [codes_CN]


def _plain(schema: Schema) -> Schema:
    """A draft whose numbers need no transform that is learned, and whose rare values count."""
    fields: list[FieldSpec] = []
    for field in schema.fields:
        if field.type == "numeric":
            field = FieldSpec(
                name=field.name, column=field.column, type="dense", transform="none", decimal=field.decimal
            )
        fields.append(field.replace(min_count=1))
    return schema.replace(fields=tuple(fields))


def _open(folder: Path) -> tuple[Encoder, Profile | None]:
    """The encoder and the profile of encoded data or of a bundle."""
    undo_replacement(folder)
    if (folder / "bundle.json").exists():
        return Encoder.load(folder / "encoder"), Profile.load(folder)
    if (folder / "meta.json").exists():
        return Encoder.load(folder), Profile.load(folder)
    raise DataError(
        f"{folder} is neither encoded data nor a bundle; --against takes a folder that `embtrim encode` or a run wrote"
    )
