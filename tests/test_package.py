"""What the wheel and the source archive hold."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_package_alone_and_stays_small(tmp_path: Path) -> None:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"embtrim"}
    assert {"embtrim/py.typed", "embtrim/reports/templates/run.html.j2", "embtrim/reports/templates/page.css"} <= set(
        names
    )
    assert Path(built).stat().st_size < 3_000_000


def test_source_archive_leaves_the_evidence_out(tmp_path: Path) -> None:
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(built) as archive:
        names = [PurePosixPath(name).relative_to(PurePosixPath(name).parts[0]) for name in archive.getnames()]
    assert not [name for name in names if name.parts[:1] == ("benchmarks",) or name.suffix == ".jsonl"]
    assert {"src", "tests", "docs", "pyproject.toml"} <= {name.parts[0] for name in names}
    assert Path(built).stat().st_size < 3_300_000
