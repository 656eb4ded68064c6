"""One self-contained HTML page from the templates beside this module.

A page loads nothing from elsewhere. Names of fields and files come from the user's log, so they are untrusted:
templates escape them, data inside scripts are packed, and a content security policy forbids requests.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from embtrim.experiments.records import RunRecord
from embtrim.reports.heat_maps import HeatMap
from embtrim.system.templates import render

# Most letters of packed records in a page, which is to stay below 1 MB.
MOST_PACKED = 500_000


def fill_page(template: str, records: Sequence[RunRecord], heat_maps: Sequence[HeatMap] = (), **values: Any) -> str:
    """The page as text.

    Args:
        template: File in templates/ that extends page.html.j2.
        records: Records that the page carries as packed JSON, `<script id="records">`: gzip in base64. They are left out
            where they take more than MOST_PACKED.
        heat_maps: What page.js makes of the places that the template names by number.
        values: What else the template shows.
    """
    packed = _packed([record.model_dump(mode="json") for record in records])
    return render(
        "embtrim.reports",
        template,
        records_packed=packed if len(packed) <= MOST_PACKED else "",
        num_records=len(records),
        heat_packed=_packed([heat_map._asdict() for heat_map in heat_maps]),
        **values,
    )


def _packed(value: Any) -> str:
    """JSON as gzip in base64, the same for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
