"""Write the records of a run or a comparison, one file each, into one file with a record a line.

    python benchmarks/pack_records.py runs/compare-frappe benchmarks/results/frappe

`embtrim report` reads the second folder as it reads the first. The list of skipped cells goes along, if there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from embtrim.experiments.records import RECORDS_FILE, read_records
from embtrim.system.files import write_then_rename


def pack_records(run: Path, out: Path) -> None:
    """Write `out`/records.jsonl from `run`/records/*.json, sorted by file name; no number changes.

    Raises:
        DataError: `run` holds no records, or one is damaged.
    """
    read_records(run)
    # Lines are made from the JSON itself: a record of an earlier release keeps its own keys.
    values = [json.loads(path.read_text("utf-8")) for path in sorted((run / "records").glob("*.json"))]
    lines = "".join(f"{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n" for value in values)
    write_then_rename(out / RECORDS_FILE, lambda file: file.write(lines.encode()))
    if (run / "skipped.json").exists():
        shutil.copyfile(run / "skipped.json", out / "skipped.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `embtrim run` or `embtrim compare` wrote")
    parser.add_argument("out", type=Path, help="folder for records.jsonl; another one than RUN")
    given = parser.parse_args()
    pack_records(given.run, given.out)
