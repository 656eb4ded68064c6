"""A log in the style of old public dumps: separator `;`, everything quoted, latin-1, backslash-escaped quotes, NULL,
a rating 0..10 of which 0 means that none was given, and lines that are broken in several ways.

    python -m tests.data.old_dump 300000 ratings.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

_BROKEN = ('"17";"0195153448', '"18";"00603"5X";"5";"x";"NULL"', '"19";"0374157065";"3"', "<HTML>", '"20";"a;"0";"x";NULL;"y"',
           '"21";"0449212602";"8";"say \\";"x"')  # fmt: skip
_TITLES = (
    "\u00c9clair M\u00fcller",
    'The \\"Old\\" Man; and the Sea',
    "Plain",
    "\u00c0 la carte, volume 2",
    "C:\\\\temp",
)


def write_old_dump(path: Path, num_rows: int, num_broken: int = 40, seed: int = 0) -> None:
    """Write `num_rows` rows, and `num_broken` broken lines between them; people have tastes, so that ratings can be learned."""
    draw = np.random.default_rng(seed)
    user_N, item_N = draw.integers(0, 900, num_rows), (draw.pareto(1.2, num_rows) * 40).astype(int) % 2000
    rating_N = np.where(
        draw.random(num_rows) < 0.4, 0, np.clip(3 + (user_N + item_N) % 7 + draw.integers(-1, 3, num_rows), 1, 10)
    )
    age_N = draw.integers(12, 80, num_rows)
    lines = ['"User-ID";"ISBN";"rating";"Title";"Age"']
    for row in range(num_rows):
        age = "NULL" if age_N[row] < 30 else f'"{age_N[row]}"'
        title = _TITLES[item_N[row] % len(_TITLES)] + ("" if item_N[row] % 3 else f" {item_N[row]}")
        lines.append(f'"{user_N[row]}";"{item_N[row]:010}";"{rating_N[row]}";"{title}";{age}')
    for i, place in enumerate(
        np.sort(draw.choice(np.arange(num_rows // 10, num_rows), num_broken, replace=False))[::-1]
    ):
        lines.insert(int(place), _BROKEN[i % len(_BROKEN)])
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")


if __name__ == "__main__":
    write_old_dump(Path(sys.argv[2]), int(sys.argv[1]))
