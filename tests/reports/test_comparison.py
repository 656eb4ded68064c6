"""Tables and page of a comparison, from records with known numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from embtrim.errors import DataError
from embtrim.experiments.grid import Skipped
from embtrim.experiments.records import RunRecord
from embtrim.reports.comparison_figures import cost_bars, looks_of, loss_against_bytes, loss_rows, losses_of
from embtrim.reports.comparison_page import MARK, render_comparison, write_comparison
from embtrim.reports.comparison_tables import comparison_tables, comparison_terminal, sheets
from embtrim.reports.entries import auc_of, entries_of, groups, is_comparison, labels, paired_differences, ranks
from tests.reports.test_report import HOSTILE, Page, record


def cell(label: str, seed: int, auc: float, budget: str | None = "10%", **changes: Any) -> RunRecord:
    made = record(label, seed, auc, **({"budget": budget} if label != "full" else {}))
    method = None if label == "full" else changes.pop("method", label)
    more = {"search_peak_bytes": None if label == "full" else 2_000_000, "method": method, **changes}
    return made.replace(**more)


@pytest.fixture
def by_hand() -> list[RunRecord]:
    """Three seeds; the last lacks random."""
    return [
        cell("full", 0, 0.80), cell("full", 1, 0.75), cell("full", 2, 0.70),
        cell("sseds", 0, 0.80), cell("sseds", 1, 0.60), cell("sseds", 2, 0.70),
        cell("uniform", 0, 0.70), cell("uniform", 1, 0.70), cell("uniform", 2, 0.60),
        cell("random", 0, 0.70), cell("random", 1, 0.65),
    ]  # fmt: skip


def test_differences_by_hand(by_hand: list[RunRecord]) -> None:
    found = entries_of(by_hand)
    group = {g[0].label: g for g in groups(found)}
    assert paired_differences(found, group["sseds"], "full", auc_of) == pytest.approx([0.0, -0.15, 0.0])
    assert paired_differences(found, group["sseds"], "uniform", auc_of) == pytest.approx([0.1, -0.1, 0.1])
    assert paired_differences(found, group["random"], "uniform", auc_of) == pytest.approx([0.0, -0.05])
    # Another budget, model or data set has no pair.
    others = [
        cell("sseds", 0, 0.9, budget="5%"),
        cell("sseds", 0, 0.9, model="fm"),
        cell("sseds", 0, 0.9, data={"fingerprint": "xyz", "folder": "more", "num_rows": {}}),
    ]
    found = entries_of([*by_hand, *others])
    for group in groups(found):
        if group[0].label == "sseds" and group[0].record.test["auc"] == 0.9:
            assert paired_differences(found, group, "uniform", auc_of) == []
    table = {row[1]: row for row in sheets(by_hand)[1].rows}
    # (.1, -.1, .1): mean .0333, sd sqrt(2 (.0667)^2 + (.1333)^2) / sqrt(2) = .1155
    assert table["sseds"] == ["10%", "sseds", "-0.0500 ± 0.0866", "+0.0000 ± 0.0000", "3", "+0.0333 ± 0.1155",
                              "+0.0000 ± 0.0000", "3"]  # fmt: skip
    assert table["random"][4] == table["random"][7] == "2"
    assert table["uniform"][5:] == ["-", "-", "-"]


def test_ranks_by_hand(by_hand: list[RunRecord]) -> None:
    given, num_cells = ranks(entries_of(by_hand))
    # Seed 0: .80, .70, .70; seed 1: .60, .70, .65; seed 2 has not all labels.
    assert given == {"sseds": [1, 3], "uniform": [2.5, 1], "random": [2.5, 2]}
    assert num_cells == 3
    (sheet,) = [s for s in sheets(by_hand) if s.title == "Ranks"]
    assert sheet.rows == [["uniform", "1.75", "1"], ["sseds", "2.00", "1"], ["random", "2.25", "0"]]
    assert "2 of 3 cells" in sheet.note


def test_results_and_cost_by_hand(by_hand: list[RunRecord]) -> None:
    tables = {
        sheet.title: sheet.rows for sheet in sheets([*by_hand, cell("sseds", 0, 0.5, budget="50%", search_epochs=4.5)])
    }
    results = tables["Results: deepfm"]
    assert [row[:2] for row in results] == [
        ["", "full"], ["50%", "sseds"], ["10%", "sseds"], ["10%", "random"], ["10%", "uniform"],
    ]  # fmt: skip
    assert results[0] == [
        "",
        "full",
        "0.7500 ± 0.0500",
        "0.7400 ± 0.0500",
        "0.5000 ± 0.0000",
        "8,000",
        "36.0 KB",
        "-",
        "3",
    ]
    assert results[2] == [
        "10%",
        "sseds",
        "0.7000 ± 0.1000",
        "0.6900 ± 0.1000",
        "0.5000 ± 0.0000",
        "800",
        "7.2 KB",
        "0.50",
        "3",
    ]
    cost = {row[0]: row[1:] for row in tables["Search cost"]}
    assert cost["sseds"] == ["1.5 s", "1.5 s", "1.50", "4.50", "2.0 MB", "2.0 MB", "4"]


def test_variants_stand_beside_their_method_and_repeats_are_told_apart(by_hand: list[RunRecord]) -> None:
    variant = cell("a-variant", 0, 0.7, method="sseds")
    assert labels(entries_of([variant, *by_hand])) == ["sseds", "a-variant", "random", "uniform"]
    # Records of a folder that names no variants: settings tell them apart.
    signed = record("sseds", 0, 0.7, search={"score": "signed", "data": "train"})
    plain = record("sseds", 0, 0.7, search={"score": "abs", "data": "train"})
    assert labels(entries_of([record(), signed, plain])) == ["sseds score=abs", "sseds score=signed"]
    with pytest.raises(DataError, match="two records of logs, deepfm, sseds, 10%, seed 0"):
        entries_of([plain, plain])
    with pytest.raises(DataError, match="no records"):
        comparison_tables([])


def test_which_records_are_a_comparison(by_hand: list[RunRecord], two_runs: list[RunRecord]) -> None:
    assert is_comparison(by_hand)
    assert not is_comparison(two_runs)
    assert not is_comparison([record("sseds", 0, budget="7%"), record("sseds", 1, budget="9%")]), "run --max-loss"
    assert is_comparison([*two_runs, record("sseds", 0, budget="5%")])
    assert is_comparison([*two_runs, record(model="fm")])


@pytest.fixture
def two_runs() -> list[RunRecord]:
    return [record(label, seed) for label in ("full", "sseds", "uniform") for seed in (0, 1)]


def test_markdown_of_several_data_sets(by_hand: list[RunRecord]) -> None:
    more = [r.replace(data={**r.data, "fingerprint": "xyz", "folder": "more | less"}) for r in by_hand]
    text = comparison_tables([*by_hand, *more])
    titles = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert titles == ["Results: deepfm on logs", "Results: deepfm on more \\| less", "Differences: deepfm on logs",
                      "Differences: deepfm on more \\| less", "Ranks", "Search cost"]  # fmt: skip
    assert "over the 4 of 6 cells" in text
    assert (
        text.count("| 10% | sseds | 0.7000 ± 0.1000 | 0.6900 ± 0.1000 | 0.5000 ± 0.0000 | 800 | 7.2 KB | 0.50 | 3 |")
        == 2
    )
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_terminal_shows_every_cell(by_hand: list[RunRecord]) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in comparison_terminal(
            by_hand, [Skipped(model="fm", label="pme", budget="1%", seed=0, reason="[no] way")]
        ):
            console.print(table)
    text = console.export_text()
    for sheet in sheets(by_hand):
        assert sheet.title in text
        assert all(value in text for row in sheet.rows for value in row)
    assert "[no] way" in text


def test_page_holds_everything(by_hand: list[RunRecord]) -> None:
    wide = [r.replace(widths={"user": 8, "item": 4}, budget="50%", table_bytes=20_000) for r in by_hand[3:]]
    skipped = [Skipped(model="deepfm", label="pme", budget="1%", seed=0, reason="the floor is higher")]
    found = Page(render_comparison([*by_hand, *wide], skipped))
    for words in ("-0.0500 ± 0.0866", "2.0 MB", "the floor is higher", "1.75", "train 80", "abacus"):
        assert words in found.text, words
    assert len(found.records()) == len(by_hand) + len(wide)
    (heat,) = found.unpacked("heat")
    assert [group["name"] for group in heat["groups"]] == ["50%, 8 models", "10%, 8 models"]
    assert [group["values"] for group in heat["groups"]] == [[[8, 8, 8], [4, 4, 4]], [[1, 1, 1], [0, 0, 0]]]
    assert "Loss of test AUC against bytes: deepfm" in found.text
    more = [r.replace(seed=9 + number) for number, r in enumerate(by_hand[3:5])]
    (heat,) = Page(render_comparison([*by_hand, *wide, *more])).unpacked("heat")
    assert heat["groups"][0]["name"] == "10%, 10 models", "the budget with most models comes first"


def test_losses_against_the_full_model(by_hand: list[RunRecord]) -> None:
    """Seed by seed, on a logarithmic axis that controls do not stretch."""
    small = [r.replace(budget="2%", table_bytes=900) for r in by_hand[3:]]
    small = [r.replace(test={**r.test, "auc": r.test["auc"] - 0.3}) if r.variant != "sseds" else r for r in small]
    entries = entries_of([*by_hand, *small])
    found = losses_of(entries, auc_of, -1.0)
    mean = {(loss.label, loss.budget): loss.mean for loss in found}
    assert mean == pytest.approx({
        ("sseds", "10%"): 0.05, ("uniform", "10%"): 0.25 / 3, ("random", "10%"): 0.1,
        ("sseds", "2%"): 0.05, ("uniform", "2%"): 0.25 / 3 + 0.3, ("random", "2%"): 0.4,
    })  # fmt: skip
    shown = loss_against_bytes(entries, found, looks_of(entries), "loss")
    assert shown.outside == "random 10% (0.100), uniform 10% (0.083), random 2% (0.400), uniform 2% (0.383)"
    names = {series["name"]: series for series in shown.drawn["series"]}
    assert set(names) == {"best at its size", "sseds"}
    texts = [point["text"] for point in names["sseds"]["points"]]
    assert texts == [
        "sseds 10%: 7.2 KB, loss +0.0500 ± 0.0866, 3 seeds",
        "sseds 2%: 900 B, loss +0.0500 ± 0.0866, 3 seeds",
    ]
    assert names["sseds"]["look"] == "s0"
    assert loss_rows(found)[-3] == ["sseds", "2%", "+0.0500 ★", "900 B"]
    assert [row[2] for row in loss_rows(found) if "★" in row[2]] == ["+0.0500 ★"], "as good at ten times the size"


def test_gains_and_losses_that_are_too_small_lie_on_the_bottom_line(by_hand: list[RunRecord]) -> None:
    gain = [r.replace(test={**r.test, "auc": 0.9}) if r.variant == "sseds" else r for r in by_hand]
    entries = entries_of(gain)
    shown = loss_against_bytes(entries, losses_of(entries, auc_of, -1.0), looks_of(entries), "loss")
    (point,) = next(series["points"] for series in shown.drawn["series"] if series["name"] == "sseds")
    assert (point["y"], point["hollow"]) == (shown.drawn["height"], True)
    assert shown.drawn["y_ticks"][0][1] == "≤ 0.0001"
    entries = entries_of(by_hand)
    shown = loss_against_bytes(entries, losses_of(entries, auc_of, -1.0), looks_of(entries), "loss")
    assert shown.drawn["y_ticks"][0] == (shown.drawn["height"], "0.01"), "nothing lies below"


def test_six_labels_have_colours_and_the_others_are_grey() -> None:
    aucs = {"guided": 0.79, "pme": 0.5, "magnitude": 0.78, "hard_mask": 0.7, "optembed": 0.6, "sseds": 0.75, "v1": 0.4,
            "v2": 0.3, "uniform": 0.795, "random": 0.2}  # fmt: skip
    records = [cell("full", 0, 0.8)]
    records += [
        cell(n, 0, auc, method="sseds" if n[0] == "v" else n, budget=b)
        for n, auc in aucs.items()
        for b in ("10%", "5%")
    ]
    looks = looks_of(entries_of(records))
    assert [name for name in sorted(looks, key=lambda n: looks[n][0]) if looks[name][0] != "dim"] == [
        "guided", "magnitude", "sseds", "hard_mask", "optembed", "pme",
    ]  # fmt: skip
    assert {name for name, (look, _) in looks.items() if look == "dim"} == {"v1", "v2", "uniform", "random"}
    alone = cell("v2", 0, 0.9, method="sseds", budget="50%")
    assert looks_of(entries_of([*records, alone]))["guided"][0] == "s0", "one that has no rival is not the best"


def test_cost_of_searches(by_hand: list[RunRecord]) -> None:
    entries = entries_of(by_hand)
    (epochs,) = cost_bars(entries, "epochs", lambda r: r.search_epochs, log=True)["series"]
    assert [point["text"] for point in epochs["points"]] == [
        "sseds, deepfm: 0.5",
        "random, deepfm: 0.5",
        "uniform, deepfm: 0.5",
    ]
    assert cost_bars(entries, "epochs", lambda r: 0.0, log=True)["series"] == []


def test_page_is_safe_and_works_offline(by_hand: list[RunRecord]) -> None:
    hostile = [
        r.replace(
            widths={HOSTILE: 1, "item": 2},
            data={**r.data, "folder": HOSTILE},
            hardware={HOSTILE: HOSTILE},
            variant=r.variant if r.variant == "full" else HOSTILE + r.variant,
        )
        for r in by_hand
    ]
    skipped = [Skipped(model=HOSTILE, label=HOSTILE, budget="1%", seed=0, reason=HOSTILE)]
    found, plain = Page(render_comparison(hostile, skipped)), Page(render_comparison(by_hand, skipped))
    assert found.tags.count("script") == 3
    assert set(found.tags) == set(plain.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all(name != "src" and (name != "href" or value.startswith("#")) for name, value in found.attributes)
    assert HOSTILE in found.text
    assert found.unpacked("heat")[0]["rows"][0] == HOSTILE


def test_page_without_searches_or_test_split(by_hand: list[RunRecord]) -> None:
    other = cell("full", 0, 0.7, model="fm")  # a grid in progress: nothing was searched for the second model yet
    found = Page(render_comparison([*by_hand, other]))
    assert [heat["title"] for heat in found.unpacked("heat")] == ["Width of each field: deepfm"]
    assert ("data-heat", "1") not in found.attributes
    fulls = Page(render_comparison(by_hand[:3]))
    assert fulls.unpacked("heat") == []
    assert fulls.text.count("hold no data for this figure") == 2
    bare = [r.replace(test={}, search_peak_bytes=None) for r in by_hand]
    assert "| 10% | sseds | - | - | - | 800 |" in comparison_tables(bare)
    assert [s.rows for s in sheets(bare) if s.title == "Ranks"] == [[]]
    render_comparison(bare)


def test_files_are_written_and_a_strangers_readme_is_left(by_hand: list[RunRecord], tmp_path: Path) -> None:
    write_comparison(by_hand, tmp_path / "x")
    readme = tmp_path / "x" / "README.md"
    assert readme.read_text().startswith(MARK)
    assert comparison_tables(by_hand) in readme.read_text()
    assert "Comparison of deepfm on logs" in readme.read_text()
    write_comparison(by_hand[:-1], tmp_path / "x", page=tmp_path / "page.html")
    assert comparison_tables(by_hand[:-1]) in readme.read_text()
    readme.write_text("mine")
    write_comparison(by_hand, tmp_path / "x")
    assert readme.read_text() == "mine"
    assert (tmp_path / "x" / "report.html").read_bytes() != (tmp_path / "page.html").read_bytes()
