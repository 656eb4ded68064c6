"""One self-contained HTML page from the templates beside this module.

A page loads nothing from elsewhere. Names of fields and files come from the user's log, so they are untrusted:
templates escape them, JSON inside scripts has its `<` escaped, and a content security policy forbids requests.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from embtrim.experiments.records import RunRecord
from embtrim.reports.heat_maps import HeatMap
from embtrim.system.templates import render


def fill_page(template: str, records: Sequence[RunRecord], heat_maps: Sequence[HeatMap] = (), **values: Any) -> str:
    """The page as text.

    Args:
        template: File in templates/ that extends page.html.j2.
        records: Records that the page carries as packed JSON, `<script id="records">`: gzip in base64.
        heat_maps: What page.js makes of the places that the template names by number.
        values: What else the template shows.
    """
    text = json.dumps([record.model_dump(mode="json") for record in records], ensure_ascii=False, allow_nan=False)
    return render(
        "embtrim.reports",
        template,
        records_packed=base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode(),
        num_records=len(records),
        heat_json=_script_json([heat_map._asdict() for heat_map in heat_maps]),
        **values,
    )


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element that holds it."""
    return htmlsafe_json_dumps(value, json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
