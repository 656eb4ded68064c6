"""Two sets made of MovieLens-1M that behave otherwise: a tenth of its training rows, and its first month.

    python benchmarks/movielens_parts.py DATA/ml-1m OUT

OUT/tenth has every tenth training row, chosen at random, and all validation and test rows: most ids are seen one to three
times. OUT/month has the ratings of the first 31 days, split by time 8:1:1: what is popular changes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import embtrim
from embtrim.data.catalog import known
from embtrim.data.dataset import SPLITS

SEED = 7
MONTH_SECONDS = 31 * 86_400


def encode_tenth(source: Path, out: Path) -> None:
    """Encode the files of ready-made splits, with a tenth of the training rows."""
    parts = {name: pl.read_csv(source / f"ctr_{name}.csv.gz") for name in SPLITS}
    count = len(parts["train"])
    chosen = np.sort(np.random.default_rng(SEED).choice(count, count // 10, replace=False))
    parts["train"] = parts["train"][chosen]
    fields = tuple(embtrim.FieldSpec(name=name) for name in parts["train"].columns if name != "label")
    with tempfile.TemporaryDirectory() as folder:
        for name, frame in parts.items():
            frame.write_parquet(Path(folder) / f"{name}.parquet")
        train, valid, test = (Path(folder) / f"{name}.parquet" for name in parts)
        embtrim.encode(train, embtrim.Schema(label="label", fields=fields), valid=valid, test=test, out=out)


def encode_month(source: Path, out: Path) -> None:
    """Encode the ratings of the first month, with the hour of the day as a field."""
    prepare = known("movielens-1m").prepare
    assert prepare is not None
    log = prepare(source, source)
    log = log.filter(pl.col("timestamp") < pl.col("timestamp").min() + MONTH_SECONDS)
    log = log.with_columns(hour=pl.col("timestamp") // 3_600 % 24)
    names = ("user_id", "movie_id", "hour", "gender", "age", "occupation", "zip_code", "year")
    genres = embtrim.FieldSpec(name="genres", type="multi", separator="|", max_len=6)
    fields = (*(embtrim.FieldSpec(name=name) for name in names), genres)
    embtrim.encode(log, embtrim.Schema(label="label", time="timestamp", fields=fields), split="time:8:1:1", out=out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of MovieLens-1M, with the files of ready-made splits")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    encode_tenth(given.source, given.out / "tenth")
    encode_month(given.source, given.out / "month")
