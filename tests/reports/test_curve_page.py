"""The table and the page of a curve, from points with known numbers; predicted beside measured losses in reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embtrim.methods.curves import ALL, ROWS_AND_WIDTHS, WIDTHS, CurvePoint, SizeCurve
from embtrim.reports.curve_page import curve_figure, render_curve, write_curve
from embtrim.reports.curve_tables import curve_header, curve_headline, curve_rows
from embtrim.reports.run_page import render_page, write_report
from embtrim.reports.run_tables import result_rows
from embtrim.reports.variants import valid_losses, variants_of
from tests.reports.test_report import HOSTILE, Page, record, rendered


def point(budget: str, num_bytes: int, *losses: float, start: str = "low_rank") -> CurvePoint:
    levers = dict(zip(("rows", "widths", "bits"), losses, strict=True))
    return CurvePoint(budget, num_bytes, num_bytes / 36_000, levers, start, "abc")


@pytest.fixture
def curve() -> SizeCurve:
    lines = {
        WIDTHS: (point("10%", 3600, 0, 0.004, 0),),
        ROWS_AND_WIDTHS: (point("10%", 3500, 0.001, 0.002, 0), point("1%", 350, 0.01, 0.02, 0)),
        ALL: (point("10%", 3550, 0.0005, 0.0005, 0), point("1%", 360, 0.005, 0.004, 0.001, start="scratch")),
    }
    return SizeCurve(0.75, 0.01, 36_000, lines, 0.002, point("4.5%", 1620, 0.001, 0.001, 0))


def test_rows_of_the_table_and_the_knee_in_its_place(curve: SizeCurve) -> None:
    header, rows = curve_header(curve), curve_rows(curve)
    assert header[:5] == ["budget", "widths: bytes", "widths: share", "widths: AUC", "widths: loss"]
    assert all(len(row) == len(header) == 13 for row in rows)
    assert [row[0] for row in rows] == ["10%", "4.5% (knee)", "1%"]
    assert rows[0][1:5] == ["3.6 KB", "10.00%", "0.7460", "0.00400"]
    assert rows[1][1:9] == ["-"] * 8
    assert rows[1][9:] == ["1.6 KB", "4.50%", "0.7480", "0.00200"]
    assert rows[2][1:5] == ["-"] * 4, "a budget that widths alone do not meet"
    assert rows[2][9:] == ["360 B", "1.00%", "0.7400", "0.01000"]


def test_headline_says_whose_error_it_is(curve: SizeCurve) -> None:
    text = curve_headline(curve)
    assert "knee: 4.5%, 1.6 KB of 36.0 KB, with a predicted loss of 0.00200, at most 0.002 (start: low_rank)" in text
    assert "validation AUC 0.7500 on the rows read; its standard error is 0.0100." in text
    assert "the error of the score, not of the predictions" in text


def test_figure_draws_lines_band_knee_and_measured_points(curve: SizeCurve) -> None:
    records = [record("full", 0, 0.76), record("guided", 0, 0.755), record("guided", 1, 0.5)]
    figure = curve_figure(curve, variants_of(records))
    series = {one.name: one for one in figure.series}
    assert [(p.x, p.y) for p in series[ALL].points] == [(3550, pytest.approx(0.749)), (360, pytest.approx(0.74))]
    assert "1%: 360 B, predicted AUC 0.7400, loss 0.01000, scratch" in series[ALL].points[1].text
    assert [p.interval for p in series[ALL].points] == [
        pytest.approx((0.749 - 0.0196, 0.749 + 0.0196)), pytest.approx((0.74 - 0.0196, 0.74 + 0.0196)),
    ]  # fmt: skip
    assert (series[ALL].band, series[WIDTHS].band, series[WIDTHS].points[0].interval) == (True, False, None)
    assert [p.x for p in series["knee"].points] == [1620]
    (measured,) = series["measured: guided 10%"].points
    assert measured.x == 7200, "seed 1 has no full model"
    assert measured.y == pytest.approx(0.745), "as far below the score that was read as below its full model"
    assert [rule.value for rule in figure.rules] == [0.75]
    unknown = SizeCurve(0.75, 0.0, 36_000, curve.lines, 0.002, curve.knee)
    assert not any(p.interval for one in curve_figure(unknown).series for p in one.points)
    assert "not known" in curve_headline(unknown)


def test_page_is_self_contained_and_escapes(curve: SizeCurve, tmp_path: Path) -> None:
    records = [record("full", 0, 0.76), record(HOSTILE, 0, 0.755)]
    write_curve(curve, tmp_path / "out", records)
    page = Page((tmp_path / "out" / "curve.html").read_text("utf-8"))
    assert page.records()[1]["variant"] == HOSTILE
    assert "img" not in page.tags
    assert "4.5% (knee)" in page.text
    assert "Grey points are trained models." in page.text
    assert json.loads((tmp_path / "out" / "curve.json").read_text()) == json.loads(json.dumps(curve.to_dict()))
    assert "Grey points" not in Page(render_curve(curve)).text


def test_report_shows_predicted_beside_measured_losses() -> None:
    records = [
        record("full", 0, 0.75), record("guided", 0, 0.746, predicted_loss=0.003), record("uniform", 0, 0.74),
    ]  # fmt: skip
    variants = variants_of(records)
    assert [valid_losses(v) for v in variants] == [[0.0], [pytest.approx(0.004)], [pytest.approx(0.01)]]
    rows = dict(result_rows(variants))
    assert rows["loss of valid AUC, predicted"] == ["-", "0.0030", "-"]
    assert rows["  measured"] == ["-", "0.0040", "0.0100"]
    assert "loss of valid AUC, predicted" in rendered(records)
    assert "loss of valid AUC, predicted" in Page(render_page(records)).text
    assert "loss of valid AUC, predicted" not in rendered([r.replace(predicted_loss=None) for r in records])
    (lonely,) = variants_of([record("guided", 0, 0.746, predicted_loss=0.003)])
    assert valid_losses(lonely) == [None]


def test_report_links_and_draws_the_curve_beside_it(tmp_path: Path, curve: SizeCurve, caplog) -> None:
    records = [record("full"), record("guided")]
    write_report(records, tmp_path / "report.html")
    assert "curve.html" not in (tmp_path / "report.html").read_text("utf-8")
    write_curve(curve, tmp_path)
    write_report(records, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert ("href", "curve.html") in page.attributes
    assert "predicted curve" in page.text
    (tmp_path / "curve.json").write_text('{"lines": 7}')
    write_report(records, tmp_path / "report.html")
    assert "predicted curve" not in (tmp_path / "report.html").read_text("utf-8")
    assert "curve.json is damaged" in caplog.text
