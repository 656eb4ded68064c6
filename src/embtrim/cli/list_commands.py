"""The commands that list what there is: datasets, models, methods."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from embtrim.cli.flags import AsJson
from embtrim.cli.terminal import first_line, print_json, print_text, show_facts, show_rows
from embtrim.config import describe_settings


def datasets(as_json: AsJson = False) -> None:
    """List the known datasets."""
    from embtrim.data.catalog import CATALOG

    rows = [
        {
            "name": entry.name,
            "title": entry.title,
            "bundled": entry.bundled is not None,
            "licence": entry.licence,
            "source": entry.source,
            "how_to_get": entry.how_to_get,
            "note": entry.note,
            "recipe": {section: dict(values) for section, values in entry.recipe.items()},
        }
        for entry in CATALOG.values()
    ]
    show_rows(rows, as_json, shown=("name", "bundled", "title", "licence", "source"))


def models(as_json: AsJson = False) -> None:
    """List the base models and their arguments."""
    from embtrim.models import MODELS, arguments

    rows = [
        {"name": name, "what": first_line(sys.modules[model.__module__].__doc__), "arguments": arguments(name)}
        for name, model in MODELS.items()
    ]
    show_rows(rows, as_json)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Method whose settings are shown.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the search methods, or the settings of one."""
    from embtrim.methods import METHODS, method_named

    if name is None:
        show_rows([{"name": m.name, "needs": m.needs, "what": m.what} for m in METHODS.values()], as_json)
        return
    method = method_named(name)
    facts: dict[str, Any] = {"name": method.name, "needs": method.needs, "what": method.what}
    if faithful := getattr(method.config, "faithful", None):
        facts["preset_faithful"] = faithful
    settings = describe_settings(method.config)
    if as_json:
        print_json({**facts, "settings": settings})
        return
    show_facts(facts, as_json)
    if settings:
        print_text("")
        show_rows([{**setting, "default": json.dumps(setting.get("default"))} for setting in settings], as_json)
