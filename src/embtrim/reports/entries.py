"""The records of a comparison, told apart by data set, model, budget, label and seed.

A label is a method or a variant of one.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from embtrim.errors import DataError
from embtrim.experiments.grid import FULL
from embtrim.experiments.records import RunRecord
from embtrim.methods import METHODS
from embtrim.plan.budget import Budget
from embtrim.reports.provenance import data_name

Value = Callable[[RunRecord], float | None]


@dataclass(frozen=True)
class Entry:
    """A record and what tells it apart.

    Attributes:
        data: Name of the data set.
        model: Name of the base model.
        budget: Budget of the search; None for the full model.
        label: Method or variant.
        seed: Seed of the training and the search.
        record: The record itself.
    """

    data: str
    model: str
    budget: Budget | None
    label: str
    seed: int
    record: RunRecord


def is_comparison(records: Sequence[RunRecord]) -> bool:
    """Whether records are a grid's: they name methods beside labels, or have several models, or budgets for one seed."""
    places = Counter((r.data["fingerprint"], r.model, r.variant, r.seed) for r in records)
    return any(r.method for r in records) or len({r.model for r in records}) > 1 or max(places.values(), default=0) > 1


def entries_of(records: Sequence[RunRecord]) -> list[Entry]:
    """The records in the order of the tables: full models first, large budgets before small ones, controls last.

    Where a seed has several records of one variant and budget, the settings that differ go into the label.

    Raises:
        DataError: There are no records, or two of the same.
    """
    if not records:
        raise DataError("there are no records to report")
    repeated = {place[3] for place, count in Counter(map(_place, records)).items() if count > 1}
    names = {r.data["fingerprint"]: data_name(r) for r in records}
    entries: dict[tuple[Any, ...], Entry] = {}
    for record in records:
        data, model, budget, label, seed = _place(record)
        if label in repeated:
            others = [r.search for r in records if r.variant == label]
            settings = [f"{k}={v}" for k, v in record.search.items() if any(o.get(k) != v for o in others)]
            label = " ".join([label, *settings])
        key = (data, model, budget, label, seed)
        if key in entries:
            raise DataError(
                f"two records of {names[data]}, {model}, {label}, {record.budget or 'full'}, seed {seed}; "
                "give the records of one grid a data set"
            )
        entries[key] = Entry(names[data], model, budget, label, seed, record)
    return sorted(entries.values(), key=_order)


def _place(record: RunRecord) -> tuple[str, str, Budget | None, str, int]:
    budget = None if record.budget is None else Budget.parse(record.budget)
    return (record.data["fingerprint"], record.model, budget, record.variant, record.seed)


def _order(entry: Entry) -> tuple[Any, ...]:
    method = entry.record.method or entry.record.variant
    control = method in METHODS and METHODS[method].needs == "nothing"
    size = (0, "", 0.0) if entry.budget is None else (1, entry.budget.kind, -entry.budget.amount)
    return (entry.data, entry.model, size, control, method, entry.label != method, entry.label, entry.seed)


# --- parts of a comparison ------------------------------------------------------------------------------------------


def labels(entries: Iterable[Entry]) -> list[str]:
    """Labels but the full model's, in the order of the tables."""
    return list(dict.fromkeys(e.label for e in entries if e.budget is not None))


def groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that differ in nothing but the seed."""
    parts: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for e in entries:
        parts[(e.data, e.model, e.budget, e.label)].append(e)
    return list(parts.values())


def scopes(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """The entries of each data set and model, with a name such as "deepfm on frappe"."""
    several = len({e.data for e in entries}) > 1
    parts: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        parts[(e.data, e.model)].append(e)
    return [(f"{model} on {data}" if several else model, part) for (data, model), part in parts.items()]


# --- values of a record ---------------------------------------------------------------------------------------------


def auc_of(record: RunRecord) -> float | None:
    """Test AUC; None without a test split."""
    return record.test.get("auc")


def rarest_auc_of(record: RunRecord) -> float | None:
    """Test AUC of the tenth of the rows whose rarest value is rarest in training; None if it was not computed."""
    return next((auc for decile, _, _, auc in record.test.get("auc_by_decile") or () if decile == 1), None)


def logloss_of(record: RunRecord) -> float | None:
    """Test logloss; None without a test split."""
    return record.test.get("logloss")


def mean_of(group: Iterable[Entry], value: Value) -> float | None:
    """Mean of a value over the entries that have it."""
    values = [v for e in group if (v := value(e.record)) is not None]
    return statistics.fmean(values) if values else None


def paired_differences(entries: Sequence[Entry], group: Sequence[Entry], against: str, value: Value) -> list[float]:
    """Value of each record of a group, minus that of the reference with the same data, model, seed and budget.

    Args:
        entries: All entries.
        group: Entries of one data set, model, budget and label.
        against: Label of the reference; "full" has no budget.
        value: Value of a record. A pair is left out if either record has none.
    """
    references = {(e.data, e.model, e.budget, e.seed): e.record for e in entries if e.label == against}
    differences = []
    for e in group:
        other = references.get((e.data, e.model, None if against == FULL else e.budget, e.seed))
        here, there = value(e.record), None if other is None else value(other)
        if here is not None and there is not None:
            differences.append(here - there)
    return differences


def ranks(entries: Sequence[Entry]) -> tuple[dict[str, list[float]], int]:
    """Rank of each label by test AUC, where 1 is best and ties share their mean.

    Only cells with all labels are ranked. A cell is one data set, model, budget and seed.

    Returns:
        The ranks by label, one a complete cell, and the number of all cells.
    """
    names = labels(entries)
    cells: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for e in entries:
        auc = auc_of(e.record)
        if e.budget is not None and auc is not None:
            cells[(e.data, e.model, e.budget, e.seed)][e.label] = auc
    complete = [auc_by_label for auc_by_label in cells.values() if len(auc_by_label) == len(names)]
    ranks_by_label: dict[str, list[float]] = {name: [] for name in names}
    for auc_by_label in complete:
        for name, auc in auc_by_label.items():
            better = sum(other > auc for other in auc_by_label.values())
            equal = sum(other == auc for other in auc_by_label.values())
            ranks_by_label[name].append(better + (equal + 1) / 2)
    return ranks_by_label, len(cells)
