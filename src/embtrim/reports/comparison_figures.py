"""The figures of a comparison: losses against bytes, and bars of the cost of searches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from embtrim.experiments.grid import FULL as FULL_LABEL
from embtrim.methods import METHODS
from embtrim.reports.charts import (
    DIM,
    LOOKS,
    SYMBOLS,
    Axis,
    Chart,
    Point,
    Series,
    bytes_axis,
    drawn,
    log_axis,
    names_axis,
    number_axis,
)
from embtrim.reports.entries import Entry, Value, groups, labels, mean_of, paired_differences, scopes
from embtrim.reports.numbers import format_bytes, format_values

# Losses of less are drawn here: seeds differ by more.
LEAST_LOSS = 1e-4
# Labels that ignore the data may lose this many times more than the worst of the others before they are left out.
MOST_ABOVE = 1.5


class Loss(NamedTuple):
    """The mean loss of one label at one budget against the full model.

    Attributes:
        label: Method or variant.
        budget: The budget as written.
        size: Mean bytes of the tables.
        losses: Loss of each seed that has a full model; larger is worse.
    """

    label: str
    budget: str
    size: float
    losses: list[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.losses)


def losses_of(entries: Sequence[Entry], value: Value, sign: float) -> list[Loss]:
    """Losses against the full models of one data set and model, seed by seed; groups without one are left out.

    Args:
        entries: Entries of one data set and model.
        value: The metric of a record.
        sign: -1 if larger values are better, 1 if smaller ones are.
    """
    found = []
    for group in groups(e for e in entries if e.budget is not None):
        differences = [sign * d for d in paired_differences(entries, group, FULL_LABEL, value)]
        size = mean_of(group, lambda r: r.table_bytes)
        if differences and size is not None:
            found.append(Loss(group[0].label, group[0].record.budget or "", size, differences))
    return found


def looks_of(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Colour and symbol by label, the same in all figures of a page.

    The labels that are best in mean rank by test AUC get colours; further ones and controls are grey.
    """
    controls = {e.label for e in entries if is_control(e)}
    sums: dict[str, list[float]] = {name: [] for name in labels(entries) if name not in controls}
    by_budget: dict[Any, list[tuple[float, str]]] = {}
    for group in groups(e for e in entries if e.budget is not None):
        score = mean_of(group, lambda r: r.test.get("auc"))
        if score is not None and group[0].label in sums:
            by_budget.setdefault((group[0].data, group[0].model, group[0].budget), []).append((-score, group[0].label))
    for scores in by_budget.values():
        for rank, (_, name) in enumerate(sorted(scores)):
            sums[name].append((rank + 0.5) / len(scores))
    ordered = sorted(sums, key=lambda name: statistics.fmean(sums[name]) if sums[name] else 1.0)
    looks = {name: LOOKS[number] if number < len(LOOKS) else DIM for number, name in enumerate(ordered)}
    return {name: (looks.get(name, DIM), SYMBOLS[number % len(SYMBOLS)]) for number, name in enumerate(labels(entries))}


def is_control(entry: Entry) -> bool:
    """Whether the method of an entry ignores the data."""
    method = entry.record.method or entry.record.variant
    return method in METHODS and METHODS[method].needs == "nothing"


class Losses(NamedTuple):
    """A figure of losses.

    Attributes:
        drawn: What the template draws.
        outside: Points that lie outside of the figure, in words.
    """

    drawn: dict[str, Any]
    outside: str


def loss_against_bytes(
    entries: Sequence[Entry], found: Sequence[Loss], looks: Mapping[str, tuple[str, str]], title: str
) -> Losses:
    """Losses on a logarithmic axis, a line a label, and the line of the best of all at each size.

    The axis ends below at LEAST_LOSS or above it; smaller losses and gains lie on the bottom line. It ends above where labels that ignore the data
    alone would stretch it.

    Args:
        entries: Entries of one data set and model.
        found: Their losses, see `losses_of`.
        looks: Colours and symbols, see `looks_of`.
        title: Name of the axis.
    """
    if not found:
        return Losses(drawn(Chart(Axis("", 0, 1, []), Axis("", 0, 1, []), [], "")), "")
    controls = {e.label for e in entries if is_control(e)}
    read = [loss.mean for loss in found if loss.label not in controls] or [loss.mean for loss in found]
    top = MOST_ABOVE * max(10 * LEAST_LOSS, *read)
    above = [loss for loss in found if loss.mean > top]
    smallest = min(loss.mean for loss in found)
    is_cut = smallest < 2 * LEAST_LOSS
    y = log_axis(title, LEAST_LOSS if is_cut else 10.0 ** math.floor(math.log10(smallest)), top)
    if is_cut:
        y = replace(y, ticks=[(y.ticks[0][0], f"≤ {y.ticks[0][1]}"), *y.ticks[1:]])
    best = _pareto(found)
    series = [
        Series(
            "best at its size",
            [Point(loss.size, loss.mean, _text(loss), size=0) for loss in best],
            "full pareto", joined=True, labelled=False,
        )
    ]  # fmt: skip
    for name in sorted(looks, key=lambda name: looks[name][0] != DIM):
        own = sorted((loss for loss in found if loss.label == name and loss.mean <= top), key=lambda loss: -loss.size)
        points = [Point(loss.size, loss.mean, _text(loss), hollow=loss.mean < LEAST_LOSS) for loss in own]
        look, symbol = looks[name]
        series.append(Series(name, points, look, symbol, joined=True, dashed=look == DIM))
    summary = "Best at their sizes: " + ", ".join(f"{loss.label} {loss.budget} {loss.mean:+.4f}" for loss in best)
    chart = Chart(bytes_axis([loss.size for loss in found if loss.mean <= top]), y, series, summary, height=440)
    outside = ", ".join(f"{loss.label} {loss.budget} ({loss.mean:.3f})" for loss in above)
    return Losses(drawn(chart), outside)


def _text(loss: Loss) -> str:
    return f"{loss.label} {loss.budget}: {format_bytes(loss.size)}, loss {format_values(loss.losses, signed=True)}, {len(loss.losses)} seeds"


def _pareto(found: Sequence[Loss]) -> list[Loss]:
    """The losses that no smaller or equal model beats, large models first."""
    best: list[Loss] = []
    for loss in sorted(found, key=lambda loss: (loss.size, loss.mean)):
        if not best or loss.mean < best[-1].mean:
            best.append(loss)
    return best[::-1]


def loss_rows(found: Sequence[Loss]) -> list[list[str]]:
    """The losses as rows of a table: label, budget, loss, bytes; those on the line of the best have a mark."""
    best = {(loss.label, loss.budget) for loss in _pareto(found)}
    return [
        [
            loss.label,
            loss.budget,
            f"{loss.mean:+.4f}" + (" ★" if (loss.label, loss.budget) in best else ""),
            format_bytes(loss.size),
        ]
        for loss in sorted(found, key=lambda loss: (-loss.size, loss.mean))
    ]


def cost_bars(entries: Sequence[Entry], title: str, value: Value, log: bool = False) -> dict[str, Any]:
    """One bar for each label and model: the mean over budgets and seeds.

    Args:
        entries: All entries.
        title: Name of the cost, with its unit.
        value: The cost of a record.
        log: Draw a logarithmic axis, which leaves out costs of zero.
    """
    names, parts = labels(entries), scopes(entries)
    thick = min(16.0, 24.0 / len(parts))
    series, words = [], []
    for number, (scope, part) in enumerate(parts):
        means = [mean_of((e for e in part if e.label == name and e.budget is not None), value) for name in names]
        points = []
        for place, mean in enumerate(means):
            if mean is not None and (mean > 0 or not log):
                text = f"{names[place]}, {scope}: {mean:.3g}"
                across = place + (number - (len(parts) - 1) / 2) * (thick + 1) / 30
                points.append(Point(mean, across, text, size=thick))
                words.append(text)
        series.append(Series(scope, points, LOOKS[number % len(LOOKS)], "square", bars=True))
    costs = [p.x for one in series for p in one.points]
    if not costs:
        return drawn(Chart(Axis("", 0, 1, []), Axis("", 0, 1, []), [], ""))
    x = log_axis(title, min(costs) / 2, max(costs) * 1.2) if log else number_axis(title, [0.0, *costs])
    chart = Chart(x, names_axis(names), series, "; ".join(words), 30 * len(names), direct=False, has_names=True)
    return drawn(chart)
