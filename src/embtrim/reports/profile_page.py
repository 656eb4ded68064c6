"""The HTML page of a log's profile: its table, and a small histogram for each field."""

from __future__ import annotations

from pathlib import Path

from embtrim.data.log_profile import SPLIT
from embtrim.data.profile import FieldProfile, LogProfile
from embtrim.reports.profile_tables import bars_of, in_words, profile_rows
from embtrim.system.files import write_then_rename
from embtrim.system.templates import render


def write_profile(found: LogProfile, path: str | Path) -> None:
    """Write the page to a file; one of that name is replaced."""
    page = render_profile(found)
    write_then_rename(Path(path), lambda file: file.write(page.encode()))


def render_profile(found: LogProfile) -> str:
    """The page as text; it holds no script and loads nothing."""
    earlier = {} if found.against is None else {field.name: field for field in found.against.fields}
    rows = profile_rows(found)
    return render(
        "embtrim.reports",
        "profile.html.j2",
        log=found.log,
        num_rows=found.rows,
        drift=[drift.describe() for drift in found.drift],
        header=list(rows[0]),
        rows=[list(row.values()) for row in rows],
        fields=[_picture(field, earlier.get(field.name)) for field in found.profile.fields],
    )


def _picture(field: FieldProfile, earlier: FieldProfile | None) -> dict[str, object]:
    """What the page shows of one field."""
    before = None if earlier is None else earlier.counts.get("train")
    return {
        "name": field.name,
        "words": in_words(field, field.counts[SPLIT]),
        "bars": bars_of(field, field.counts[SPLIT].rows),
        "words_before": "" if earlier is None or before is None else in_words(earlier, before),
        "bars_before": [] if earlier is None or before is None else bars_of(earlier, before.rows),
    }
