"""The table and the page, from records with known numbers."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from embtrim.errors import DataError
from embtrim.experiments.records import RunRecord, read_records
from embtrim.reports import page as reports_page
from embtrim.reports.numbers import format_bytes, format_count, format_seconds, format_values
from embtrim.reports.run_figures import (
    auc_by_decile,
    bytes_by_table,
    calibration_figure,
    difference_intervals,
    loss_against_bytes,
)
from embtrim.reports.run_page import render_page, write_report
from embtrim.reports.run_tables import result_rows, terminal_table
from embtrim.reports.variants import auc_differences, variants_of

HOSTILE = """</script><script>window.hacked=1</script><img src=x onerror="hack()">'"&<b>[red]"""


def record(variant: str = "full", seed: int = 0, auc: float = 0.75, **changes: Any) -> RunRecord:
    full = variant == "full"
    values: dict[str, Any] = {
        "variant": variant,
        "model": "deepfm",
        "hparams": {"embedding_dim": 8},
        "train": {"epochs": 2},
        "budget": None if full else "10%",
        "init": None if full else "scratch",
        "seed": seed,
        "data": {"fingerprint": "abc", "folder": "logs", "num_rows": {"train": 80, "valid": 10, "test": 10}},
        "valid": {"auc": auc, "logloss": 0.5, "calibration": 1.0},
        "test": {
            "auc": auc,
            "logloss": 0.5,
            "calibration": 1.01,
            "auc_by_decile": [[d, 1, 2.0 * d, None if d == 3 else auc - 0.01 * d] for d in range(1, 11)],
        },
        "num_params": 8000 if full else 800,
        "num_full_params": 8000,
        "num_first_order_params": 1000,
        "table_bytes": 36_000 if full else 7_200,
        "model_params": 20_000,
        "bundle_bytes": 1_234_567 if full else 100_000,
        "widths": {"user": 8, "item": 8} if full else {"user": 1, "item": 0},
        "full_width": 8,
        "kept_rows": {"user": 600, "item": 400},
        "num_rows": {"user": 600, "item": 400},
        "search_seconds": 0.0 if full else 1.5,
        "search_epochs": 0.0 if full else 0.5,
        "train_seconds": 6.0,
        "epochs": 2,
        "rows_per_second": 1234.5,
        "precision": "fp32",
        "peak_memory_bytes": 300_000_000,
        "verification": None if full else {"max_difference": 2e-16, "num_rows": 10, "tolerance": 1e-9, "passed": True},
        "versions": {"embtrim": "0.1.0"},
        "hardware": {"processor": "abacus"},
    }
    return RunRecord.parse({**values, **changes})


@pytest.fixture
def two_seeds() -> list[RunRecord]:
    return [
        record("full", 0, 0.75), record("sseds", 0, 0.74), record("uniform", 0, 0.70),
        record("full", 1, 0.76), record("sseds", 1, 0.76), record("uniform", 1, 0.72),
    ]  # fmt: skip


class Page(HTMLParser):
    """Elements, scripts and text of a page as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self._script = dict(attrs).get("id") or f"script{self.tags.count('script')}"

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def records(self) -> list[dict[str, Any]]:
        """The records that the page carries."""
        return self.unpacked("records")

    def unpacked(self, name: str) -> Any:
        """What a script of the page holds."""
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[name])))


def rendered(records: list[RunRecord], width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(terminal_table(records))
    return console.export_text()


def test_numbers_as_text() -> None:
    assert [format_bytes(n) for n in (None, 0, 999, 1000, 999_949, 999_950, 1_234_567, 5e9, 7e15)] == [
        "-", "0 B", "999 B", "1.0 KB", "999.9 KB", "1.0 MB", "1.2 MB", "5.0 GB", "7000.0 TB",
    ]  # fmt: skip
    assert [format_count(n) for n in (None, 0, 1234567, 1234.6)] == ["-", "0", "1,234,567", "1,235"]
    assert [format_seconds(s) for s in (None, 0, 0.0123, 0.5, 59.94, 59.96, 75.2, 3599.6, 7260)] == [
        "-", "0 ms", "12 ms", "0.5 s", "59.9 s", "1 min 0 s", "1 min 15 s", "1 h 0 min", "2 h 1 min",
    ]  # fmt: skip
    assert format_values([0.75]) == "0.7500"
    assert format_values([0.75, 0.76]) == "0.7550 ± 0.0071"
    assert format_values([None, 0.01], signed=True) == "+0.0100"
    assert format_values([None, float("nan")]) == "-"


def test_table_by_hand(two_seeds: list[RunRecord]) -> None:
    variants = variants_of(two_seeds)
    assert [v.label for v in variants] == ["full", "sseds 10%", "uniform 10%"]
    rows = dict(result_rows(variants))
    # sd of (.75, .76) = .01 / sqrt 2; differences of sseds: -.01 and 0, of uniform: -.05 and -.04.
    assert rows["test AUC"] == ["0.7550 ± 0.0071", "0.7500 ± 0.0141", "0.7100 ± 0.0141"]
    assert rows["  difference to full"] == ["-", "-0.0050 ± 0.0071", "-0.0450 ± 0.0071"]
    assert rows["embedding params"] == ["8,000", "800", "800"]
    assert rows["  of the full tables"] == ["100.0%", "10.0%", "10.0%"]
    assert rows["table bytes"] == ["36.0 KB", "7.2 KB", "7.2 KB"]
    assert rows["bundle on disk"] == ["1.2 MB", "100.0 KB", "100.0 KB"]
    assert rows["peak memory"] == ["300.0 MB"] * 3
    assert rows["search time"] == ["-", "1.5 s", "1.5 s"]
    assert rows["training time"] == ["6.0 s"] * 3
    assert rows["seeds"] == ["2", "2", "2"]
    text = rendered(two_seeds)
    for name, cells in rows.items():
        assert all(part in text for part in (name, *cells))
    assert "deepfm on logs" in text


def test_bits_have_a_row_where_there_are_fewer_than_32(two_seeds: list[RunRecord]) -> None:
    assert "bits per value" not in dict(result_rows(variants_of(two_seeds)))
    quantised = [r.replace(bits="mixed" if r.seed else 8) if r.variant == "sseds" else r for r in two_seeds]
    assert dict(result_rows(variants_of(quantised)))["bits per value"] == ["32", "8, mixed", "32"]


def test_table_fits_eighty_columns(two_seeds: list[RunRecord]) -> None:
    narrow = rendered(two_seeds, width=80)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    assert "  difference to full" in narrow


def test_what_is_not_known_is_a_dash() -> None:
    alone = record("sseds", bundle_bytes=0, peak_memory_bytes=None, test={})
    rows = dict(result_rows(variants_of([alone])))
    for name in ("test AUC", "  difference to full", "calibration", "bundle on disk", "peak memory"):
        assert rows[name] == ["-"]
    assert auc_differences(variants_of([alone])[0]) == [None]
    variants = variants_of([alone])
    figures = difference_intervals, loss_against_bytes, bytes_by_table, auc_by_decile, calibration_figure
    assert not any(figure(variants)["series"] for figure in figures)
    assert Page(render_page([alone])).text.count("hold no data for this figure") == 5


def test_budgets_and_settings_tell_variants_apart() -> None:
    def labels(*records: RunRecord) -> list[str]:
        return [v.label for v in variants_of(records)]

    several = [record("sseds", s, budget=b, table_bytes=n) for b, n in (("10%", 10), ("20%", 20)) for s in (0, 1)]
    assert labels(record(), *several) == ["full", "sseds 20%", "sseds 10%"]
    # --max-loss finds another budget for each seed: still one variant.
    assert labels(record("sseds", 0, budget="7%"), record("sseds", 1, budget="9%")) == ["sseds"]
    signed = record("sseds", search={"score": "signed"})
    assert labels(record("sseds"), signed) == ["sseds 10%", "sseds 10% score=signed"]
    other = record(data={"fingerprint": "xyz", "folder": "more", "num_rows": {}}, auc=0.5)
    assert labels(record(), other) == ["logs deepfm full", "more deepfm full"]
    # Compared with the full model of its own data.
    compact = record("sseds", data=other.data, auc=0.49)
    assert auc_differences(variants_of([record(), other, compact])[-1]) == pytest.approx([-0.01])


def test_page_holds_everything(two_seeds: list[RunRecord], tmp_path: Path) -> None:
    write_report(two_seeds, tmp_path / "new" / "report.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    page = (tmp_path / "new" / "report.html").read_text("utf-8")
    found = Page(page)
    stored = found.records()
    assert sorted(map(json.dumps, stored)) == sorted(json.dumps(r.model_dump(mode="json")) for r in two_seeds)
    for words in ("0.7500 ± 0.0141", "-0.0050 ± 0.0071", "36.0 KB", "sseds 10%", "2.0e-16", "1e-09", "abacus", "embtrim 0.1.0",
                  "0.50", "embedding_dim", "schema abc", "train 80"):  # fmt: skip
        assert words in found.text, words

    (heat,) = found.unpacked("heat")
    assert heat["rows"] == ["user", "item"]
    assert [(group["name"], group["columns"]) for group in heat["groups"]] == [
        (name, ["full", "sseds 10%", "uniform 10%"]) for name in ("columns", "rows of its table")
    ]
    assert heat["groups"][0]["values"] == [[8, 1, 1], [8, 0, 0]]
    charts = [value for name, value in found.attributes if name == "class" and value and value.split()[0] == "chart"]
    assert len(charts) == 4, "records of earlier releases do not tell the bytes of tables"


def shown(figure: dict[str, Any]) -> dict[str, list[str]]:
    """What pointing at each point of a figure tells, by series."""
    found: dict[str, list[str]] = {}
    for series in figure["series"]:
        found.setdefault(series["name"], []).extend(point["text"] for point in series["points"])
    return found


def test_differences_have_intervals_of_students_t(two_seeds: list[RunRecord]) -> None:
    figure = difference_intervals(variants_of(two_seeds))
    # Mean of (-.01, 0) is -.005, and 12.706 x .00707 / sqrt 2 = .0635.
    assert shown(figure)["sseds 10%"] == [
        "sseds 10%, seed 0: -0.0100", "sseds 10%, seed 1: +0.0000", "sseds 10%: -0.0050, 95% interval -0.0685 to +0.0585",
    ]  # fmt: skip
    assert [len(series["whiskers"]) for series in figure["series"]] == [0, 1, 0, 1]
    one = difference_intervals(variants_of(two_seeds[:3]))
    assert shown(one)["sseds 10%"] == ["sseds 10%: -0.0100, one seed"]
    assert not any(series["whiskers"] for series in one["series"])


def test_losses_are_predicted_and_measured(two_seeds: list[RunRecord]) -> None:
    guided = [r.replace(predicted_loss=0.003) if r.variant == "sseds" else r for r in two_seeds]
    figure = loss_against_bytes(variants_of(guided), {"widths": [(9e3, 0.1)], "all": [(7e3, 0.002), (3e3, 0.004)]})
    texts = shown(figure)
    assert texts["sseds 10%"][-1] == "sseds 10%: 7.2 KB, measured loss +0.00500 ± 0.00707"
    assert texts["sseds 10%, predicted"] == ["sseds 10%: predicted loss +0.00300"]
    assert [point["hollow"] for series in figure["series"] for point in series["points"]].count(True) == 1
    assert texts["predicted curve"][1] == "curve, all: 3.0 KB, predicted loss +0.00400"
    assert [label["name"] for label in figure["labels"]] == [
        "uniform 10%", "sseds 10%", "predicted curve", "sseds 10%, predicted",
    ], "from top to bottom"  # fmt: skip
    assert [(item["name"], item["symbol"] == "", item["hollow"]) for item in figure["legend"]] == [
        ("predicted curve", True, False), ("sseds 10%", False, False), ("sseds 10%, predicted", False, True),
        ("uniform 10%", False, False),
    ]  # fmt: skip
    assert "predicted curve" not in shown(loss_against_bytes(variants_of(guided)))


def test_bytes_of_tables_before_and_after(two_seeds: list[RunRecord]) -> None:
    tables = {f"t{k:02}": 4000 - k for k in range(25)}
    sized = [r.replace(bytes_by_table=tables if r.variant == "full" else {"t00": 40 + r.seed}) for r in two_seeds]
    figure = bytes_by_table(variants_of(sized))
    texts = shown(figure)
    assert set(texts) == {"full", "sseds 10%"}, "without controls"
    assert texts["full"][0] == "t00, full: 4.0 KB"
    assert len(texts["full"]) == 20
    assert texts["sseds 10%"][:2] == ["t00, sseds 10%: 40 B", "t01, sseds 10%: 0 B"]
    assert [text for _, text in figure["y_ticks"]][-1] == "5 smaller tables"
    assert [text for _, text in figure["row_texts"]][-1] == "19.9 KB → 0 B"


def test_what_is_empty_is_left_out(two_seeds: list[RunRecord]) -> None:
    empty = [r.replace(widths={}, kept_rows={}, num_rows={}, bytes_by_table={"a": 0}) for r in two_seeds]
    assert shown(bytes_by_table(variants_of(empty)))["full"] == ["a, full: 0 B"]
    assert "largest tables first" in render_page(empty)
    assert "largest tables first" not in render_page([r.replace(bytes_by_table=None) for r in empty])


def test_deciles_and_calibration(two_seeds: list[RunRecord]) -> None:
    texts = shown(auc_by_decile(variants_of(two_seeds)))
    assert len(texts["full"]) == 9, "a group without an AUC has no point"
    assert texts["full"][0] == "full, group 1: AUC 0.7450; rarest value seen 2 times, 1 rows"
    assert shown(calibration_figure(variants_of(two_seeds)))["full"] == [
        "full, seed 0: 1.010", "full, seed 1: 1.010", "full: 1.010",
    ]  # fmt: skip


def test_page_works_offline(two_seeds: list[RunRecord]) -> None:
    page = render_page(two_seeds)
    found = Page(page)
    assert found.tags.count("script") == 3  # records, heat maps, the few lines that show them
    assert len(page) < 60_000
    assert not {"link", "img", "iframe", "base", "object"} & set(found.tags)
    assert all(name != "src" and (name != "href" or value.startswith("#")) for name, value in found.attributes)
    assert any(name == "content" and "default-src 'none'" in (value or "") for name, value in found.attributes)


def test_records_that_are_too_large_are_left_out(two_seeds: list[RunRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports_page, "MOST_PACKED", 100)
    found = Page(render_page(two_seeds))
    assert "records" not in found.scripts
    assert (
        "computed from 6 records, which are too large for a page; embtrim report RUN --json prints them" in found.text
    )


def test_hostile_names_stay_text(two_seeds: list[RunRecord]) -> None:
    hostile = [
        r.replace(
            widths={HOSTILE: 1, "item": 2},
            bytes_by_table={HOSTILE: 400, HOSTILE + "2": 300},
            kept_rows={HOSTILE: 1},
            data={**r.data, "folder": HOSTILE},
            hparams={HOSTILE: 1},
            search={HOSTILE: HOSTILE},
            precision=HOSTILE,
        )
        for r in two_seeds
    ]
    plain = render_page([r.replace(bytes_by_table={"user": 400, "item": 300}) for r in two_seeds])
    found = Page(render_page(hostile))
    assert found.tags.count("script") == 3
    assert set(found.tags) == set(Page(plain).tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert HOSTILE in found.text
    assert HOSTILE in found.records()[0]["widths"]
    assert found.unpacked("heat")[0]["rows"][0] == HOSTILE
    tips = [value for name, value in found.attributes if name == "data-tip"]
    assert f"{HOSTILE}, full: 400 B" in tips, "names that are cut where they head a row are whole elsewhere"
    assert HOSTILE[:20] in rendered(hostile)


def test_records_are_read_and_faults_named(tmp_path: Path, two_seeds: list[RunRecord]) -> None:
    for number, one in enumerate(two_seeds):
        one.save(tmp_path / "run" / "records" / f"{number}.json")
    assert read_records(tmp_path / "run") == two_seeds
    assert read_records(tmp_path / "run" / "records") == two_seeds
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read_records(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no records"):
        read_records(tmp_path / "empty")
    with pytest.raises(DataError, match="no records to report"):
        render_page([])
    newer = {**two_seeds[0].model_dump(mode="json"), "record_version": 99}
    (tmp_path / "run" / "records" / "0.json").write_text(json.dumps(newer))
    with pytest.raises(DataError, match="version 99, this release reads 1"):
        read_records(tmp_path / "run")
    del newer["seed"]
    (tmp_path / "run" / "records" / "0.json").write_text(json.dumps({**newer, "record_version": 1}))
    with pytest.raises(DataError, match=r"0.json is a damaged run record: .*seed"):
        read_records(tmp_path / "run")


def test_old_page_survives_a_failed_write(
    two_seeds: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr("os.replace", _fail)
    with pytest.raises(OSError, match="no space"):
        write_report(two_seeds, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def _fail(*_: object) -> None:
    raise OSError(28, "no space")
