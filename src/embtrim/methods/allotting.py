"""Allot a budget: rows, columns and bits of every table together, for the least loss that readings predict.

    loss = eta_r R(sum_f q of dropped rows) + eta_w W(sum_f t_f(w_f)) + Q(sum_f z_f(b_f))

R, W and Q are the measured curves of the readings, eta what retraining leaves of a loss at once. Along the curves' rates
the loss is a sum over tables, so that `spend` divides the bytes along convex hulls (Everett 1963). The rates depend on the
errors of the plan itself; they are found by repetition. Equal widths in each precision are candidates too.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embtrim.methods.readings import Curve, Readings, TableReading
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Block, BlockShape, TablePlan, TableShape, Target

# Numbers of rows and columns that are tried: all up to eight, then this many per doubling.
CHOICES_PER_DOUBLING = 4
# Plans whose predicted losses differ by less than this part of the score's standard error are equally good; equal widths
# are then preferred, unless the score does not miss a table that they keep. Two models that order all but one in some
# thousand pairs alike have scores that differ by as much.
CLOSE = 0.02
# Repetitions until the rates fit the plan.
ROUNDS = 6
# Factors on the rates of rows and of widths that are tried then.
FACTORS = (0.4, 1.0, 2.5)


class Recovery(NamedTuple):
    """What is left of a loss at once: of dropped rows, of columns, and of bits."""

    rows: float = 1.0
    widths: float = 1.0
    bits: float = 1.0


class Allotment(NamedTuple):
    """A plan and the loss of the score that the readings predict for it, by lever: rows, widths, bits."""

    plan: SizePlan
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Predicted loss of the score."""
        return sum(self.losses)

    def by_lever(self) -> dict[str, float]:
        """The losses by the name of the lever."""
        return dict(zip(Recovery._fields, self.losses, strict=True))


class Choices(NamedTuple):
    """Every way to store one table that is worth a try.

    Attributes:
        table: The full table.
        rows_N: Number of rows of each choice; 0 keeps nothing.
        widths_N: Number of columns.
        levels_N: Bits per value.
        bytes_N: Bytes of the choice.
        errors_LN: Errors of each choice: of the rows that it drops, of its columns, of its codes; (3, N).
    """

    table: TablePlan
    rows_N: np.ndarray
    widths_N: np.ndarray
    levels_N: np.ndarray
    bytes_N: np.ndarray
    errors_LN: np.ndarray

    def layout(self, n: int, alignment: Alignment) -> TableShape:
        """One choice as a layout of the table, without the rows that it keeps."""
        return _layout(self.table, int(self.rows_N[n]), int(self.widths_N[n]), int(self.levels_N[n]), alignment)


def _layout(table: TablePlan, rows: int, width: int, bits: int, alignment: Alignment) -> TableShape:
    blocks = (BlockShape(rows, tuple(range(width)), alignment),) if rows else ()
    return TableShape(table.name, table.num_rows, table.width, blocks, bits)


def allot(
    readings: Readings,
    full: SizePlan,
    budget: Budget,
    levels: Sequence[int],
    alignment: Alignment,
    *,
    target: Target | None = None,
    recovery: Recovery = Recovery(),  # noqa: B008 - immutable
    keeps_columns: bool = False,
    keeps_rows: bool = False,
    in_own_basis: bool = True,
) -> Allotment:
    """The plan of least predicted loss within a budget.

    Args:
        readings: Readings of the trained full model.
        full: The plan that keeps everything.
        budget: Budget in percent or bytes.
        levels: Bits that a table may have.
        alignment: How narrow tables reach the full width.
        target: Backend whose bytes are counted.
        recovery: What retraining leaves of each loss.
        keeps_columns: Keep all columns of every table.
        keeps_rows: Keep all rows of every table. A table may then still lose all its columns.
        in_own_basis: Whether a narrow table has coordinates of its own, which are projected back. Otherwise tables share
            their first columns, and what w columns are worth follows from all tables together: a product with another
            table sees no column that one of the two lacks, however few rows a table has.
    """
    lost = {name: reading.lost_D for name, reading in readings.tables.items()}
    if not in_own_basis:
        lost = _lost_together(lost)
    choices = [
        choices_of(
            full,
            table,
            readings.tables[table.name],
            lost[table.name],
            budget,
            levels,
            alignment,
            target,
            keeps_columns=keeps_columns,
            keeps_rows=keeps_rows,
        )
        for table in full.tables
    ]
    levers = list(zip(recovery, (readings.rows, readings.widths, readings.bits), strict=True))
    allowed = full.counted_bytes(budget)
    equal = list(_equal_widths(choices, full.width, levels, allowed))

    def losses_of(chosen: Sequence[int]) -> tuple[float, ...]:
        errors = _errors(choices, chosen)
        return tuple(eta * curve.loss(error) for (eta, curve), error in zip(levers, errors, strict=True))

    def merit(chosen: Sequence[int]) -> tuple[float, float]:
        return sum(losses_of(chosen)), sum(_errors(choices, chosen))

    best = min([*equal, *_spent(choices, levers, allowed)], key=merit)
    close = CLOSE * readings.error
    if equal and not in_own_basis and all(t.absence is None or t.absence > close for t in readings.tables.values()):
        simplest = min(equal, key=merit)
        if merit(simplest)[0] <= merit(best)[0] + close:
            best = simplest
    tables = [of.layout(n, alignment) for of, n in zip(choices, best, strict=True)]
    plan = dataclasses.replace(full, tables=tuple(_with_rows(t, readings.tables[t.name].energy_V) for t in tables))
    return Allotment(plan, losses_of(best))


def _spent(choices: Sequence[Choices], levers: Sequence[tuple[float, Curve]], allowed: float) -> Iterator[list[int]]:
    """Ways to spend the bytes, at rates of loss per error that fit the plan better and better, and at some beside them."""
    bytes_TN = [of.bytes_N for of in choices]

    def spent(rates: Sequence[float]) -> list[int]:
        return spend(bytes_TN, [np.array(rates) @ of.errors_LN for of in choices], allowed)

    rates = [eta * curve.rate(0.0) for eta, curve in levers]
    for _ in range(ROUNDS):
        chosen = spent(rates)
        yield chosen
        found = zip(rates, levers, _errors(choices, chosen), strict=True)
        rates = [(rate + eta * curve.rate(error)) / 2 for rate, (eta, curve), error in found]
    # The curves bend, and bytes come in lumps: rates beside the fixed point may find a better plan.
    for of_rows, of_widths in itertools.product(FACTORS, FACTORS):
        yield spent([rates[0] * of_rows, rates[1] * of_widths, rates[2]])


def _errors(choices: Sequence[Choices], chosen: Sequence[int]) -> list[float]:
    """Errors of one choice for each table, summed over the tables: of rows, widths and bits."""
    return sum(of.errors_LN[:, n] for of, n in zip(choices, chosen, strict=True)).tolist()  # type: ignore[union-attr]


def _equal_widths(
    choices: Sequence[Choices], full_width: int, levels: Sequence[int], allowed: float
) -> Iterator[list[int]]:
    """For each precision all rows of every table, at the largest equal width that fits."""
    whole = [
        {(of.widths_N[n], of.levels_N[n]): n for n in np.flatnonzero(of.rows_N == of.table.num_rows)} for of in choices
    ]
    for bits in levels:
        for width in reversed(some_numbers(full_width)):
            chosen = [found.get((min(width, of.table.width), bits)) for found, of in zip(whole, choices, strict=True)]
            if None in chosen:
                continue
            if sum(int(of.bytes_N[n]) for of, n in zip(choices, chosen, strict=True)) <= allowed:  # type: ignore[index]
                yield chosen  # type: ignore[misc]
                break


def _with_rows(table: TableShape, energy_V: np.ndarray) -> TablePlan:
    """The layout with the rows of most energy."""
    rows = None
    if table.num_kept < table.num_rows:
        rows = np.sort(np.argsort(-energy_V, kind="stable")[: table.num_kept]).astype(np.int32)
    blocks = tuple(Block(block.num_rows, block.columns, block.alignment, rows) for block in table.blocks)
    return TablePlan(table.name, table.num_rows, table.width, blocks, table.bits)


def _lost_together(lost: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each table, what it loses without columns at all, times the part that all tables lose on average at w columns."""
    width = max(map(len, lost.values()))
    padded = [np.pad(lost_D, (0, width - len(lost_D))) for lost_D in lost.values()]
    total_D = np.sum(padded, axis=0)
    part_D = total_D / max(float(total_D[0]), 1e-300)
    return {
        name: lost_D[0] * np.where(np.arange(len(lost_D)) < len(lost_D) - 1, part_D[: len(lost_D)], 0.0)
        for name, lost_D in lost.items()
    }


def choices_of(
    full: SizePlan,
    table: TablePlan,
    reading: TableReading,
    lost_D: np.ndarray,
    budget: Budget,
    levels: Sequence[int],
    alignment: Alignment,
    target: Target | None,
    *,
    keeps_columns: bool,
    keeps_rows: bool,
) -> Choices:
    """Every number of rows, columns and bits of one table that is worth a try."""
    kept_V = np.concatenate([[0.0], np.cumsum(np.sort(reading.energy_V)[::-1])])
    total = float(kept_V[-1])
    # A table whose absence does not lower the score is cut first.
    weight = 0.0 if reading.absence is not None and reading.absence <= 0 else 1.0
    counts = np.array([table.num_rows] if keeps_rows else some_numbers(table.num_rows))
    widths = np.array([table.width] if keeps_columns else some_numbers(table.width))

    def num_bytes(rows: int, width: int, bits: int) -> int:
        return full.table_bytes(_layout(table, rows, width, bits, alignment), target, budget=budget)

    # No row; or, where no row and no first-order weight may go, no column. A table without rows reads zero.
    nothing = (0, min(levels), table.num_rows if keeps_rows else 0)
    bytes_WBN = _all_bytes(num_bytes, table.num_rows, counts, widths, levels)
    grid = np.meshgrid(widths, np.array(levels), counts, indexing="ij")
    widths_N, levels_N, rows_N = (np.append(axis.ravel(), least) for axis, least in zip(grid, nothing, strict=True))
    share_N = weight * kept_V[rows_N] / total if total else np.zeros(len(rows_N))
    noise_N = np.where(widths_N > 0, [reading.noise.get(int(bits), 0.0) for bits in levels_N], 0.0)
    errors_LN = np.stack(
        [weight * (total - kept_V[rows_N]), np.where(rows_N > 0, share_N * lost_D[widths_N], 0.0), share_N * noise_N]
    )
    bytes_N = np.append(bytes_WBN.ravel(), num_bytes(nothing[2], 0, min(levels)))
    return Choices(table, rows_N, widths_N, levels_N, bytes_N, errors_LN)


def _all_bytes(
    num_bytes: Callable[[int, int, int], int],
    most_rows: int,
    counts: np.ndarray,
    widths: np.ndarray,
    levels: Sequence[int],
) -> np.ndarray:
    """Bytes of every number of columns, bits and rows; int64 (widths, levels, counts).

    Below all rows, which need no DROPPED row, the bytes of two layouts differ by so much a row: an id map depends on the
    rows alone. A few counts per layout, and one layout at every count, give all.
    """
    some = counts[counts < most_rows]
    found = np.empty((len(widths), len(levels), len(counts)), np.int64)
    for w, width in enumerate(widths.tolist()):
        for b, bits in enumerate(levels):
            if len(some) < 2 or not (w or b):
                found[w, b] = [num_bytes(count, width, bits) for count in counts.tolist()]
                continue
            first, second = (num_bytes(count, width, bits) for count in some[:2].tolist())
            base = found[0, 0, : len(some)]
            a_row = (second - first - (base[1] - base[0])) / (some[1] - some[0])
            found[w, b, : len(some)] = first + (base - base[0]) + np.rint(a_row * (some - some[0])).astype(np.int64)
            if len(some) < len(counts):
                found[w, b, -1] = num_bytes(most_rows, width, bits)
    return found


def some_numbers(most: int) -> list[int]:
    """Numbers from 1 to `most`, ascending: all up to eight, then some per doubling."""
    steps = range(3 * CHOICES_PER_DOUBLING, int(np.log2(most) * CHOICES_PER_DOUBLING) + 1)
    return sorted({*range(1, min(8, most) + 1), *(round(2 ** (k / CHOICES_PER_DOUBLING)) for k in steps), most})


def spend(bytes_TN: Sequence[np.ndarray], losses_TN: Sequence[np.ndarray], allowed: float) -> list[int]:
    """The number of one choice for each table, such that the losses add up to little within a number of bytes.

    Each table starts with its smallest choice. The step that saves most loss per byte is then taken, again and again, along
    the lower convex hull of each table's choices: no other choices of as many bytes lose less (Everett 1963). If a step does
    not fit, the table gets its best choice that does.

    Args:
        bytes_TN: Bytes of the choices of each table, in any order.
        losses_TN: Losses of the same choices.
        allowed: Bytes of all tables together. If the smallest choices exceed them, the smallest choices are returned.
    """
    hulls = [lower_hull(sizes_N, losses_N) for sizes_N, losses_N in zip(bytes_TN, losses_TN, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = allowed - sum(int(sizes_N[n]) for sizes_N, n in zip(bytes_TN, chosen, strict=True))
    steps = [(-gain, table, 1) for table in range(len(hulls)) for gain in _gains(bytes_TN, losses_TN, hulls, table, 1)]
    heapq.heapify(steps)
    while steps:
        _, table, place = heapq.heappop(steps)
        sizes_N, losses_N, now = bytes_TN[table], losses_TN[table], chosen[table]
        after = hulls[table][place]
        if sizes_N[after] - sizes_N[now] <= left:
            for gain in _gains(bytes_TN, losses_TN, hulls, table, place + 1):
                heapq.heappush(steps, (-gain, table, place + 1))
        else:
            fitting = np.append(np.flatnonzero(sizes_N - sizes_N[now] <= left), now)
            after = int(fitting[np.lexsort((sizes_N[fitting], losses_N[fitting]))[0]])
        left -= int(sizes_N[after] - sizes_N[now])
        chosen[table] = after
    return chosen


def _gains(
    bytes_TN: Sequence[np.ndarray], losses_TN: Sequence[np.ndarray], hulls: Sequence[list[int]], table: int, place: int
) -> Iterator[float]:
    """Loss that a step along a table's hull saves per byte; nothing at the end of the hull."""
    if place < len(hulls[table]):
        yield _saved(bytes_TN[table], losses_TN[table], hulls[table][place - 1], hulls[table][place])


def lower_hull(bytes_N: np.ndarray, losses_N: np.ndarray) -> list[int]:
    """Numbers of the choices on the lower convex hull: bytes rise, and losses fall by less and less per byte."""
    order = np.lexsort((losses_N, bytes_N))
    least = np.minimum.accumulate(losses_N[order])
    falls = np.append(True, losses_N[order][1:] < least[:-1])
    hull: list[int] = []
    for choice in order[falls].tolist():
        while len(hull) > 1 and _saved(bytes_N, losses_N, hull[-2], hull[-1]) <= _saved(
            bytes_N, losses_N, hull[-1], choice
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _saved(bytes_N: np.ndarray, losses_N: np.ndarray, smaller: int, larger: int) -> float:
    """Loss that a larger choice saves per byte."""
    return float((losses_N[smaller] - losses_N[larger]) / (bytes_N[larger] - bytes_N[smaller]))
