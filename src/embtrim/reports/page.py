"""One self-contained HTML page from the templates beside this module.

A page loads nothing from elsewhere. Names of fields and files come from the user's log, so they are untrusted:
templates escape them, JSON inside scripts has its `<` escaped, and a content security policy forbids requests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from embtrim.experiments.records import RunRecord
from embtrim.system.templates import render


def fill_page(template: str, records: Sequence[RunRecord], figures: dict[str, dict[str, Any]], **values: Any) -> str:
    """The page as text.

    Args:
        template: File in templates/ that extends page.html.j2.
        records: Records that the page carries as JSON, `<script id="records">`.
        figures: Plotly's data and layout by the name that the template gives the figure.
        values: What else the template shows.
    """
    from plotly.offline import get_plotlyjs  # 5 MB of script: read only when a page is written

    return render(
        "embtrim.reports",
        template,
        plotly=Markup(get_plotlyjs()),
        records_json=_script_json([record.model_dump(mode="json") for record in records]),
        figures_json=_script_json(figures),
        **values,
    )


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element that holds it."""
    return htmlsafe_json_dumps(value, json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
