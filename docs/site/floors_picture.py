"""Draw docs/images/floors.svg, the floors of the design page, from the contract that `make check` enforces.

python docs/site/floors_picture.py
"""

from __future__ import annotations

from pathlib import Path

from embtrim.config import read_toml

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "floors.svg"
WIDTH, HEIGHT, GAP, MARGIN = 640, 34, 8, 16
STYLE = """
  text { font: 14px ui-monospace, monospace; fill: #0f172a; text-anchor: middle }
  .note { font: 13px system-ui, sans-serif; fill: #334155; text-anchor: start }
  .card { fill: #ffffff; stroke: #d8dee6 } .room { fill: #d9f2ee; stroke: #0b7a6f } .arrow { stroke: #334155; fill: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #f1f5f9 } .note { fill: #b6c2d1 } .card { fill: #151b23; stroke: #3d444d }
    .room { fill: #12403b; stroke: #2dd4bf } .arrow { stroke: #b6c2d1 }
  }
"""


def floors() -> list[list[str]]:
    """The packages of each floor, from top to bottom, without private modules."""
    contracts = read_toml(ROOT / "pyproject.toml")["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    found = [[name for name in layer.split(" | ") if not name.startswith("_")] for layer in layers]
    return [floor for floor in found if floor]


def drawn() -> str:
    """The picture as svg: a row for each floor, and an arrow of the imports."""
    rows = floors()
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP) - GAP
    left, room = MARGIN + 130, WIDTH - 2 * MARGIN - 130
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="The packages of embtrim on their floors; imports go down">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<path class="arrow" d="M{MARGIN + 20} {MARGIN + 6}V{height - MARGIN - 6}m-5 -8l5 8l5 -8"/>',
        f'<text class="note" x="{MARGIN + 34}" y="{height / 2}">imports go</text>',
        f'<text class="note" x="{MARGIN + 34}" y="{height / 2 + 18}">down only</text>',
    ]
    for number, names in enumerate(rows):
        y, width = MARGIN + number * (HEIGHT + GAP), (room - GAP * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = left + place * (width + GAP)
            parts.append(f'<rect class="room" x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="5"/>')
            parts.append(f'<text x="{x + width / 2:g}" y="{y + 22}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(), "utf-8")
