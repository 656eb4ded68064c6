"""Readings of a trained model: what its score loses at once without rows, columns and bits, in forward passes.

Errors of all kinds are measured in one unit, the second-order loss of the embedded training data:

    q_r     = phi_f n_r ||e_r - mean_f||^2 / 2N     of a row that reads the mean of its table, phi_f = tr(G_f) / D;
              first-order weights add n_r (a_r - mean)^2 / 2N times their own sensitivity
    t_f(w)  = the loss that the first w coordinates of a table leave
    z_f(b)  = phi_f sum_r n_r ||e_r - stored_b(e_r)||^2 / 2N                of storing a table in b bits
    z_f(b,w) = sum_{j<w} g_j sum_r n_r (c_rj - stored_b(c_rj))^2 / 2N       of storing w coordinates c_r = e_r A_w in b bits

Which coordinates a table may have depends on the model; A, t_f and g_j are those of compaction/low_rank.py.

The unit weighs tables and rows against each other. It is not the loss of the score that the user watches: a curve for
each lever says how much validation score so much of the unit costs, measured on the user's own model with all tables cut
alike. A table whose absence does not lower the score is read as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embtrim.compaction.low_rank import Basis, bases, coordinates_of, mean_of, num_occurrences
from embtrim.plan.table import BITS, BYTES_PER_SCALE, CODE_BITS
from embtrim.system.modules import evaluating
from embtrim.system.progress import tracked
from embtrim.tables.codes import as_coded
from embtrim.tables.kernels import kernels_to_read
from embtrim.tables.kernels.torch import CHUNK_ROWS
from embtrim.tables.packing import fit_codes, together
from embtrim.tasks.row_scores import NOTHING, Cut, RowScores, key_bounds, nth_keys
from embtrim.tasks.sharing import ALONE, OneProcess
from embtrim.tasks.sites import weights_kept
from embtrim.tasks.table_parts import FIRST_ORDER, Change, FirstOrder, TablePart
from embtrim.tasks.task import Task

# Scale and offset (W,) of the codes of a table.
Codes = tuple[Tensor, Tensor]

# Most validation rows to score on, and the part of the training rows that they are at most: about twenty passes then
# take well under an epoch.
MOST_ROWS, PART_OF_TRAIN = 32_768, 1 / 16
# Least rows to score on, whatever their part: AUC on fewer says little.
LEAST_ROWS = 8_192
# Shares of all rows that are kept, in order of their energy.
ROW_SHARES = (0.85, 0.7, 0.55, 0.4, 0.25, 0.12, 0.05, 0.0)
# Bits of codes whose loss is measured; fp16 loses nothing that a score shows.
CODE_LEVELS = tuple(bits for bits in BITS if bits <= CODE_BITS)
# Segments of rows for bands of bits: a bit more for a row is worth it where the row has four times the energy. A segment
# has rows enough to pay for its scales: a bit less for so many rows saves the bytes of a scale and an offset.
ENERGY_PER_SEGMENT, LEAST_SEGMENT = 4.0, 8 * BYTES_PER_SCALE
MOST_SEGMENTS = 8
# Most rows by which scales are fitted for a reading.
FITTED_ROWS = 65_536
# Tables that hold this part of all bytes are also read alone, replaced by their mean.
LARGE_PART = 0.02
# A loss that counts as none: rates stay positive, so that of two plans without a loss the one of less error is better.
LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Segments:
    """Rows of one table in descending order of energy, cut where the energy has fallen to a part.

    Attributes:
        rows_S: Number of rows of each segment.
        uses_S: How often the rows of each segment occur in the training data.
        noise: z_f(b) of each segment with scales of its own, by bits; float64 (S,).
        coordinate_noise: z_f(b, w) of each segment for w = 0..D, by bits; float64 (S, D + 1).
    """

    rows_S: np.ndarray
    uses_S: np.ndarray
    noise: Mapping[int, np.ndarray]
    coordinate_noise: Mapping[int, np.ndarray]


@dataclass(frozen=True)
class TableReading:
    """What is known of one table.

    Attributes:
        energies: q_r of each row; see the module docstring.
        lost_D: t_f(w) for w = 0..D.
        noise: z_f(b) by bits.
        coordinate_noise: z_f(b, w) for w = 0..D, by bits.
        segments: The rows in segments of descending energy, for bands of bits.
        absence: Loss of the score if all rows read the mean; None if it was not measured. Where several tables are
            needless one by one and missed together, the loss that this one adds to those before it.
    """

    energies: RowScores
    lost_D: np.ndarray
    noise: Mapping[int, float]
    coordinate_noise: Mapping[int, np.ndarray]
    segments: Segments
    absence: float | None = None


@dataclass(frozen=True)
class Curve:
    """Loss of the score against the error of one lever, measured where all tables are cut alike.

    Attributes:
        errors: Sums over all tables, ascending from 0.
        losses: Loss of the score at each error, made to rise.
        settings: Cut of each point: the share of rows, the width, or the bits.
    """

    errors: tuple[float, ...]
    losses: tuple[float, ...]
    settings: tuple[float, ...]

    def loss(self, error: float) -> float:
        """Loss of the score at an error, between the measured points."""
        return float(np.interp(error, self.errors, self.losses))

    def rate(self, error: float) -> float:
        """Loss per unit of error up to an error, and at least up to the first measured point."""
        error = max(error, self.errors[1] if len(self.errors) > 1 else 0.0, 1e-300)
        return max(self.loss(error), LEAST_LOSS) / error

    def slope(self, error: float) -> float:
        """Loss per further unit of error, between two thirds and three halves of an error."""
        low, high = error / 1.5, error * 1.5
        return max(self.loss(high) - self.loss(low), LEAST_LOSS) / (high - low) if high > low else self.rate(0.0)


@dataclass(frozen=True)
class Readings:
    """Everything that a planner needs to know of a trained model; see the module docstring.

    Attributes:
        score: Score of the full model on the rows read.
        error: Standard error of the score; 0 where the task cannot tell.
        tables: The reading of each table, by name.
        rows: Curve of dropped rows.
        widths: Curve of narrow tables.
        bits: Curve of codes.
        bases: Coordinates of each table.
    """

    score: float
    error: float
    tables: Mapping[str, TableReading]
    rows: Curve
    widths: Curve
    bits: Curve
    bases: Mapping[str, Basis]

    @functools.cached_property
    def choices(self) -> dict[Any, Any]:
        """What `allot` has made of the readings, by its settings, so that other budgets need not make it again."""
        return {}

    def without_absences(self) -> Readings:
        """The readings of a model whose tables were not read alone."""
        tables = {name: dataclasses.replace(table, absence=None) for name, table in self.tables.items()}
        return dataclasses.replace(self, tables=tables)

    def summary(self) -> dict[str, Any]:
        """The curves and the absences as JSON-able values."""
        curves = {
            name: [
                {"setting": setting, "error": error, "loss": loss}
                for setting, error, loss in zip(curve.settings, curve.errors, curve.losses, strict=True)
            ]
            for name, curve in (("rows", self.rows), ("widths", self.widths), ("bits", self.bits))
        }
        absences = {name: table.absence for name, table in self.tables.items() if table.absence is not None}
        return {"score": self.score, "standard_error": self.error, "curves": curves, "absences": absences}


def read(task: Task) -> Readings:
    """Read a trained model: one backward and about twenty forward passes over a sample of the validation rows.

    The model is as before afterwards, bit by bit.

    Args:
        task: Task of the trained full model.
    """
    with evaluating(task.model), weights_kept(task.model):
        return _readings(task)


def _readings(task: Task) -> Readings:
    parts = task.table_parts()
    counts = {name: part.count_N for name, part in parts.items()}
    train_rows = num_occurrences(counts, task)
    task = task.sampled(max(LEAST_ROWS, min(MOST_ROWS, int(PART_OF_TRAIN * train_rows))))
    weights = {name: part.weight_ND for name, part in parts.items()}
    found, first_order = bases(task, weights, counts, coordinates_of(task.model)), task.first_order()
    tables, codes = {}, {}
    for name, basis in found.items():
        tables[name], codes[name] = _table(parts[name], basis, train_rows, first_order, task)
    reader = _Reader(task, found, counts, first_order)
    absences, needless = _absences(reader)
    tables = {name: dataclasses.replace(table, absence=absences.get(name)) for name, table in tables.items()}
    rows = _read_rows(reader, tables, needless)
    widths, bits = _read_widths(reader, tables), _read_bits(reader, tables, codes)
    return Readings(reader.score, task.score_error(task.model), tables, rows, widths, bits, found)


# z_f(b) and z_f(b, w) of rows, and their codes, by bits.
_Noises = tuple[dict[int, float], dict[int, np.ndarray], dict[int, Codes]]


def _table(
    part: TablePart, basis: Basis, train_rows: int, first_order: FirstOrder | None, group: OneProcess
) -> tuple[TableReading, Mapping[int, Codes]]:
    """The reading of a table, and its codes by bits."""
    weight_ND, count_N = part.weight_ND, part.count_N
    half, width = 1 / (2 * train_rows), weight_ND.shape[1]
    unit = basis.sensitivity * half
    # Columns are coded alone: plain ones and coordinates cost one pass.
    both_NC = torch.cat([weight_ND, weight_ND @ basis.encode_DD], 1)
    energy_N = unit * row_energies(weight_ND, count_N, basis.mean_D)
    if first_order is not None:
        weight_N1 = first_order.weights[part.name][:, None]
        energy_N += half * first_order.sensitivity * row_energies(weight_N1, count_N, mean_of(weight_N1, count_N))
    energies = RowScores(energy_N, part.first, part.num_rows, group)

    def noises(values_NC: Tensor, count_N: np.ndarray, first: int, num_rows: int) -> _Noises:
        plain, own, codes = {}, {}, {}
        for bits in CODE_LEVELS:
            scale_C, offset_C = fitted_codes(values_NC, count_N, bits, first, num_rows, group)
            errors_C = code_errors(values_NC, count_N, bits, (scale_C, offset_C), group)
            plain[bits] = unit * errors_C[:width].sum()
            own[bits] = half * np.append(0.0, np.cumsum(basis.gain_D * errors_C[width:]))
            codes[bits] = scale_C[:width], offset_C[:width]
        return plain, own, codes

    edges = _edges(energies)
    sizes = [stop - start for (start, _), (stop, _) in itertools.pairwise(edges)]
    own_parts = [energies.own_rows(start, stop) for (_, start), (_, stop) in itertools.pairwise(edges)]
    plain, own, codes = noises(both_NC, count_N, part.first, part.num_rows)
    found = [noises(both_NC[rows], count_N[rows], 0, size) for rows, size in zip(own_parts, sizes, strict=True)]
    uses = torch.tensor([float(count_N[rows].sum()) for rows in own_parts], dtype=torch.float64)
    segments = Segments(
        np.array(sizes),
        group.summed(uses).numpy(),
        {bits: np.array([noise[bits] for noise, *_ in found]) for bits in CODE_LEVELS},
        {bits: np.stack([noise[bits] for _, noise, _ in found]) for bits in CODE_LEVELS},
    )
    return TableReading(energies, basis.lost_D, plain, own, segments), codes


def _edges(energies: RowScores) -> list[tuple[int, Cut]]:
    """Numbers of rows before each segment, and before the end; and the cuts there."""
    most = energies.value_of(key_bounds([energies])[1])
    thresholds = [energies.cut_at(most / ENERGY_PER_SEGMENT**k) for k in range(1, MOST_SEGMENTS)]
    edges = [(0, NOTHING)]
    for number, cut in zip(energies.total(thresholds).tolist(), thresholds, strict=True):
        if number - edges[-1][0] >= LEAST_SEGMENT and energies.num_rows - number >= LEAST_SEGMENT:
            edges.append((number, cut))
    return [*edges, (energies.num_rows, energies.cut_at(-np.inf))]


class _Reader:
    """Scores the model of a task with changed tables.

    Attributes:
        means: Mean of each table over the training data (D,), by its name, and of first-order weights (1,).
    """

    def __init__(
        self,
        task: Task,
        found: Mapping[str, Basis],
        counts: Mapping[str, np.ndarray],
        first_order: FirstOrder | None,
    ) -> None:
        self.task, self.bases = task, found
        self.means = {name: basis.mean_D for name, basis in found.items()}
        if first_order is not None:
            for name, weight_V in first_order.weights.items():
                self.means[FIRST_ORDER + name] = mean_of(weight_V[:, None], counts[name])
        self.score = task.valid_score(task.model)

    def absent(self, names: Sequence[str]) -> dict[str, Change]:
        """The changes after which all rows of some tables read their mean."""
        return {
            part: lambda values, _rows, part=part: self.means[part].expand_as(values)
            for name in names
            for part in self.parts_of(name)
        }

    def parts_of(self, name: str) -> list[str]:
        """Names of all values that a table's rows hold."""
        return [part for part in (name, FIRST_ORDER + name) if part in self.means]

    def losses(self, what: str, changes: Sequence[Mapping[str, Change]]) -> list[float]:
        """Loss of the score under each of several changes to tables; see `Task.changed`."""
        found = []
        for change in tracked(changes, what, len(changes), self.task.progress):
            with self.task.changed(change):
                found.append(self.score - self.task.valid_score(self.task.model))
        return found


def _read_rows(reader: _Reader, tables: Mapping[str, TableReading], needless: Sequence[str]) -> Curve:
    """Rows beyond a share of all, in order of energy over all tables, read the mean of their table.

    Tables that the score does not need read it throughout, and do not count: a plan drops them first.
    """
    if len(needless) == len(tables):  # then all are needed: the score may rest on dense fields, or on luck
        needless = []
    needed = {name: table.energies for name, table in tables.items() if name not in needless}
    num_rows = sum(scores.num_rows for scores in needed.values())
    ranks = np.array([int(share * num_rows) for share in ROW_SHARES])
    first = next(iter(needed.values()))
    values = [first.value_of(key) for key in nth_keys(list(needed.values()), ranks)]
    thresholds = [value if share else np.inf for share, value in zip(ROW_SHARES, values, strict=True)]

    def without(name: str, threshold: float) -> dict[str, Change]:
        dropped_N = torch.from_numpy(needed[name].scores <= threshold)

        def to(mean_D: Tensor) -> Change:
            return lambda part, rows: torch.where(dropped_N[rows, None].to(part.device), mean_D, part)

        return {part: to(reader.means[part]) for part in reader.parts_of(name)}

    changes = [reader.absent(needless) for _ in thresholds]
    for change, threshold in zip(changes, thresholds, strict=True):
        for name in needed:
            change |= without(name, threshold)
    losses = reader.losses("reading rows", changes)
    lost = [sum(float(e.scores[e.scores <= t].sum()) for e in needed.values()) for t in thresholds]
    errors = reader.task.summed(torch.tensor(lost, dtype=torch.float64)).tolist()
    return _rising(ROW_SHARES, errors, losses, 1.0)


def _read_widths(reader: _Reader, tables: Mapping[str, TableReading]) -> Curve:
    """All tables at their best w coordinates, for halves, quarters and so on of the full width."""
    width = max(len(table.lost_D) - 1 for table in tables.values())
    widths = [width >> step for step in range(1, width.bit_length())]

    def narrowed(name: str, columns: int) -> Change:
        basis = reader.bases[name]
        narrow = basis.encode_DD[:, :columns] @ basis.decode_DD[:columns]
        return lambda part, _rows: part @ narrow

    def is_cut(name: str, columns: int) -> bool:
        return columns < len(tables[name].lost_D) - 1

    losses = reader.losses(
        "reading widths", [{n: narrowed(n, columns) for n in tables if is_cut(n, columns)} for columns in widths]
    )
    errors = [
        sum(float(table.lost_D[columns]) for name, table in tables.items() if is_cut(name, columns))
        for columns in widths
    ]
    return _rising(widths, errors, losses, width)


def _read_bits(reader: _Reader, tables: Mapping[str, TableReading], codes: Mapping[str, Mapping[int, Codes]]) -> Curve:
    """All tables as their codes read."""

    def coded(name: str, bits: int) -> Change:
        return lambda part, _rows: as_coded(part.float(), *codes[name][bits], bits)

    losses = reader.losses("reading bits", [{name: coded(name, bits) for name in tables} for bits in CODE_LEVELS])
    return _rising(CODE_LEVELS, [sum(table.noise[b] for table in tables.values()) for b in CODE_LEVELS], losses, 32)


def _absences(reader: _Reader) -> tuple[dict[str, float], list[str]]:
    """Loss of the score where one large table reads its mean, by table, and the tables that are needless together.

    A table may be needless alone and be missed beside others that carry the same signal. It then has the loss that its
    absence adds to theirs.
    """
    sizes = {table.name: table.num_rows * table.width for table in reader.task.full_plan().tables}
    large = [name for name in reader.bases if sizes[name] >= LARGE_PART * sum(sizes.values())]
    losses = dict(zip(large, reader.losses("reading tables", [reader.absent([name]) for name in large]), strict=True))
    needless = sorted((name for name in large if losses[name] <= 0), key=losses.__getitem__)

    def together(names: Sequence[str]) -> float:
        return reader.losses("reading tables together", [reader.absent(names)])[0]

    if len(needless) < 2 or together(needless) <= 0:
        return losses, needless
    found, before = needless[:1], losses[needless[0]]
    for name in needless[1:]:
        now = together([*found, name])
        if now <= 0:
            found.append(name)
            before = now
        else:
            losses[name] = now - before
    return losses, found


def _rising(settings: Sequence[float], errors: Sequence[float], losses: Sequence[float], whole: float) -> Curve:
    """A curve that begins at no error. Its losses never fall: a score that rises by chance does not count as a gain."""
    order = np.argsort(errors, kind="stable")
    found = np.maximum.accumulate(np.maximum(0.0, np.array(losses)[order]))
    return Curve(
        (0.0, *np.array(errors, float)[order].tolist()),
        (0.0, *found.tolist()),
        (whole, *np.array(settings, float)[order].tolist()),
    )


def row_energies(weight_VD: Tensor, count_V: np.ndarray, mean_D: Tensor) -> np.ndarray:
    """n_r ||e_r - mean||^2 of each row, float64 (V,)."""
    parts = zip(torch.from_numpy(count_V).double().split(CHUNK_ROWS), weight_VD.split(CHUNK_ROWS), strict=True)
    return torch.cat([count * (part - mean_D).double().square().sum(1).cpu() for count, part in parts]).numpy()


def fitted_codes(
    weight_ND: Tensor,
    count_N: np.ndarray,
    bits: int,
    first: int = 0,
    num_rows: int | None = None,
    group: OneProcess = ALONE,
) -> Codes:
    """Scale and offset (D,) of the codes of a table, fitted to a sample of its rows if they are many.

    Args:
        weight_ND: Rows that this process holds.
        count_N: How often they are read; a count for each column, (N, D), is allowed.
        bits: Bits per value, 8 or fewer.
        first: The first of them.
        num_rows: Rows of the table; None for N.
        group: Processes that hold the other rows.
    """
    every = max(1, -(-(len(weight_ND) if num_rows is None else num_rows) // FITTED_ROWS))
    rows = slice(-first % every, None, every)
    return fit_codes(weight_ND[rows].float(), bits, torch.from_numpy(count_N[rows]).to(weight_ND.device), group)


def code_errors(
    values_VW: Tensor, count_V: np.ndarray, bits: int, codes: Codes | None = None, group: OneProcess = ALONE
) -> np.ndarray:
    """sum_r n_r (v_r - stored(v_r))^2 of each column of a table in 16 bits or codes, float64 (W,); 0 in 32 bits.

    The rows may have a count for each column, (V, W).

    Args:
        values_VW: Rows of the table that this process holds.
        count_V: How often they are read.
        bits: Bits per value.
        codes: Scale and offset of the codes; None fits them to these rows.
        group: Processes that hold the other rows.
    """
    if bits == 32:
        return np.zeros(values_VW.shape[1])
    values_VW = values_VW.float()
    uses = torch.from_numpy(count_V)
    if bits == 16:
        squares = (values_VW.half().float() - values_VW).double().square().cpu()
        errors_W = uses.double() @ squares if uses.ndim == 1 else (uses * squares).sum(0)
    else:
        scale_W, offset_W = codes or fitted_codes(values_VW, count_V, bits)
        weights = (uses if uses.ndim > 1 else uses[:, None]).to(values_VW)
        kernels = kernels_to_read(values_VW, values_VW.numel())
        errors_W = kernels.code_errors(values_VW, scale_W[None], offset_W[None], bits, weights)[0].cpu()
    return group.summed(errors_W).numpy()


def errors_of_each(tables: Sequence[Tensor], counts: Sequence[np.ndarray], bits: int) -> list[np.ndarray]:
    """`code_errors` of several tables; small ones are rounded together."""
    found: list[Any] = [None] * len(tables)
    for members in together(tables, [bits] * len(tables)):
        if len(members) == 1:
            found[members[0]] = code_errors(tables[members[0]], counts[members[0]], bits)
            continue
        widths = [tables[i].shape[1] for i in members]
        count_VW = np.repeat(np.stack([counts[i] for i in members], 1), widths, 1)
        errors_W = code_errors(torch.cat([tables[i] for i in members], 1), count_VW, bits)
        for i, part in zip(members, np.split(errors_W, np.cumsum(widths)[:-1]), strict=True):
            found[i] = part
    return found
