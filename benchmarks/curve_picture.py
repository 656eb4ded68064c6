"""Draw docs/images/curve.svg, the picture of README: test AUC against table bytes, from the published records.

python benchmarks/curve_picture.py
"""

from __future__ import annotations

import math
from pathlib import Path

from embtrim.experiments.records import RunRecord, read_records
from embtrim.reports.numbers import format_bytes

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "curve.svg"
PANELS = {"frappe": "Frappe", "flights": "flights", "movielens": "MovieLens-1M"}
LINES = {"guided-bytes": ("guided", "embtrim: guided"), "uniform-8": ("uniform", "equal widths, 8 bits")}
SIZE, TOP, BOTTOM, LEFT, WIDTH, GAP = (960, 330), 74, 262, 62, 236, 74
# The card has colours of its own in both schemes, so that it can be read on any page.
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #334155 }
  .title { font-weight: 600; font-size: 15px; fill: #0f172a }
  .card { fill: #ffffff; stroke: #d8dee6 } .grid { stroke: #e5e9ef } .full { stroke: #64748b; stroke-dasharray: 5 4 }
  .guided { stroke: #0b7a6f } .uniform { stroke: #c2570c } .line { fill: none; stroke-width: 2.5 }
  .dot.guided { fill: #0b7a6f } .dot.uniform { fill: #c2570c }
  @media (prefers-color-scheme: dark) {
    text { fill: #b6c2d1 } .title { fill: #f1f5f9 } .card { fill: #151b23; stroke: #3d444d } .grid { stroke: #2a313a }
    .full { stroke: #94a3b8 } .guided { stroke: #2dd4bf } .uniform { stroke: #fb923c }
    .dot.guided { fill: #2dd4bf } .dot.uniform { fill: #fb923c }
  }
"""


def picture(records: dict[str, list[RunRecord]]) -> str:
    """The picture as svg.

    Args:
        records: Records of one comparison for each panel, by the title of the panel.
    """
    width, height = SIZE
    words = "Test AUC against bytes of the embedding tables, for guided, equal widths and the full model"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{words}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *_legend(),
    ]
    for number, (title, found) in enumerate(records.items()):
        parts += _panel(LEFT + number * (WIDTH + GAP), title, found)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> list[str]:
    named = [*LINES.values(), ("full", "full model, 32 bits")]
    parts = []
    for number, (style, label) in enumerate(named):
        x = LEFT + 210 * number
        parts.append(f'<path class="line {style}" d="M{x} 26h26"/><text x="{x + 34}" y="30.5">{label}</text>')
    return parts


def _panel(left: float, title: str, records: list[RunRecord]) -> list[str]:
    (full,) = [record for record in records if record.method is None]
    points = {
        style: sorted((record.table_bytes, record.test["auc"]) for record in records if record.variant == variant)
        for variant, (style, _) in LINES.items()
    }
    aucs = [auc for line in points.values() for _, auc in line] + [full.test["auc"]]
    step = 0.005 if max(aucs) - min(aucs) > 0.009 else 0.002
    low, high = math.floor(min(aucs) / step) * step, math.ceil(max(aucs) / step) * step

    def x_of(num_bytes: float) -> float:  # from 1% to 100% of the full bytes, over the logarithm
        return left + WIDTH * (2 + math.log10(num_bytes / full.table_bytes)) / 2.0

    def y_of(auc: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (auc - low) / (high - low)

    parts = [f'<text class="title" x="{left}" y="{TOP - 14}">{title}, test AUC</text>']
    for number in range(round((high - low) / step) + 1):
        y, label = y_of(low + number * step), f"{low + number * step:.3f}".removeprefix("0")
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{WIDTH}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for share in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0):
        x = x_of(share * full.table_bytes)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{share:.0%}</text>')
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{BOTTOM + 44}" text-anchor="middle">table bytes, share of {format_bytes(full.table_bytes)}</text>'
    )
    parts.append(f'<path class="line full" d="M{left} {y_of(full.test["auc"]):.1f}h{WIDTH}"/>')
    for style, line in reversed(points.items()):
        path = " L".join(f"{x_of(num_bytes):.1f} {y_of(auc):.1f}" for num_bytes, auc in line)
        parts.append(f'<path class="line {style}" d="M{path}"/>')
        parts += [
            f'<circle class="dot {style}" cx="{x_of(num_bytes):.1f}" cy="{y_of(auc):.1f}" r="3.5"/>'
            for num_bytes, auc in line
        ]
    return parts


def drawn() -> str:
    """The picture of the published records."""
    return picture(
        {title: read_records(ROOT / f"benchmarks/results/one-pass-{name}") for name, title in PANELS.items()}
    )


if __name__ == "__main__":
    PICTURE.write_text(drawn(), "utf-8")
