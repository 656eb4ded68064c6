"""Ray and Spark write the bytes that one process writes, though a worker is killed; run where their packages are installed."""

import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from embtrim.data.encoding import encode
from embtrim.engines import Ray, Spark
from embtrim.schema import FieldSpec, Schema
from tests.engines.tasks import die_once

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
SCHEMA = Schema(
    label="y",
    fields=(
        FieldSpec(name="user", min_count=2),
        FieldSpec(name="age", type="numeric", transform="quantile:5"),
        FieldSpec(name="size", type="dense", transform="standard"),
    ),
)


@pytest.fixture
def workers(monkeypatch):
    """The environment of workers, which import this checkout and its tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    monkeypatch.setenv("POLARS_MAX_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)


@pytest.fixture
def ray_engine(workers):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield Ray()
    ray.shutdown()


@pytest.fixture
def spark_engine(workers):
    sessions = pytest.importorskip("pyspark.sql").SparkSession.builder.master("local[2,4]")
    session = sessions.config("spark.ui.enabled", "false").config("spark.driver.host", "127.0.0.1").getOrCreate()
    yield Spark(session)
    session.stop()


@pytest.mark.parametrize("name", ["ray_engine", "spark_engine"])
def test_a_killed_worker_changes_nothing(name, request, tmp_path):
    engine = request.getfixturevalue(name)

    class Dying:
        @contextmanager
        def started(self):
            with engine.started() as run:
                yield lambda function, items: run(partial(die_once, tmp_path / "marker", function), items)

    (tmp_path / "log").mkdir()
    for i in range(5):
        rows = [((i + j) % 2, f"u{(i + 3) * j % 40}", j * 0.7, j % (5 + i)) for j in range(200)]
        frame = pl.DataFrame(rows, schema=["y", "user", "age", "size"], orient="row")
        frame.write_parquet(tmp_path / "log" / f"{i}.parquet")
    alone = encode(tmp_path / "log", SCHEMA, out=tmp_path / "alone", progress=False)
    found = encode(tmp_path / "log", SCHEMA, out=tmp_path / "found", progress=False, engine=Dying())
    assert (tmp_path / "marker").exists()
    assert found.schema == alone.schema
    for path in (tmp_path / "alone").rglob("*"):
        if path.is_file() and path.name != "meta.json":
            assert (tmp_path / "found" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes(), path
