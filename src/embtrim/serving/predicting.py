"""Score a raw log on disk, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from embtrim.data.log_file import Skipped
from embtrim.data.profile import TOLERANCE, Drift, shares_of
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log, read_ahead
from embtrim.errors import ConfigError, DataError
from embtrim.serving.bundle import Bundle
from embtrim.serving.drift import check_drift
from embtrim.system.files import take_place
from embtrim.system.folders import new_file_mode, temporary_folder
from embtrim.system.memory import freed_pages_kept
from embtrim.system.progress import Counter

# What a spreadsheet runs as a formula, and what of it is a number.
_FORMULA = re.compile(r"^[=+\-@\t\r\n]")
_NUMBER = re.compile(r"^[+-]?[0-9.,]*[0-9][0-9.,]*([eE][+-]?[0-9]+)?$")


@dataclass(frozen=True)
class Predictions:
    """What was scored.

    Attributes:
        num_rows: Rows of the log.
        drift: Fields whose unseen or missing values exceed what validation saw, the largest growth first.
        shares: Shares of unseen and missing values by field, see `shares_of`.
        skipped: Lines of the log that could not be read, and have no score.
    """

    num_rows: int
    drift: list[Drift]
    shares: list[dict[str, Any]]
    skipped: Skipped


def write_predictions(
    bundle: Bundle,
    source: str | Path,
    out: str | Path,
    *,
    keep: Sequence[str] = (),
    options: ReadOptions | None = None,
    overwrite: bool = False,
    drift_tolerance: float = TOLERANCE,
    strict: bool = False,
    raw_text: bool = False,
    progress: bool = False,
) -> Predictions:
    """Score a log on disk in bounded memory, and write the scores as a column `score`.

    A warning is logged for each field of the log that has drifted from what the bundle's validation rows saw.

    Args:
        bundle: Bundle that scores the log.
        source: Raw log.
        out: File to write, `.parquet` or `.csv`; it has a temporary name until it is complete.
        keep: Columns of the log to copy beside the scores.
        options: How to read the log.
        overwrite: Replace an existing file.
        drift_tolerance: Share by which unseen or missing values may exceed those of validation; see profile.py.
        strict: Fail and write nothing if a field has drifted.
        raw_text: Copy texts into a csv as they are. Otherwise a text that a spreadsheet would run as a formula gets a `'` in
            front; see `without_formulas`.
        progress: Show a progress bar on stderr.

    Raises:
        ConfigError: `out` has another suffix.
        DataError: The log lacks a column or holds a value that a field cannot read; `out` exists; the disk is full.
    """
    out = Path(out)
    if out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--out takes a .parquet or .csv file, given {str(out)!r}")
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out} exists; choose another name or pass overwrite=True (--overwrite)")
    if "score" in keep:
        raise DataError("column 'score' of the log would collide with the scores; leave it out of keep")
    log = open_log(source, options)
    log.require([*bundle.encoder.columns, *keep])
    rows, tally = 0, bundle.tally(log)
    with (
        temporary_folder(out) as folder,
        Counter(progress, "rows") as bar,
        freed_pages_kept(),
    ):
        bar.begin("predict", None)
        parts: list[Path] = []
        try:
            columns, numbers = bundle.columns_of(log)
            chunks = log.chunks([*columns, *keep], numbers=numbers - set(keep))
            for kept, done, encoded in read_ahead(
                (chunk.frame.select(keep), chunk.done, bundle.encode_chunk(chunk, tally)) for chunk in chunks
            ):
                if not parts:
                    _check_kept(kept, out)
                part = pl.DataFrame([*kept, pl.Series("score", bundle.score(encoded))])
                parts.append(folder / f"{len(parts):06d}.parquet")
                part.write_parquet(parts[-1])
                rows += len(part)
                bar.update(rows, rows / max(done, 1e-9))
            whole = (
                pl.scan_parquet(parts, glob=False)
                if parts
                else pl.LazyFrame(schema=dict.fromkeys([*keep, "score"], pl.Float32))
            )
            if out.suffix == ".csv" and not raw_text:
                whole = without_formulas(whole, keep)
            complete = folder / f"complete{out.suffix}"
            (whole.sink_parquet if out.suffix == ".parquet" else whole.sink_csv)(complete)
            counts = tally.counts()
            drift = check_drift(bundle.profile, counts, tally.examples, drift_tolerance, strict, "the bundle")
            take_place(complete, out, new_file_mode(folder))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{out} could not be written: {error}; free space or choose another place") from None
    return Predictions(rows, drift, shares_of(bundle.profile, counts), log.skipped)


def without_formulas(frame: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """A frame for a csv in which no text is a formula to a spreadsheet.

    Texts and names of columns that begin with = + - @, a tab or a line end get a `'` in front, unless they are numbers.
    """
    schema, parts = frame.collect_schema(), []
    for name in columns:
        part, dtype = pl.col(name), schema[name]
        if dtype == pl.String or dtype in (pl.Categorical, pl.Enum):
            text = part.cast(pl.String)
            is_formula = text.str.contains(_FORMULA.pattern) & ~text.str.contains(_NUMBER.pattern)
            part = pl.when(is_formula).then(pl.concat_str(pl.lit("'"), text)).otherwise(text)
        is_formula = _FORMULA.match(name) is not None and _NUMBER.match(name) is None
        parts.append(part.alias(f"'{name}" if is_formula else name))
    return frame.select(*parts, *(name for name in schema.names() if name not in columns))


def _check_kept(frame: pl.DataFrame, out: Path) -> None:
    """Raise DataError if the file cannot hold the columns of the log to copy."""
    if out.suffix == ".csv":
        for name, dtype in frame.schema.items():
            if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
                raise DataError(
                    f"--keep: column {name!r} holds {dtype}, which csv cannot hold; write {out.with_suffix('.parquet').name}, "
                    "or leave the column out"
                )
