"""The records of one run, grouped over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embtrim.errors import DataError
from embtrim.experiments.records import RunRecord
from embtrim.methods import METHODS
from embtrim.reports.provenance import data_name


@dataclass(frozen=True)
class Variant:
    """The records of one variant over its seeds.

    Attributes:
        label: Name of the variant in tables and plots, such as "sseds 10%".
        records: One record a seed.
        full: Records of the full model with the same data, model and seed; None for a seed without one.
    """

    label: str
    records: tuple[RunRecord, ...]
    full: tuple[RunRecord | None, ...]

    @property
    def is_full(self) -> bool:
        """Whether this is the full model."""
        return self.records[0].variant == "full"

    @property
    def is_control(self) -> bool:
        """Whether its method ignores the data."""
        return _is_control(self.records[0].variant)

    def mean(self, value: Callable[[RunRecord], float | None]) -> float | None:
        """Mean of a value over the seeds that have it."""
        values = [v for r in self.records if (v := value(r)) is not None]
        return statistics.fmean(values) if values else None


def variants_of(records: Sequence[RunRecord]) -> list[Variant]:
    """Group records over seeds: full models first, then searches, then controls; large before small.

    Where one seed has several records of a method, the budgets tell groups apart, then the search settings.

    Raises:
        DataError: There are no records.
    """
    if not records:
        raise DataError("there are no records to report")
    fulls = {_origin(r): r for r in records if r.variant == "full"}
    several = len({(r.data["fingerprint"], r.model) for r in records}) > 1
    by_name: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        by_name.setdefault((record.data["fingerprint"], record.model, record.variant), []).append(record)
    variants: list[Variant] = []
    for group in by_name.values():
        parts = _split_repeated(
            _split_repeated([group], lambda r: r.budget), lambda r: json.dumps(r.search, sort_keys=True)
        )
        for part in parts:
            ordered = tuple(sorted(part, key=lambda r: r.seed))
            label = _label(ordered[0], {r.budget for r in ordered}, several, len(parts))
            variants.append(Variant(label, ordered, tuple(fulls.get(_origin(r)) for r in ordered)))

    def place(variant: Variant) -> tuple[int, str, float]:
        name = variant.records[0].variant
        return (0 if variant.is_full else 1 + variant.is_control, name, -(variant.mean(lambda r: r.table_bytes) or 0))

    return sorted(variants, key=place)


def auc_differences(variant: Variant) -> list[float | None]:
    """Test AUC minus the full model's, seed by seed; None for a seed without a full model or test split."""
    pairs = zip(variant.records, variant.full, strict=True)
    return [
        record.test["auc"] - full.test["auc"] if full is not None and record.test and full.test else None
        for record, full in pairs
    ]


def valid_losses(variant: Variant) -> list[float | None]:
    """The full model's validation AUC minus the variant's, seed by seed; None for a seed without a full model."""
    pairs = zip(variant.records, variant.full, strict=True)
    return [
        full.valid["auc"] - record.valid["auc"] if full is not None and record.valid and full.valid else None
        for record, full in pairs
    ]


def _is_control(name: str) -> bool:
    return name in METHODS and METHODS[name].needs == "nothing"


def _origin(record: RunRecord) -> tuple[str, str, int]:
    return (record.data["fingerprint"], record.model, record.seed)


def _split_repeated(groups: list[list[RunRecord]], key: Callable[[RunRecord], Any]) -> list[list[RunRecord]]:
    """Split by `key` the groups in which a seed occurs twice."""
    result: list[list[RunRecord]] = []
    for group in groups:
        if len({r.seed for r in group}) == len(group):
            result.append(group)
            continue
        parts: dict[Any, list[RunRecord]] = {}
        for record in group:
            parts.setdefault(key(record), []).append(record)
        result += parts.values()
    return result


def _label(record: RunRecord, budgets: set[str | None], several: bool, num_parts: int) -> str:
    words = [record.variant]
    if several:
        words.insert(0, f"{data_name(record)} {record.model}")
    # Seeds with different budgets come from a search for the smallest plan: the table shows what each of them kept.
    if len(budgets) == 1 and record.budget is not None:
        words.append(record.budget)
    if num_parts > 1 and record.search:
        words.append(", ".join(f"{key}={value}" for key, value in record.search.items()))
    return " ".join(words)
