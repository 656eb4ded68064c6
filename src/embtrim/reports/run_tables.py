"""The tables of a run: results, verification and cost, as text and for a terminal.

A value of one variant over several seeds is shown as mean ± sample standard deviation. Differences are taken seed by
seed against the full model of the same data, model and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from embtrim.experiments.records import RunRecord
from embtrim.reports.numbers import NONE, format_bytes, format_count, format_seconds, format_share, format_values
from embtrim.reports.provenance import models_and_data
from embtrim.reports.variants import Variant, auc_differences, valid_losses, variants_of

VERIFICATION_HEADER = ("variant", "seed", "rows compared", "max difference", "allowed", "equal")
COST_HEADER = ("variant", "seed", "search", "in epochs", "training", "epochs", "rows/s", "peak memory", "precision")


def result_rows(variants: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """The table of results as text: each row's name, and one text a variant."""
    rows: list[tuple[str, list[str]]] = []

    def add_row(name: str, text_of: Callable[[Variant], str]) -> None:
        rows.append((name, [text_of(v) for v in variants]))

    add_row("test AUC", lambda v: format_values([r.test.get("auc") for r in v.records]))
    add_row("  difference to full", lambda v: NONE if v.is_full else format_values(auc_differences(v), signed=True))
    if any(r.predicted_loss is not None for v in variants for r in v.records):
        add_row("loss of valid AUC, predicted", lambda v: format_values([r.predicted_loss for r in v.records]))
        add_row("  measured", lambda v: NONE if v.is_full else format_values(valid_losses(v)))
    add_row("test logloss", lambda v: format_values([r.test.get("logloss") for r in v.records]))
    add_row("calibration", lambda v: format_values([r.test.get("calibration") for r in v.records], digits=3))
    add_row("embedding params", lambda v: format_count(v.mean(lambda r: r.num_params)))
    add_row("  of the full tables", lambda v: format_share(v.mean(lambda r: r.num_params / max(1, r.num_full_params))))
    if any(r.bits != 32 for v in variants for r in v.records):
        add_row("bits per value", lambda v: ", ".join(dict.fromkeys(str(r.bits) for r in v.records)))
    add_row("table bytes", lambda v: format_bytes(v.mean(lambda r: r.table_bytes)))
    add_row("bundle on disk", lambda v: format_bytes(v.mean(lambda r: r.bundle_bytes or None)))
    add_row("  its vocabulary", lambda v: format_bytes(v.mean(lambda r: r.vocabulary_bytes or None)))
    add_row("peak memory", lambda v: format_bytes(v.mean(lambda r: r.peak_memory_bytes)))
    add_row("search time", lambda v: NONE if v.is_full else format_seconds(v.mean(lambda r: r.search_seconds)))
    add_row("training time", lambda v: format_seconds(v.mean(lambda r: r.train_seconds)))
    add_row("seeds", lambda v: format_count(len(v.records)))
    return rows


def terminal_table(records: Sequence[RunRecord]) -> Table:
    """The table of results for a terminal, with a column for each variant.

    Raises:
        DataError: There are no records.
    """
    variants = variants_of(records)
    table = Table(title=Text(models_and_data(records_of(variants))), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for variant in variants:
        table.add_column(Text(variant.label), justify="right", no_wrap=True)
    for name, texts in result_rows(variants):
        table.add_row(Text(name), *map(Text, texts))
    return table


def records_of(variants: Sequence[Variant]) -> list[RunRecord]:
    """All records, in the order of the variants."""
    return [record for variant in variants for record in variant.records]


def verification_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """How each compact model compared with the masked one, by VERIFICATION_HEADER."""
    return [
        [
            variant.label,
            str(record.seed),
            format_count(verification["num_rows"]),
            f"{verification['max_difference']:.1e}",
            f"{verification['tolerance']:.0e}",
            "yes" if verification["passed"] else "NO",
        ]
        for variant in variants
        for record in variant.records
        if (verification := record.verification) is not None
    ]


def cost_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """What each model took to search and train, by COST_HEADER."""
    return [
        [
            variant.label,
            str(record.seed),
            NONE if variant.is_full else format_seconds(record.search_seconds),
            NONE if variant.is_full else f"{record.search_epochs:.2f}",
            format_seconds(record.train_seconds),
            str(record.epochs),
            format_count(record.rows_per_second),
            format_bytes(record.peak_memory_bytes),
            record.precision,
        ]
        for variant in variants
        for record in variant.records
    ]
