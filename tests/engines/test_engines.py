"""Engines: every item gets its result once, whatever becomes of the workers."""

import sys
from functools import partial

import pytest

from embtrim.engines import Engine, Local, Ray, Spark
from embtrim.errors import ConfigError, EmbtrimError, UnreachableError
from tests.engines.tasks import die, die_at_three, double


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_item_done_again(tmp_path):
    with Local(jobs=2).started() as run:
        found = list(run(partial(die_at_three, tmp_path / "marker"), range(6)))
        assert (tmp_path / "marker").exists()
        assert sorted(found) == [(i, 2 * i) for i in range(6)]
        assert sorted(run(double, [5, 7])) == [(0, 10), (1, 14)]
        with pytest.raises(UnreachableError, match=r"worker processes died 3 times in a row .* with fewer jobs"):
            list(run(die, [1]))


def test_one_job_is_this_process():
    with Local(jobs=1).started() as run:
        assert list(run(lambda item: item + 1, [1, 2])) == [(0, 2), (1, 3)]


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2", None])
def test_jobs_are_a_number_of_processes(jobs):
    with pytest.raises(ConfigError, match=r"Local: jobs, given .*number of worker processes"):
        Local(jobs=jobs)


@pytest.mark.parametrize(("engine", "module", "extra"), [(Ray(), "ray", "ray"), (Spark(None), "pyspark.sql", "spark")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, engine, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert isinstance(engine, Engine)
    with pytest.raises(EmbtrimError, match=rf"needs {module} .*pip install 'embtrim\[{extra}\]'"), engine.started():
        pass


def test_spark_takes_a_session():
    pytest.importorskip("pyspark")
    with pytest.raises(EmbtrimError, match=r"takes a pyspark.sql.SparkSession.* given a builtins.str"):
        with Spark("local[2]").started():
            pass
