"""Notes on what a batch reads of the tables of a foreign model: costs of a compact table, and fields of a flat one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.survey import Finding, cost_of_reading
from embtrim.tasks.watching import BatchReads, Column


def with_reads(
    findings: Sequence[Finding], model: nn.Module, sites: Sequence[ModuleSite], reads: Mapping[str, BatchReads]
) -> list[Finding]:
    """Findings with notes on what a batch reads of the tables that were found."""
    notes: dict[str, list[str]] = {}
    for site in sites:
        found, counts = notes.setdefault(site.path, []), reads[site.path].counts
        ties = sum(name == "weight" and type(reader).forward is nn.Linear.forward for reader, name in site.readers)
        if counts["product"] > ties:
            found.append("vectors are multiplied by all of its weight: in a compact table by what it stores")
        if counts["whole"]:
            times = "once" if counts["whole"] == 1 else f"{counts['whole']} times"
            found.append(f"a batch reads all of its weight {times}, {cost_of_reading(site.module)}")
        if len(site.names) == 1 and (columns := reads[site.path].stretches()):
            found.append(_fields_line(model, site, columns))
    return [
        dataclasses.replace(finding, note="; ".join(filter(None, [finding.note, *notes.get(finding.name, [])])))
        for finding in findings
    ]


def _fields_line(model: nn.Module, site: ModuleSite, columns: Sequence[Column]) -> str:
    """The advice to name the fields of a flat table, with the line to write."""
    starts = next(_offsets(model, columns, site.num_rows[0]), None)
    names = [f"field_{number}" for number in range(len(columns))]
    if starts is not None:
        sizes = np.diff([*starts, site.num_rows[0]]).tolist()
        line = json.dumps({site.path: dict(zip(names, sizes, strict=True))})
        return f"{len(columns)} ids of a row go into it: say Task(..., fields={line}), with names of your own"
    rows = ", ".join(f'"{name}": ROWS' for name in names)
    seen = ", ".join(f"{low:,} to {high:,}" for low, high, _ in columns[:8])
    more = ", .." if len(columns) > 8 else ""
    return (
        f'{len(columns)} ids of a row go into it: say Task(..., fields={{"{site.path}": {{{rows}}}}}), with the ROWS of each '
        f"field; a batch reads {seen}{more}"
    )


def _offsets(model: nn.Module, columns: Sequence[Column], num_rows: int) -> Iterator[list[int]]:
    """First rows of the fields of a flat table, where the model holds them, or the sizes of the fields."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            numbers = _whole_numbers(value)
            for starts in (numbers, numbers[:-1], np.cumsum([0, *numbers[:-1]]).tolist()):
                if len(starts) != len(columns) or starts[0] != 0 or starts[-1] >= num_rows:
                    continue
                ends = [*starts[1:], num_rows]
                if all(s <= low and high < e for s, e, (low, high, _) in zip(starts, ends, columns, strict=True)):
                    yield starts


def _whole_numbers(value: Any) -> list[int]:
    """A list of whole numbers that an attribute holds; empty if it holds anything else."""
    if isinstance(value, Tensor | np.ndarray):
        is_list = value.ndim == 1 and "int" in str(value.dtype)
        return value.tolist() if is_list else []
    if isinstance(value, list | tuple) and all(isinstance(number, int | np.integer) for number in value):
        return [int(number) for number in value]
    return []
