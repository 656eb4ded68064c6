"""Published records: one file with a record a line is read as the files of a run are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embtrim.errors import DataError
from embtrim.experiments.grid import Skipped, cell_of, read_skipped, record_path, write_skipped
from embtrim.experiments.records import RECORDS_FILE, read_records
from tests.cli.workshop import call
from tests.reports.test_report import record


@pytest.fixture
def grid_folder(tmp_path: Path) -> Path:
    """A comparison's folder with four records and two skipped cells, one of which has been made since."""
    out = tmp_path / "grid"
    for one in (record("full", 0), record("full", 1), record("sseds", 0), record("a name with\u2028signs", 1)):
        one = one if one.variant == "full" else one.replace(method="sseds")
        one.save(record_path(out, cell_of(one.model, one.seed, one.variant, one.budget)))
    write_skipped(out, [skipped("sseds", 0), skipped("sseds", 1)])
    return out


def skipped(label: str, seed: int) -> Skipped:
    return Skipped(model="deepfm", label=label, budget="10%", seed=seed, reason="too small")


@pytest.fixture
def packed(grid_folder: Path, tmp_path: Path) -> Path:
    """A folder with the same records, one a line, and the same skipped cells."""
    out = tmp_path / "packed"
    out.mkdir()
    values = [json.loads(path.read_text("utf-8")) for path in sorted((grid_folder / "records").glob("*.json"))]
    lines = "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values)
    (out / RECORDS_FILE).write_text(lines, "utf-8")
    shutil.copyfile(grid_folder / "skipped.json", out / "skipped.json")
    return out


def test_records_are_those_of_the_files(grid_folder: Path, packed: Path) -> None:
    assert len(read_records(packed)) == 4
    assert read_records(packed) == read_records(grid_folder)
    assert read_skipped(packed) == read_skipped(grid_folder) == [skipped("sseds", 1)]


def test_report_is_the_same_of_either(grid_folder: Path, packed: Path) -> None:
    done = [call("report", folder) for folder in (grid_folder, packed)]
    assert [one.code for one in done] == [0, 0]
    assert done[0].out == done[1].out
    for name in ("README.md", "report.html"):
        assert (grid_folder / name).read_bytes() == (packed / name).read_bytes()


def test_damaged_lines_are_named(packed: Path) -> None:
    path = packed / RECORDS_FILE
    lines = path.read_text("utf-8").split("\n")[:-1]

    def with_line(number: int, text: str) -> None:
        path.write_text("\n".join([*lines[: number - 1], text, *lines[number:]]), "utf-8")

    with_line(3, lines[2][:100])
    with pytest.raises(DataError, match=r"records\.jsonl line 3 is not a run record \("):
        read_records(packed)
    with_line(2, json.dumps({**json.loads(lines[1]), "record_version": 99}))
    with pytest.raises(DataError, match=r"records\.jsonl line 2 is not .* version 99, this release reads 1"):
        read_records(packed)
    with_line(4, json.dumps({key: value for key, value in json.loads(lines[3]).items() if key != "seed"}))
    with pytest.raises(DataError, match=r"records\.jsonl line 4 is a damaged run record: .*seed"):
        read_records(packed)
    with pytest.raises(DataError, match=r"records\.jsonl line 4"):
        read_skipped(packed)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        read_records(packed)
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"records\.jsonl cannot be read"):
        read_records(packed)


def test_a_folder_with_both_is_rejected(grid_folder: Path, packed: Path) -> None:
    (packed / RECORDS_FILE).rename(grid_folder / RECORDS_FILE)
    with pytest.raises(DataError, match=r"has both records/\*\.json and records\.jsonl; remove one of them"):
        read_records(grid_folder)
