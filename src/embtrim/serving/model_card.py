"""The model card: README.md of a bundle, from what its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embtrim.plan.budget import BYTES_PER_PARAM
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.schema import Schema

CARD = """# {model} ({method})

Saved by embtrim {embtrim}. Version {version} of plan and schema. Score a raw log with
`embtrim predict THIS_FOLDER LOG --out scores.parquet`.

| | |
|---|---|
{facts}

## Metrics

{metrics}

## Tables

{summary}

{tables}
"""


def model_card(schema: Schema, plan: PlanShape, info: Mapping[str, Any], vocabulary_bytes: int) -> str:
    """The card as text.

    Args:
        schema: of the bundle's encoder.
        plan: layout of its tables.
        info: what bundle.json holds, see `embtrim.serving.bundle.Contents`; digests are not read.
        vocabulary_bytes: of the bundle's encoder.
    """
    data, update, searched = info["data"], info["update"], plan.budget is not None
    rows = ", ".join(f"{name} {count:,}" for name, count in data["num_rows"].items())
    facts = {
        "data": f"schema {schema.describe()}; rows: {rows}",
        "split": _describe_split(data["split"], data["split_seed"]),
        "seed of initial weights": info["hparams"].get("seed"),
        "seed of training": "unknown" if info["seed"] is None else info["seed"],
        "budget": str(plan.budget) if searched else "none",
        **({"seed of the search": plan.seed} if searched else {}),
        **({"bytes as stored by": plan.target} if plan.target not in (None, "torch") else {}),
    }
    facts["bytes of the vocabulary"] = f"{vocabulary_bytes:,}"
    if update is not None:
        facts["update"] = (
            f"of the bundle {update['of'][:12]}, version {info['version'] - 1}: schema {update['schema_before']} -> "
            f"{info['schema']}, plan {update['plan_before']} -> {plan.digest}"
            + ("; values re-numbered by frequency" if update["renumbered"] else "")
        )
    return CARD.format(
        model=info["model"],
        method=plan.method,
        embtrim=info["embtrim"],
        version=info["version"],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        metrics=_metrics_table(info["metrics"], info["spread"]),
        summary=plan.summary().partition("\n")[0],
        tables=_bytes_table(schema, plan),
    )


def _describe_split(split: Mapping[str, Any] | None, seed: int) -> str:
    if split is None:
        return "by files"
    parts = ":".join(f"{part:g}" for part in split["ratio"])
    if split["by"] == "ratio":
        return f"{parts} at random, seed {seed}"
    return f"by time at {', '.join(map(str, split['cuts']))}"


def _metrics_table(metrics: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Any] | None) -> str:
    """A line a split and metric, with mean ± sample standard deviation over the run's seeds where there are several."""
    if not metrics:
        return "None were noted."
    over = "one seed: no spread" if spread is None else f"mean ± std, seeds {', '.join(map(str, spread['seeds']))}"
    lines = [f"| | this model | {over} |", "|---|---|---|"]
    for split, values in metrics.items():
        for name, value in values.items():
            if isinstance(value, float):
                others = "" if spread is None else "{mean:.5f} ± {std:.5f}".format(**spread[split][name])
                lines.append(f"| {split} {name} | {value:.5f} | {others} |")
    return "\n".join(lines)


def _bytes_table(schema: Schema, plan: PlanShape) -> str:
    """A line a field: what its table stores, first-order weights and a projection of its own included."""
    tables = {table.name: table for table in plan.tables}
    full = SizePlan.full(schema, plan.width, plan.first_order)
    full_bytes = {table.name: full.table_bytes(table, plan.target) for table in full.tables}
    lines = ["| field | rows | columns | bits | bytes | full bytes |", "|---|---|---|---|---|---|"]
    shown: dict[str, str] = {}
    for field in schema.id_fields:
        table = tables[field.table_name]
        first = shown.setdefault(table.name, field.name)
        if first != field.name:
            lines.append(f"| {_cell(field.name)} | those of {_cell(first)} | | | | |")
            continue
        columns = ", ".join(dict.fromkeys(str(width) for _, width in table.segments))
        lines.append(
            f"| {_cell(field.name)} | {table.num_compact_rows:,} of {table.num_rows:,} | {columns} of {table.width} "
            f"| {table.bits} | {plan.table_bytes(table, plan.target):,} | {full_bytes[table.name]:,} |"
        )
    if shared := BYTES_PER_PARAM * plan.num_shared_projection_params:
        lines.append(f"| shared projections | | | 32 | {shared:,} | 0 |")
    return "\n".join(lines)


def _cell(name: str) -> str:
    """A name that does not end its cell of a table."""
    return name.replace("|", "\\|")
