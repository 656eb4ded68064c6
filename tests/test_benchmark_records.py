"""The published tables are those of the published records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pack_records
from embtrim.experiments.grid import read_skipped
from embtrim.experiments.records import RECORDS_FILE, read_records
from embtrim.reports.comparison_page import write_comparison
from tests.reports.test_report import record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PUBLISHED = sorted(path.parent.name for path in RESULTS.glob(f"*/{RECORDS_FILE}"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_come_from_the_records(name: str, tmp_path: Path) -> None:
    folder = RESULTS / name
    write_comparison(read_records(folder), tmp_path, read_skipped(folder))
    assert (tmp_path / "README.md").read_text("utf-8") == (folder / "README.md").read_text("utf-8")


def test_there_are_records_of_three_data_sets() -> None:
    assert {"flights", "frappe", "movielens"} <= set(PUBLISHED)


def test_packing_changes_no_record(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "packed"
    for name, seed in (("b", 0), ("a", 1), ("a-b", 0)):
        record("full", seed, data={"fingerprint": "abc", "folder": "ä\u2028", "num_rows": {}}).save(
            run / "records" / f"{name}.json"
        )
    (run / "skipped.json").write_text("[]")
    pack_records.pack_records(run, out)
    assert sorted(path.name for path in out.iterdir()) == [RECORDS_FILE, "skipped.json"]
    files = sorted((run / "records").glob("*.json"))
    lines = (out / RECORDS_FILE).read_text("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [json.loads(file.read_text("utf-8")) for file in files]
    assert read_records(out) == read_records(run)
