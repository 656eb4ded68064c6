"""The pages in a real browser, at two widths and in two looks: Debian's chromium, where it is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from embtrim.data.log_profile import profile
from embtrim.experiments.records import RunRecord
from embtrim.methods.curves import ALL, WIDTHS, SizeCurve
from embtrim.reports.comparison_page import render_comparison
from embtrim.reports.curve_page import render_curve
from embtrim.reports.profile_page import render_profile
from embtrim.reports.run_page import render_page
from tests.reports.test_comparison import cell
from tests.reports.test_curve_page import point
from tests.reports.test_report import HOSTILE, record

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")]

NUM_FIELDS = 1200
LOOKS = {"narrow": (480, "light"), "broad": (1400, "dark")}

# What is asked of each page, in its frame. Contrast as the Web Content Accessibility Guidelines define it.
PROBE = """
async function probe(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = (query) => [...page.querySelectorAll(query)];
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const paper = numbers(view.getComputedStyle(page.body).backgroundColor);
  const contrast = (element, property) => {
    const style = view.getComputedStyle(element), [r, g, b, a = 1] = numbers(style.backgroundColor);
    const ground = paper.map((value, k) => value * (1 - a) + [r, g, b][k] * a);
    const [x, y] = [numbers(style[property]), ground].map(light).sort((x, y) => y - x);
    return (x + 0.05) / (y + 0.05);
  };
  const name = (e) => e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim() || e.textContent.trim();
  const choice = page.querySelector("select");
  while (choice && !page.querySelector(".heat")) { await new Promise((resolve) => setTimeout(resolve, 10)); }
  const found = {
    width: view.innerWidth,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    paper,
    charts: all(".chart").map((c) => [...c.querySelectorAll(".plot .mark, .plot .line")].filter((m) => m.getBoundingClientRect().width > 0).length),
    pictures: all("[role=img]").map((e) => e.getAttribute("aria-label")),
    clipped: all(".chart text").filter((t) => t.getBoundingClientRect().right > page.documentElement.clientWidth && view.getComputedStyle(t).display !== "none")
      .map((t) => t.textContent),
    nameless: all("button, a, select, input, summary, [tabindex]").filter((e) => !name(e)).map((e) => e.outerHTML.slice(0, 80)),
    faint: all(".note, .plot text, .legend li, td").filter((e) => e.textContent.trim())
      .map((e) => [contrast(e, e.closest(".plot") ? "fill" : "color"), e.textContent.trim()]).filter(([c]) => c < 4.5),
    crossed: all(".plot").flatMap((plot) => {
      const boxes = [...plot.querySelectorAll(".tick:not(.over), .label")].map((t) => [t.getBoundingClientRect(), t.textContent])
        .filter(([box]) => box.width);
      return boxes.flatMap(([a, one], k) => boxes.slice(k + 1).filter(([b]) => a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom - 4 && b.top < a.bottom - 4).map(([, other]) => [one, other]));
    }),
    rows: all(".heat tbody tr").length,
    strips: all("canvas").length,
  };
  if (choice) {
    const column = () => [...page.querySelectorAll(".heat tbody tr td:nth-child(3)")].slice(0, 3).map((c) => c.textContent);
    found.first = column();
    page.querySelectorAll(".heat th button")[2].click();
    found.sorted = [column(), page.querySelector(".heat [aria-sort]").getAttribute("aria-sort")];
    page.querySelectorAll(".heat th button")[2].click();
    found.reversed = column();
    choice.selectedIndex = choice.options.length - 1;
    choice.dispatchEvent(new Event("change"));
    found.last = [choice.options[choice.selectedIndex].text, column()];
    const search = page.querySelector("input");
    search.value = "017";
    search.dispatchEvent(new Event("input"));
    found.count = page.querySelector("[role=status]").textContent;
  }
  if (page.getElementById("download")) {
    let blob, done;
    const clicked = new Promise((resolve) => { done = resolve; });
    view.URL.createObjectURL = (given) => { blob = given; return "data:,"; };
    view.HTMLAnchorElement.prototype.click = done;
    page.getElementById("download").click();
    await clicked;
    found.records = JSON.parse(await blob.text()).length;
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What chromium finds, by page and look; "console" holds what it wrote there."""
    folder = tmp_path_factory.mktemp("pages")
    log = folder / "log.csv"
    log.write_text("click,user,price\n" + "".join(f"{k % 2},u{k % 5},{k / 7:.2f}\n" for k in range(300)))
    names = [f"field_{k:04}" for k in range(NUM_FIELDS)]

    def wide(found: RunRecord) -> RunRecord:
        widths = {name: 8 if found.variant == "full" else k % 8 for k, name in enumerate(names)}
        sizes = {name: 32 * width * (NUM_FIELDS - k) for k, (name, width) in enumerate(widths.items())}
        bits = dict.fromkeys(names, 4.0)
        return found.replace(widths=widths, bits_by_field=bits, bytes_by_table=sizes, kept_rows=sizes, num_rows=sizes)

    run = [wide(record(v, s, 0.7 + s / 50)) for v in ("full", "sseds", "uniform", HOSTILE) for s in (0, 1)]
    grid = [cell("full", 0, 0.8)]
    for place, label in enumerate(("guided", "sseds", "pme", "optembed", "magnitude", "uniform", "random")):
        for budget, size in (("10%", 7_000), ("5%", 3_000)):
            grid.append(cell(label, 0, 0.79 - place / 40, budget=budget, table_bytes=size + 40 * place))
    lines = {
        WIDTHS: (point("10%", 3600, 0, 0.004, 0),),
        ALL: (point("10%", 3550, 0, 0, 0), point("1%", 360, 0, 0.01, 0)),
    }
    curve = SizeCurve(0.75, 0.01, 36_000, lines, 0.002, point("4.5%", 1620, 0.001, 0.001, 0))
    pages = {
        "run": render_page(run),
        "compare": render_comparison(grid),
        "curve": render_curve(curve, run),
        "profile": render_profile(profile(log)),
    }
    assert all(len(page.encode()) < 1_000_000 for page in pages.values())
    frames = [
        f'<iframe data-page="{page} {look}" style="width:{width}px;height:900px;border:0;color-scheme:{scheme}" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for page, text in pages.items()
        for look, (width, scheme) in LOOKS.items()
    ]
    collect = """onload = async () => {
      for (const frame of document.querySelectorAll("iframe")) {
        let found;
        try { found = await probe(frame); } catch (error) { found = String(error); }
        console.log("FOUND" + JSON.stringify([frame.dataset.page, found]) + "FOUND");
      }
      console.log("END");
    };"""
    outer = folder / "outer.html"
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8>{''.join(frames)}<script>{PROBE}{collect}</script>")
    return read_console(outer, folder / "browser")


def read_console(page: Path, folder: Path) -> dict[str, Any]:
    """What a page writes to the console: what it FOUND by name, and all else in "console"."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={folder}", page.as_uri()]  # fmt: skip
    found: dict[str, Any] = {"console": []}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        guard = threading.Timer(300, process.kill)
        guard.start()
        try:
            for line in process.stderr or ():
                if '"END"' in line:
                    return found
                if match := re.search("FOUND(.*)FOUND", line):
                    name, value = json.loads(match.group(1))
                    found[name] = value
                elif "CONSOLE" in line:
                    found["console"].append(line)
        finally:
            guard.cancel()
            process.terminate()
    raise AssertionError(f"chromium ended before the page did, having written {found}")


@pytest.mark.parametrize("page", ["run", "compare", "curve", "profile"])
@pytest.mark.parametrize("look", LOOKS)
def test_every_page(seen: dict[str, Any], page: str, look: str) -> None:
    found = seen[f"{page} {look}"]
    assert isinstance(found, dict), found
    assert found["width"] == LOOKS[look][0]
    assert found["overflow"] <= 0, "no scrolling to the side"
    assert (sum(found["paper"][:3]) > 600) == (LOOKS[look][1] == "light")
    least = {"run": [9, 10, 39, 39, 12], "compare": [17, 17, 7, 7], "curve": [7], "profile": []}[page]
    assert len(found["charts"]) == len(least)
    assert all(count >= enough for count, enough in zip(found["charts"], least, strict=True)), "every figure is drawn"
    assert all(found["pictures"])
    assert len(found["pictures"]) >= len(found["charts"])
    assert found["clipped"] == []
    assert found["crossed"] == [], "no text lies over another"
    assert found["nameless"] == []
    assert found["faint"] == []


def test_nothing_is_written_to_the_console(seen: dict[str, Any]) -> None:
    assert seen["console"] == []


@pytest.mark.parametrize("look", LOOKS)
def test_heat_maps_are_sorted_chosen_and_searched(seen: dict[str, Any], look: str) -> None:
    run = seen[f"run {look}"]
    assert (run["rows"], run["strips"]) == (NUM_FIELDS, 4), "all fields at a glance, a strip each variant"
    assert run["first"] == ["0", "1", "2"], "the largest tables first"
    assert run["sorted"] == [["0", "0", "0"], "ascending"]
    assert run["reversed"] == ["7", "7", "7"]
    assert run["last"] == ["bytes of its table", ["0 B", "38.4 KB", "76.7 KB"]]
    assert run["count"] == "12 of 1,200"
    assert run["records"] == 8
    assert seen[f"compare {look}"]["records"] == 15
