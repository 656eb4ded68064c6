"""The model card: README.md of a bundle, from what its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embtrim.plan.budget import BYTES_PER_PARAM
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import describe_bits
from embtrim.schema import Schema
from embtrim.system.templates import render


def model_card(schema: Schema, plan: PlanShape, info: Mapping[str, Any], vocabulary_bytes: int) -> str:
    """The card as text.

    Args:
        schema: Schema of the bundle's encoder.
        plan: Layout of the bundle's tables.
        info: Contents of bundle.json, see `embtrim.serving.bundle.Contents`; digests are not read.
        vocabulary_bytes: Bytes of the bundle's encoder.
    """
    spread = info["spread"]
    return render(
        "embtrim.serving",
        "model_card.md.j2",
        model=info["model"],
        method=plan.method,
        embtrim=info["embtrim"],
        version=info["version"],
        facts=_facts(schema, plan, info, vocabulary_bytes),
        over="one seed: no spread" if spread is None else f"mean ± std, seeds {', '.join(map(str, spread['seeds']))}",
        metrics=_metric_rows(info["metrics"], spread),
        summary=plan.summary().partition("\n")[0],
        tables=_table_rows(schema, plan),
    )


def _facts(schema: Schema, plan: PlanShape, info: Mapping[str, Any], vocabulary_bytes: int) -> dict[str, Any]:
    """Where the model comes from, by name."""
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
    return facts


def _describe_split(split: Mapping[str, Any] | None, seed: int) -> str:
    if split is None:
        return "by files"
    parts = ":".join(f"{part:g}" for part in split["ratio"])
    if split["by"] == "ratio":
        return f"{parts} at random, seed {seed}"
    return f"by time at {', '.join(map(str, split['cuts']))}"


def _metric_rows(
    metrics: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """Name, value, and mean ± sample standard deviation over the run's seeds, of each split's metrics."""
    rows = []
    for split, values in metrics.items():
        for name, value in values.items():
            if isinstance(value, float):
                others = "" if spread is None else "{mean:.5f} ± {std:.5f}".format(**spread[split][name])
                rows.append((f"{split} {name}", f"{value:.5f}", others))
    return rows


def _table_rows(schema: Schema, plan: PlanShape) -> list[tuple[str, ...]]:
    """A row per field: what its table stores, with first-order weights and a projection of its own."""
    tables = {table.name: table for table in plan.tables}
    full = SizePlan.full(schema, plan.width, plan.first_order)
    full_bytes = {table.name: full.table_bytes(table, plan.target) for table in full.tables}
    rows = []
    shown: dict[str, str] = {}
    for field in schema.id_fields:
        table = tables[field.table_name]
        first = shown.setdefault(table.name, field.name)
        if first != field.name:
            rows.append((field.name, f"those of {first}", "", "", "", ""))
            continue
        columns = ", ".join(dict.fromkeys(str(width) for _, width in table.segments))
        rows.append(
            (
                field.name,
                f"{table.num_compact_rows:,} of {table.num_rows:,}",
                f"{columns} of {table.width}",
                describe_bits(table),
                f"{plan.table_bytes(table, plan.target):,}",
                f"{full_bytes[table.name]:,}",
            )
        )
    if shared := BYTES_PER_PARAM * plan.num_shared_projection_params:
        rows.append(("shared projections", "", "", "32", f"{shared:,}", "0"))
    return rows
