"""The public datasets that embtrim knows: where to get them, under which licence, and how to encode them.

Only `flights` ships with the package. The licences of the other datasets require that users download them by hand;
`encode_known` then encodes the files as published.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from embtrim._version import __version__
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoding import encode
from embtrim.data.log_file import suffix_of
from embtrim.data.read_options import SUFFIXES, ReadOptions
from embtrim.data.reading import open_log
from embtrim.data.splitting import Split
from embtrim.engines.engine import Engine
from embtrim.errors import DataError, hint
from embtrim.schema import FieldSpec, Schema
from embtrim.system.folders import temporary_folder
from embtrim.system.holding import undo_replacement

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

# Settings of the best DeepFM on Frappe as reported by the BARS benchmark. No other recipe here comes from a
# publication.
_FRAPPE_RECIPE: dict[str, dict[str, Any]] = {
    "model": {"embedding_dim": 10, "hidden_units": [400, 400, 400], "dropout": 0.2, "batch_norm": True},
    "train": {
        "batch_size": 4096,
        "learning_rate": 1e-3,
        "embedding_l2": 0.05,
        "reduce_lr": 0.1,
        "patience": 2,
        "min_delta": 0.0,
    },
}
# Id fields overfit in the second epoch, on MovieLens as on Criteo; so one epoch, or strong L2.
_LARGE_RECIPE: dict[str, dict[str, Any]] = {
    "model": {"embedding_dim": 16, "hidden_units": [400, 400, 400], "dropout": 0.0, "batch_norm": False},
    "train": {"batch_size": 4096, "learning_rate": 1e-3, "epochs": 1, "patience": 0, "embedding_l2": 0.0},
}


@dataclass(frozen=True)
class KnownDataset:
    """A public dataset and how it is encoded.

    Attributes:
        name: Name for `embtrim.load` and `encode_known`.
        title: Description of one line.
        source: Address of the page that publishes it.
        licence: Its terms in short; the page has them in full.
        how_to_get: What to download.
        files: Names of the files expected in the folder; each may also end in `.gz`.
        schema: The fields.
        recipe: Settings to start from, with sections "model" and "train".
        split: How the single file is divided; None if the files are train, valid and test.
        options: How the files are read; None finds out.
        prepare: Derives the log from the files: (folder with the files, folder to write into) -> source. None reads the
            files as they are.
        bundled: Name of the file within the package, or None.
        note: What a user should know.
    """

    name: str
    title: str
    source: str
    licence: str
    how_to_get: str
    files: tuple[str, ...]
    schema: Schema
    recipe: Mapping[str, Mapping[str, Any]]
    split: Split | None = None
    options: ReadOptions | None = None
    prepare: Callable[[Path, Path], Any] | None = None
    bundled: str | None = None
    note: str = ""

    def command(self) -> str:
        """The command that encodes a downloaded copy."""
        return f"embtrim encode FOLDER --dataset {self.name} --out data/{self.name}"


def known(name: str) -> KnownDataset:
    """The catalog entry of a name.

    Raises:
        DataError: The catalog has no such name; the message suggests the nearest one or lists all.

    Example:
        >>> known("flights").schema.label
        'late'
    """
    if name not in CATALOG:
        raise DataError(f"no dataset {name!r} in the catalog; {hint(name, CATALOG)}")
    return CATALOG[name]


def encode_known(
    name: str,
    folder: str | Path | None,
    out: str | Path,
    *,
    split: Split | str | None = None,
    seed: int = 0,
    min_count: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    engine: Engine | None = None,
    parts: bool = False,
) -> EncodedDataset:
    """Encode a downloaded copy of a known dataset.

    Args:
        name: Name of the dataset in the catalog.
        folder: Folder with the files, or the file itself if the dataset has only one; None for a bundled dataset.
        out: Folder to write.
        split: Split to use instead of the entry's. With a split by time the time column is not a field, because its
            values do not recur.
        seed: Seed of a random split.
        min_count: Least count of a value in all categorical and multi fields, instead of the entry's.
        overwrite: Replace an encoded dataset at `out`.
        progress: Show a progress bar on stderr.
        engine: Reads the files, as for `encode`.
        parts: Write parquet parts, as for `encode`.

    Raises:
        DataError: There is no such dataset, files are missing, or files have another layout.
    """
    entry = known(name)
    chosen = Split.from_text(split) if isinstance(split, str) else split or entry.split
    if split is not None and entry.split is None:
        raise DataError(f"{name} comes divided into files; it takes no split")
    schema = entry.schema
    if chosen is not None and chosen.by == "time":
        if schema.time is None:
            raise DataError(f"{name} has no time column to split by")
        schema = schema.replace(fields=tuple(f for f in schema.fields if f.raw_column != schema.time))
    if min_count is not None:
        changed = [f.replace(min_count=min_count) if f.type in ("categorical", "multi") else f for f in schema.fields]
        schema = schema.replace(fields=tuple(changed))
    paths = _find_files(entry, folder)
    settings: dict[str, Any] = {
        "out": out, "seed": seed, "overwrite": overwrite, "progress": progress, "engine": engine, "parts": parts,
    }  # fmt: skip
    if entry.prepare is not None:
        with temporary_folder(Path(out).expanduser()) as work:
            source = entry.prepare(paths[entry.files[0]].parent, work)
            # The prepared log is removed with this run, so no later run could go on with a checkpoint.
            return encode(source, schema, split=chosen, checkpoint_seconds=None, **settings)
    if entry.split is None:
        train, valid, test = (paths[file] for file in entry.files)
        return encode(train, schema, valid=valid, test=test, options=entry.options, **settings)
    return encode(paths[entry.files[0]], schema, split=chosen, options=entry.options, **settings)


def load(name_or_folder: str | Path) -> EncodedDataset:
    """Open an encoded folder, or a dataset of the catalog by name.

    A bundled dataset is encoded on first use into the cache ($EMBTRIM_CACHE, else $XDG_CACHE_HOME/embtrim, else
    ~/.cache/embtrim). The network is never used.

    Raises:
        DataError: The name is neither a folder nor a bundled dataset; the message says how to get the data.
    """
    path = Path(name_or_folder).expanduser()
    name = str(name_or_folder)
    undo_replacement(path)
    if name not in CATALOG or path.is_dir():
        return _load_folder(path, name)
    entry = CATALOG[name]
    if entry.bundled is None:
        raise DataError(
            f"{name} ({entry.title}) is not bundled; licence: {entry.licence}. Get it from {entry.source} ({entry.how_to_get}), "
            f"then run: {entry.command()}"
        )
    folder = _cache_folder() / f"{name}-{_recipe_digest(entry)}"
    if not folder.exists():
        try:
            return encode_known(name, None, folder, progress=False)
        except DataError:
            if not (folder / "meta.json").exists():
                raise  # if the folder is there, another process was faster, and its result is the same
    return EncodedDataset.load(folder)


def _load_folder(path: Path, name: str) -> EncodedDataset:
    if path.is_file():
        raise DataError(f"{path} is a file, not an encoded folder; encode it first: {_encode_command(str(path))}")
    if path.is_dir() and not (path / "meta.json").exists():
        raise DataError(
            f"{path} is not an encoded folder (it has no meta.json); if it holds raw logs, encode them first: "
            f"{_encode_command(str(path))}"
        )
    if not path.exists():
        advice = hint(name, CATALOG)
        if "://" in name or suffix_of(name) in SUFFIXES:
            advice = f"if it names a raw log, encode it first: {_encode_command(name)}"
        raise DataError(f"{name!r} is neither a folder nor a dataset of the catalog; {advice}")
    return EncodedDataset.load(path)


def _encode_command(log: str) -> str:
    """The command that encodes a log, as advice."""
    parts = [part.partition(".")[0] for part in log.split("/") if not set(part) & set("*?[:")]
    name = next(filter(None, reversed(parts)), "log")
    return f"embtrim encode {shlex.quote(log)} --label LABEL [--where RULE] --out {shlex.quote(f'data/{name}')}"


def _cache_folder() -> Path:
    stated = os.environ.get("EMBTRIM_CACHE")
    if stated:
        return Path(stated).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "embtrim"


def _recipe_digest(entry: KnownDataset) -> str:
    """A text that changes with the release, the schema, the split and the bundled file."""
    size = (BUNDLED_FOLDER / entry.bundled).stat().st_size if entry.bundled else 0
    split = None if entry.split is None else entry.split.model_dump(mode="json")
    text = json.dumps([entry.schema.model_dump(mode="json"), split, size])
    return f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _find_files(entry: KnownDataset, folder: str | Path | None) -> dict[str, Path]:
    """The entry's files in a folder, by their expected names."""
    if entry.bundled is not None and folder is None:
        return {entry.files[0]: BUNDLED_FOLDER / entry.bundled}
    if folder is None:
        raise DataError(f"{entry.name} is not bundled; get it from {entry.source} ({entry.how_to_get})")
    place = Path(folder).expanduser()
    if place.is_file() and len(entry.files) == 1:
        return {entry.files[0]: place}
    found = {}
    for name in entry.files:
        hits = [place / f"{name}{suffix}" for suffix in ("", ".gz") if (place / f"{name}{suffix}").is_file()]
        if hits:
            found[name] = hits[0]
    missing = [name for name in entry.files if name not in found]
    if missing:
        raise DataError(
            f"{place} lacks {', '.join(missing)} (also looked for .gz); {entry.name} consists of {', '.join(entry.files)}: "
            f"{entry.how_to_get}, from {entry.source}"
        )
    return found


# --- logs that are derived from the published files -------------------------------------------------------------------


def _map_chunks(
    path: Path, work: Path, change: Callable[[pl.DataFrame], pl.DataFrame], options: ReadOptions
) -> list[Path]:
    """Apply `change` to each chunk of a log and write it to `work` as parquet; the files in order."""
    parts = []
    for chunk in open_log(path, options).chunks():
        part = work / f"part-{len(parts):06}.parquet"
        change(chunk.frame).write_parquet(part)
        parts.append(part)
    return parts


def _either(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _prepare_movielens(folder: Path, work: Path) -> pl.DataFrame:
    """Join ratings with users and movies; rating 3 is dropped, and the label is rating > 3."""

    def read(name: str, *columns: str) -> pl.DataFrame:
        options = ReadOptions(format="csv", header=False, columns=columns, separator="::", encoding="latin-1")
        return pl.concat([chunk.frame for chunk in open_log(_either(folder, name), options).chunks()])

    ratings = read("ratings.dat", "user_id", "movie_id", "rating", "timestamp")
    users = read("users.dat", "user_id", "gender", "age", "occupation", "zip_code")
    movies = read("movies.dat", "movie_id", "title", "genres")
    movies = movies.select("movie_id", pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year"), "genres")
    first_rating = (
        956_703_932  # the earliest timestamp of the dataset; buckets of the seconds since then separate weeks
    )
    log = ratings.filter(pl.col("rating") != "3").with_columns(
        (pl.col("rating").cast(pl.Int8) > 3).alias("label"),
        pl.col("timestamp").cast(pl.Int64),
        (pl.col("timestamp").cast(pl.Int64) - first_rating).alias("seconds"),
    )
    log = log.join(users, on="user_id", how="left", maintain_order="left")
    return log.join(movies, on="movie_id", how="left", maintain_order="left")


def _prepare_avazu(folder: Path, work: Path) -> list[Path]:
    """Split `hour` (YYMMDDHH) into hour of the day, weekday and weekend, as BARS does."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        if "hour" not in frame.columns:
            raise DataError(f"avazu's train file has a column 'hour'; this one has {', '.join(frame.columns)}")
        date = pl.col("hour").str.head(6).str.to_date("%y%m%d")
        return frame.with_columns(
            pl.col("hour").alias("time"),
            pl.col("hour").str.tail(2).alias("hour"),
            date.dt.weekday().alias("weekday"),
            (date.dt.weekday() > 5).alias("is_weekend"),
        )

    return _map_chunks(_either(folder, "train.csv"), work, change, ReadOptions(format="csv"))


def _prepare_kdd12(folder: Path, work: Path) -> list[Path]:
    """Set the label to "clicked at least once" and join gender and age, which are missing for unknown users."""
    columns = ("user_id", "gender", "age")
    profile_options = ReadOptions(format="csv", header=False, columns=columns, separator="\t")
    profile = open_log(_either(folder, "userid_profile.txt"), profile_options)
    users = pl.concat([chunk.frame for chunk in profile.chunks()])

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        clicked = (pl.col("click").cast(pl.Int64) > 0).alias("label")
        return frame.with_columns(clicked).join(users, on="user_id", how="left", maintain_order="left")

    log_columns = ("click", "impression", *_KDD12_FIELDS[:-2])
    options = ReadOptions(format="csv", header=False, columns=log_columns, separator="\t")
    return _map_chunks(_either(folder, "training.txt"), work, change, options)


# --- the entries ------------------------------------------------------------------------------------------------------


def _categorical(*names: str, min_count: int = 1) -> tuple[FieldSpec, ...]:
    return tuple(FieldSpec(name=name, min_count=min_count) for name in names)


def _numeric(transform: str, *names: str, min_count: int = 1) -> tuple[FieldSpec, ...]:
    return tuple(FieldSpec(name=name, type="numeric", transform=transform, min_count=min_count) for name in names)


_CRITEO_COLUMNS = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
_KDD12_FIELDS = (
    "display_url",
    "ad_id",
    "advertiser_id",
    "depth",
    "position",
    "query_id",
    "keyword_id",
    "title_id",
    "description_id",
    "user_id",
    "gender",
    "age",
)
_AVAZU_FIELDS = (
    *("hour", "weekday", "is_weekend", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id"),
    *("app_domain", "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
_MOVIELENS_TERMS = "GroupLens terms: research use, no redistribution without permission"

_ENTRIES = (
    KnownDataset(
        name="flights",
        title="US domestic flights, January 2024: will it arrive 15 or more minutes late? (bundled sample)",
        source="https://www.transtats.bts.gov/",
        licence="public domain (work of the US government)",
        how_to_get="nothing to get: every third flight of the month ships with embtrim",
        files=("flights_2024_01.parquet",),
        schema=Schema(
            label="late",
            time="flight_date",
            fields=(
                *_categorical("flight_date", "day_of_week", "marketing_carrier", "operating_carrier"),
                *_categorical("tail_number", "flight_number", min_count=2),
                *_categorical("origin", "origin_state", "dest", "dest_state"),
                *_numeric("quantile:96", "scheduled_departure", "scheduled_arrival"),
                *_numeric("quantile:64", "scheduled_minutes", "distance"),
            ),
        ),
        recipe={
            "model": {"embedding_dim": 16, "hidden_units": [128, 128], "dropout": 0.1, "batch_norm": True},
            "train": {"batch_size": 2048, "learning_rate": 1e-3, "epochs": 10, "embedding_l2": 0.3},
        },
        split=Split(),
        bundled="flights_2024_01.parquet",
        note="No click log, but of the same shape. With split='time:8:1:1' the weather drifts and flight_date is not a field.",
    ),
    KnownDataset(
        name="criteo",
        title="Criteo display advertising (Kaggle 2014), 45.8M rows, 39 fields",
        source="https://www.kaggle.com/c/criteo-display-ad-challenge",
        licence="Criteo's terms of use: research, non-commercial, no redistribution",
        how_to_get="dac.tar.gz; unpack train.txt",
        files=("train.txt",),
        schema=Schema(
            label="label",
            fields=(
                *_numeric("log2", *_CRITEO_COLUMNS[1:14], min_count=10),
                *_categorical(*_CRITEO_COLUMNS[14:], min_count=10),
            ),
        ),
        recipe=_LARGE_RECIPE,
        split=Split(),
        options=ReadOptions(format="csv", header=False, columns=_CRITEO_COLUMNS, separator="\t"),
        note="Integers in the bins of the challenge's winners; use min_count=2 for a sample of less than a million rows.",
    ),
    KnownDataset(
        name="avazu",
        title="Avazu click-through rate prediction (Kaggle 2014), 40.4M rows, 24 fields",
        source="https://www.kaggle.com/c/avazu-ctr-prediction",
        licence="competition rules: for use within the competition and research",
        how_to_get="train.gz, which is train.csv gzipped: name it train.csv.gz",
        files=("train.csv",),
        schema=Schema(label="click", time="time", fields=_categorical(*_AVAZU_FIELDS, min_count=2)),
        recipe=_LARGE_RECIPE,
        split=Split(),
        prepare=_prepare_avazu,
        note="The row id is not a field; hour becomes hour of the day, weekday and weekend.",
    ),
    KnownDataset(
        name="frappe",
        title="Frappe app usage in context, BARS split frappe_x1, 288,609 rows, 10 fields",
        source="https://huggingface.co/datasets/reczoo/Frappe_x1",
        licence="research use; cite Baltrunas et al., arXiv 1505.03014",
        how_to_get="train.csv, valid.csv and test.csv",
        files=("train.csv", "valid.csv", "test.csv"),
        schema=Schema(
            label="label",
            fields=_categorical(
                *("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
            ),
        ),
        recipe=_FRAPPE_RECIPE,
    ),
    KnownDataset(
        name="movielens-1m",
        title="MovieLens-1M ratings as published, 739,012 rows after dropping rating 3, 9 fields, genres multi-valued",
        source="https://grouplens.org/datasets/movielens/1m/",
        licence=_MOVIELENS_TERMS,
        how_to_get="ml-1m.zip; unpack ratings.dat, users.dat and movies.dat",
        files=("ratings.dat", "users.dat", "movies.dat"),
        schema=Schema(
            label="label",
            time="timestamp",
            fields=(
                *_categorical("user_id", "movie_id"),
                FieldSpec(name="timestamp", column="seconds", type="numeric", transform="log2"),
                *_categorical("gender", "age", "occupation", "zip_code", "year"),
                FieldSpec(name="genres", type="multi", separator="|", max_len=6),
            ),
        ),
        recipe=_LARGE_RECIPE,
        split=Split(),
        prepare=_prepare_movielens,
        note="Label: rating above 3. timestamp is bins of seconds since the first rating.",
    ),
    KnownDataset(
        name="movielens-1m-ctr",
        title="MovieLens-1M as a prepared CTR table, 739,012 rows, 9 fields, split into files",
        source="https://grouplens.org/datasets/movielens/1m/",
        licence=_MOVIELENS_TERMS,
        how_to_get="ctr_train.csv, ctr_valid.csv and ctr_test.csv, prepared from ml-1m.zip",
        files=("ctr_train.csv", "ctr_valid.csv", "ctr_test.csv"),
        schema=Schema(
            label="label",
            fields=_categorical(
                *("user_id", "movie_id", "timestamp", "gender", "age", "occupation", "zip_code", "year", "genre")
            ),
        ),
        recipe=_LARGE_RECIPE,
        note="All values are ids already; genre is the id of the whole combination.",
    ),
    KnownDataset(
        name="movielenslatest_x1",
        title="MovieLens tags, BARS split movielenslatest_x1, 2,006,859 rows, 3 fields",
        source="https://huggingface.co/datasets/reczoo/MovielensLatest_x1",
        licence=_MOVIELENS_TERMS,
        how_to_get="train.csv, valid.csv and test.csv",
        files=("train.csv", "valid.csv", "test.csv"),
        schema=Schema(label="label", fields=_categorical("user_id", "item_id", "tag_id")),
        recipe={"model": _FRAPPE_RECIPE["model"], "train": {**_FRAPPE_RECIPE["train"], "embedding_l2": 0.01}},
    ),
    KnownDataset(
        name="kdd12",
        title="KDD Cup 2012 track 2 (Tencent soso.com search ads), 149.6M rows, 12 fields",
        source="https://www.kaggle.com/c/kddcup2012-track2",
        licence="competition rules: research use",
        how_to_get="track2.zip; unpack training.txt and userid_profile.txt",
        files=("training.txt", "userid_profile.txt"),
        schema=Schema(label="label", fields=_categorical(*_KDD12_FIELDS, min_count=10)),
        recipe=_LARGE_RECIPE,
        split=Split(),
        prepare=_prepare_kdd12,
        note="One row is one ad shown to one user for one query; label: clicked at least once. Impressions are not counted.",
    ),
)
CATALOG: Mapping[str, KnownDataset] = {entry.name: entry for entry in _ENTRIES}
