"""Allot a budget: rows, columns and bits of every table together, for the least loss that readings predict.

    loss = eta_r R(sum_f q of dropped rows) + eta_w W(sum_f t_f(w_f)) + Q(sum_f z_f(b_f))

R, W and Q are the measured curves of the readings, eta what retraining leaves of a loss at once. Along the curves' rates
the loss is a sum over tables, so that `spend` divides the bytes along convex hulls (Everett 1963). The rates depend on the
errors of the plan itself; they are found by repetition and a search. Equal widths in each precision are candidates too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embtrim.methods.readings import Curve, Readings, TableReading
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import (
    CODE_BITS,
    Alignment,
    Block,
    BlockShape,
    TablePlan,
    TableShape,
    Target,
    block_rows,
    row_bytes,
    stored_bytes,
)
from embtrim.tasks.row_scores import RowScores

# (rows, bits) of runs of rows, in descending order of energy.
Bands = tuple[tuple[int, int], ...]

# Numbers of rows and columns that are tried: all up to eight, then this many per doubling.
CHOICES_PER_DOUBLING = 4
# Plans whose predicted losses differ by less than this part of the score's standard error are equally good; equal widths
# are then preferred, unless the score does not miss a table that they keep. Two models that order all but one in some
# thousand pairs alike have scores that differ by as much.
CLOSE = 0.02
# Repetitions until the rates fit the plan.
ROUNDS = 4
# The search beside them: factors on the rates, and their powers for rows, widths and bits; a plan is better where it loses
# less by this part; most plans that are tried.
FACTORS = (3.0, 1.5)
DIRECTIONS = ((1, 0, 0), (0, 1, 0), (1, 1, 0), (-1, 0, 0), (0, -1, 0), (-1, -1, 0))
LEAST_GAIN = 1e-3
MOST_TRIALS = 40


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
        ladders_N: Number of the ladder.
        ladders: Bits of the rows: see `ladders_of`.
        bytes_N: Bytes of the choice.
        errors_LN: Errors of each choice: of the rows that it drops, of its columns, of its codes; (3, N).
    """

    table: TablePlan
    rows_N: np.ndarray
    widths_N: np.ndarray
    ladders_N: np.ndarray
    ladders: Sequence[Bands]
    bytes_N: np.ndarray
    errors_LN: np.ndarray

    def layout(self, n: int, alignment: Alignment) -> TableShape:
        """One choice as a layout of the table, without the rows that it keeps."""
        bands = self.ladders[self.ladders_N[n]]
        return _layout(self.table, int(self.rows_N[n]), int(self.widths_N[n]), bands, alignment)


def _layout(table: TablePlan, rows: int, width: int, bands: Bands, alignment: Alignment) -> TableShape:
    columns = tuple(range(width))
    found = [(kept, bits) for kept, bits in _first_rows(bands, rows) if kept]
    own = len(found) > 1 and width > 0
    top = max(bits for _, bits in bands)
    if not own:
        found = [(rows, top)] if rows else []
    blocks = tuple(BlockShape(kept, columns, alignment, bits=bits if own else None) for kept, bits in found)
    return TableShape(table.name, table.num_rows, table.width, blocks, found[0][1] if found else top)


def _first_rows(bands: Bands, rows: int) -> Iterator[tuple[int, int]]:
    """The bands of the first rows alone."""
    for size, bits in bands:
        yield min(size, rows), bits
        rows -= min(size, rows)


def ladders_of(reading: TableReading, levels: Sequence[int]) -> list[Bands]:
    """Ways to give bits to the rows of a table: (rows, bits) of bands of rows in descending order of energy.

    First one precision for all rows, for each level. Then, if there are several levels of codes, bands: every segment
    starts with the fewest bits, and the step to more bits that saves most noise per bit is taken, again and again.
    """
    segments = reading.segments
    found: list[Bands] = [((int(segments.rows_S.sum()), bits),) for bits in levels]
    codes = sorted(bits for bits in levels if bits in segments.noise)
    steps = []
    for s, rows in enumerate(segments.rows_S.tolist()):
        noise = np.array([segments.noise[bits][s] for bits in codes])
        hull = lower_hull(rows * np.array(codes), noise) if len(codes) > 1 else []
        steps += [
            ((noise[after] - noise[before]) / (rows * (codes[after] - codes[before])), s, codes[after])
            for before, after in itertools.pairwise(hull)
        ]
    bits_S = np.full(len(segments.rows_S), min(codes, default=0))
    for _, s, bits in sorted(steps):
        bits_S[s] = bits
        falling = np.maximum.accumulate(bits_S[::-1])[::-1].tolist()  # a row of more energy has no fewer bits
        runs = itertools.groupby(zip(segments.rows_S.tolist(), falling, strict=True), key=lambda pair: pair[1])
        bands = tuple((sum(rows for rows, _ in run), level) for level, run in runs)
        if bands not in found:
            found.append(bands)
    return found


def _noise_of(
    reading: TableReading, bands: Bands, counts: np.ndarray, widths: np.ndarray, *, coordinates: bool
) -> np.ndarray:
    """Noise of the first rows of a table in bands, for each number of columns and rows; (widths, counts).

    All rows of a band have the step of its first segment, which has the largest values. Columns that are trained again are
    as strong as all columns before.
    """
    segments = reading.segments
    ends = np.cumsum(segments.rows_S)
    starts = ends - segments.rows_S
    noise_WS = np.zeros((len(widths), len(ends)))
    start = 0
    for rows, bits in bands:
        inside = (starts >= start) & (starts < start + rows)
        if bits in segments.noise and inside.any():
            first = int(np.flatnonzero(inside)[0])
            whole = len(bands) == 1
            plain, noise_D = (
                (reading.noise[bits], reading.coordinate_noise[bits])
                if whole
                else (segments.noise[bits][first], segments.coordinate_noise[bits][first])
            )
            uses = max(1.0, segments.uses_S.sum() if whole else segments.uses_S[first])
            noise_W = noise_D[widths] if coordinates else np.full(len(widths), plain)
            noise_WS[:, inside] = noise_W[:, None] * segments.uses_S[inside] / uses
        start += rows
    cumulative = np.concatenate([np.zeros((len(widths), 1)), np.cumsum(noise_WS, 1)], 1)
    return np.stack([np.interp(counts, np.append(0, ends), noise_S) for noise_S in cumulative])


def allot(
    readings: Readings,
    full: SizePlan,
    budget: Budget,
    levels: Sequence[int],
    alignment: Alignment,
    *,
    target: Target | None = None,
    recovery: Recovery = Recovery(),  # noqa: B008 - immutable
    keeps_rows: bool = False,
    first_order_alone: bool = True,
    coordinates: bool = True,
) -> Allotment:
    """The plan of least predicted loss within a budget.

    Args:
        readings: Readings of the trained full model.
        full: The plan that keeps everything of this model.
        budget: Budget in percent or bytes.
        levels: Bits that a table may have.
        alignment: How narrow tables reach the full width.
        target: Backend whose bytes are counted.
        recovery: What retraining leaves of each loss.
        keeps_rows: Keep all rows of every table. A table may then still lose all its columns.
        first_order_alone: Whether a table may keep rows for their first-order weights alone.
        coordinates: Whether narrow tables start with the coordinates of the readings. Otherwise they are trained from
            scratch, and what w columns are worth follows from all tables together: a product with another table sees no
            column that one of the two lacks, however few rows a table has.
    """
    lost = {name: reading.lost_D for name, reading in readings.tables.items()}
    if not coordinates:
        lost = _lost_together(lost)
    # Budgets of one kind share them.
    settings = (budget.kind, tuple(levels), alignment, target, keeps_rows, first_order_alone, coordinates)
    if settings not in readings.choices:
        readings.choices[settings] = [
            choices_of(
                full,
                table,
                readings.tables[table.name],
                lost[table.name],
                budget,
                levels,
                alignment,
                target,
                keeps_rows=keeps_rows,
                first_order_alone=first_order_alone and full.first_order,
                coordinates=coordinates,
            )
            for table in full.tables
        ]
    choices = readings.choices[settings]
    levers = list(zip(recovery, (readings.rows, readings.widths, readings.bits), strict=True))
    allowed = full.counted_bytes(budget)
    equal = list(_equal_widths(choices, full.width, levels, allowed))

    def losses_of(chosen: Sequence[int]) -> tuple[float, ...]:
        errors = _errors(choices, chosen)
        return tuple(eta * curve.loss(error) for (eta, curve), error in zip(levers, errors, strict=True))

    def merit(chosen: Sequence[int]) -> tuple[float, float]:
        return sum(losses_of(chosen)), sum(_errors(choices, chosen))

    best = min([*equal, _spent(choices, levers, allowed, merit)], key=merit)
    close = CLOSE * readings.error
    if equal and not coordinates and all(t.absence is None or t.absence > close for t in readings.tables.values()):
        simplest = min(equal, key=merit)
        if merit(simplest)[0] <= merit(best)[0] + close:
            best = simplest
    tables = []
    for of, n in zip(choices, best, strict=True):
        table = _with_rows(of.layout(n, alignment), readings.tables[of.table.name].energies)
        columns = readings.bases[table.name].columns if coordinates else None
        tables.append(table if columns is None else _with_columns(table, columns))
    plan = dataclasses.replace(full, tables=tuple(tables))
    return Allotment(plan, losses_of(best))


def _spent(
    choices: Sequence[Choices],
    levers: Sequence[tuple[float, Curve]],
    allowed: float,
    merit: Callable[[Sequence[int]], tuple[float, float]],
) -> list[int]:
    """The best way found to spend the bytes: where the rates are the slopes of the curves at the plan's own errors.

    The curves bend, bytes come in lumps, and the measured slopes are rough. A pattern search over the rates follows
    (Hooke and Jeeves 1961): a factor on one or two of them is taken while the plan gets better.
    """
    bytes_TN = [of.bytes_N for of in choices]
    found = []

    def tried(rates: Sequence[float]) -> tuple[tuple[float, float], Sequence[float], list[int]]:
        chosen = spend(bytes_TN, [np.array(rates) @ of.errors_LN for of in choices], allowed)
        found.append((merit(chosen), rates, chosen))
        return found[-1]

    rates = [eta * curve.rate(0.0) for eta, curve in levers]
    for _ in range(ROUNDS):
        errors = _errors(choices, tried(rates)[-1])
        slopes = [eta * curve.slope(error) for (eta, curve), error in zip(levers, errors, strict=True)]
        rates = [(rate + slope) / 2 for rate, slope in zip(rates, slopes, strict=True)]
    best = min(found)
    for factor in FACTORS:
        better = True
        while better:
            better = False
            for step in DIRECTIONS:
                while len(found) < MOST_TRIALS:
                    beside = tried([rate * factor**power for rate, power in zip(best[1], step, strict=True)])
                    if beside[0][0] >= best[0][0] * (1 - LEAST_GAIN):
                        break
                    best, better = beside, True
    return best[-1]


def _errors(choices: Sequence[Choices], chosen: Sequence[int]) -> list[float]:
    """Errors of one choice for each table, summed over the tables: of rows, widths and bits."""
    return sum(of.errors_LN[:, n] for of, n in zip(choices, chosen, strict=True)).tolist()  # type: ignore[union-attr]


def _equal_widths(
    choices: Sequence[Choices], full_width: int, levels: Sequence[int], allowed: float
) -> Iterator[list[int]]:
    """For each precision all rows of every table, at the largest equal width that fits."""
    whole = []
    for of in choices:
        bits = {number: bands[0][1] for number, bands in enumerate(of.ladders) if len(bands) == 1}
        every = np.flatnonzero(of.rows_N == of.table.num_rows)
        whole.append({(of.widths_N[n], bits[of.ladders_N[n]]): n for n in every if of.ladders_N[n] in bits})
    for bits in levels:
        for width in reversed(some_numbers(full_width)):
            chosen = [found.get((min(width, of.table.width), bits)) for found, of in zip(whole, choices, strict=True)]
            if None in chosen:
                continue
            if sum(int(of.bytes_N[n]) for of, n in zip(choices, chosen, strict=True)) <= allowed:  # type: ignore[index]
                yield chosen  # type: ignore[misc]
                break


def _with_rows(table: TableShape, energies: RowScores) -> TablePlan:
    """The layout with the rows of most energy, in their bands."""
    kept: list[np.ndarray | range | None] = [None] * len(table.blocks)
    if table.renumbers:
        best = energies.best([block.num_rows for block in table.blocks])
        kept = [block_rows(rows, table.num_rows) for rows in best]
    blocks = [
        Block(block.num_rows, block.columns, block.alignment, rows, bits=block.bits)
        for block, rows in zip(table.blocks, kept, strict=True)
    ]
    return TablePlan(table.name, table.num_rows, table.width, tuple(blocks), table.bits)


def _with_columns(table: TablePlan, ordered: Sequence[int]) -> TablePlan:
    """The table with the first ones of its ordered columns."""
    blocks = (dataclasses.replace(b, columns=tuple(sorted(ordered[: b.width]))) for b in table.blocks)
    return dataclasses.replace(table, blocks=tuple(blocks))


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
    keeps_rows: bool,
    first_order_alone: bool = False,
    coordinates: bool,
) -> Choices:
    """Every number of rows, columns and bits of one table that is worth a try."""
    # A table whose absence does not lower the score is cut first.
    weight = 0.0 if reading.absence is not None and reading.absence <= 0 else 1.0
    counts = np.array([table.num_rows] if keeps_rows else some_numbers(table.num_rows))
    widths = np.array(some_numbers(table.width))
    energy_C = reading.energies.sums(np.append(counts, table.num_rows))
    total = float(energy_C[-1])

    ladders = ladders_of(reading, levels)
    # Without columns the rows that stay hold first-order weights alone. A table without rows reads zero.
    bare = [*([] if keeps_rows else [0]), *(counts.tolist() if first_order_alone or keeps_rows else [])]
    least = list(levels).index(min(levels))
    grid = np.meshgrid(widths, np.arange(len(ladders)), counts, indexing="ij")
    widths_N, ladders_N, rows_N = (
        np.concatenate([axis.ravel(), beside])
        for axis, beside in zip(grid, ([0] * len(bare), [least] * len(bare), bare), strict=True)
    )
    kept_N = np.where(rows_N > 0, energy_C[np.searchsorted(counts, rows_N)], 0.0)
    share_N = weight * kept_N / total if total else np.zeros(len(rows_N))
    noise_WLC = np.stack(
        [_noise_of(reading, bands, counts, widths, coordinates=coordinates) for bands in ladders], axis=1
    )
    noise_N = np.append(weight * noise_WLC.ravel(), np.zeros(len(bare)))
    narrow_N = np.where(rows_N > 0, share_N * lost_D[widths_N], 0.0)
    # Training makes up for columns through those that stay: rows without any are lost as dropped ones are.
    bare_N = (widths_N == 0) & (not keeps_rows)
    rows_lost_N = weight * (total - kept_N) + np.where(bare_N, narrow_N, 0.0)
    errors_LN = np.stack([rows_lost_N, np.where(bare_N, 0.0, narrow_N), noise_N])
    bytes_WLN = _all_bytes(full, table, counts, widths, ladders, budget, alignment, target)
    layouts = [_layout(table, rows, 0, ladders[least], alignment) for rows in bare]
    bytes_N = np.append(bytes_WLN.ravel(), [full.table_bytes(layout, target, budget=budget) for layout in layouts])
    order = np.argsort(bytes_N, kind="stable")  # which `lower_hull` then need not do for every rate
    of_N = (rows_N[order], widths_N[order], ladders_N[order])
    return Choices(table, *of_N, ladders, bytes_N[order], errors_LN[:, order])


def _all_bytes(
    full: SizePlan,
    table: TablePlan,
    counts: np.ndarray,
    widths: np.ndarray,
    ladders: Sequence[Bands],
    budget: Budget,
    alignment: Alignment,
    target: Target | None,
) -> np.ndarray:
    """Bytes of every number of columns, ladder and number of rows; int64 (widths, ladders, counts).

    What a layout takes beside its values is a sum of what depends on the columns (a projection) and of what depends on the
    rows (first-order weights, an id map). Both depend on the bits.
    """

    def beside(rows: int, width: int, bands: Bands) -> int:
        layout = _layout(table, rows, width, bands, alignment)
        return full.table_bytes(layout, target, budget=budget) - layout.num_value_bytes

    bits_used = {bits for bands in ladders for _, bits in bands}
    row_W = {bits: np.array([row_bytes(width, bits) for width in widths.tolist()])[:, None] for bits in bits_used}
    scales_W = {
        bits: np.array([stored_bytes(0, width, bits) for width in widths.tolist()])[:, None] for bits in bits_used
    }
    found = np.empty((len(widths), len(ladders), len(counts)), np.int64)
    dropped = (counts < table.num_rows).astype(np.int64)
    known: dict[tuple[int, bool], np.ndarray] = {}
    for number, bands in enumerate(ladders):
        key = (max(bands[0][1], CODE_BITS), len(bands) > 1)
        if key not in known:
            if target == "fbgemm":  # the padding of a row depends on its columns
                known[key] = np.array(
                    [[beside(rows, width, bands) for rows in counts.tolist()] for width in widths.tolist()]
                )
            else:
                by_width = np.array([beside(int(counts[0]), width, bands) for width in widths.tolist()])
                by_rows = np.array([beside(rows, int(widths[0]), bands) for rows in counts.tolist()])
                known[key] = by_width[:, None] + by_rows - by_rows[0]
        found[:, number] = known[key]
        start = 0
        for size, bits in bands:
            rows_C = np.clip(counts - start, 0, size) + (dropped if not start else 0)
            found[:, number] += rows_C * row_W[bits] + scales_W[bits] * (rows_C > 0)
            start += size
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
    hulls = [np.array(lower_hull(*choices)) for choices in zip(bytes_TN, losses_TN, strict=True)]
    chosen = [int(hull[0]) for hull in hulls]
    left = allowed - sum(int(sizes_N[n]) for sizes_N, n in zip(bytes_TN, chosen, strict=True))
    table_S = np.repeat(np.arange(len(hulls)), [len(hull) - 1 for hull in hulls])
    after_S = np.concatenate([hull[1:] for hull in hulls])
    added_S = np.concatenate([np.diff(sizes_N[hull]) for sizes_N, hull in zip(bytes_TN, hulls, strict=True)])
    saved_S = -np.concatenate([np.diff(losses_N[hull]) for losses_N, hull in zip(losses_TN, hulls, strict=True)])
    order = np.argsort(-saved_S / added_S, kind="stable")  # gains fall along a hull: its steps stay in order
    total = np.cumsum(added_S[order])
    num_fitting = int(np.searchsorted(total, left, side="right"))
    for step in order[:num_fitting].tolist():
        chosen[table_S[step]] = int(after_S[step])
    left -= int(total[num_fitting - 1]) if num_fitting else 0
    ended: set[int] = set()
    for step in order[num_fitting:].tolist():
        table, after = int(table_S[step]), int(after_S[step])
        if table in ended:
            continue
        sizes_N, losses_N, now = bytes_TN[table], losses_TN[table], chosen[table]
        if added_S[step] > left:
            ended.add(table)
            fitting = np.append(np.flatnonzero(sizes_N - sizes_N[now] <= left), now)
            best = fitting[losses_N[fitting] == losses_N[fitting].min()]
            after = int(best[sizes_N[best].argmin()])
        left -= int(sizes_N[after] - sizes_N[now])
        chosen[table] = after
    return chosen


def lower_hull(bytes_N: np.ndarray, losses_N: np.ndarray) -> list[int]:
    """Numbers of the choices on the lower convex hull: bytes rise, and losses fall by less and less per byte."""
    order = np.argsort(bytes_N, kind="stable")  # quick where the bytes ascend already
    ordered_N, losses_N = bytes_N[order], losses_N[order]
    first_G = np.flatnonzero(np.append(True, ordered_N[1:] != ordered_N[:-1]))  # choices of as many bytes are a group
    least_G = np.minimum.reduceat(losses_N, first_G)
    falls = np.flatnonzero(np.append(True, least_G[1:] < np.minimum.accumulate(least_G)[:-1]))
    sizes, losses = ordered_N[first_G[falls]].tolist(), least_G[falls].tolist()
    hull: list[int] = []
    for k, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        while len(hull) > 1:
            before, last = hull[-2:]
            saved = (losses[before] - losses[last]) / (sizes[last] - sizes[before])
            if saved > (losses[last] - loss) / (size - sizes[last]):
                break
            hull.pop()
        hull.append(k)
    groups = falls[hull]
    starts, ends = first_G[groups], np.append(first_G, len(order))[groups + 1]
    return [int(order[start + losses_N[start:end].argmin()]) for start, end in zip(starts, ends, strict=True)]
