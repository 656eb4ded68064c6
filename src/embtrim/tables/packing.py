"""PackedRows and BandedRows: rows of embedding tables in 32, 16, 8, 4, 3 or 2 bits per value, read-only.

At 8 bits and fewer a value is a code of b bits. A *stretch*, the rows that one table stores at one width and precision, is
quantised uniformly, column by column:

    out = code * scale + offset,   code = round((value - offset) / scale) in 0 .. 2^b - 1

The codes span the range of the column, shrunk towards its mean by the factor in CLIPS with the smallest squared error, in
which a row counts as often as it is read; a value outside this range gets the code of its nearer end. Scale and offset are
fp16.

A byte holds 8 / p parts of p bits: with W columns and B bytes a row, column j is part j // B of byte j % B, from the low
bits up. A code of 3 bits has two parts, in bytes of their own: its 2 low bits, then its high bit.

Axes: N rows, W columns, T stretches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.table import CODE_BITS, bit_planes, row_bytes
from embtrim.tables.codes import codes_of
from embtrim.tables.kernels import kernels_to_read
from embtrim.tables.kernels.torch import CHUNK_ROWS

# Shares of the way from a column's mean to its largest and its smallest value that the codes may span; 1 clips nothing.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Largest number of fp16.
MOST_VALUE = torch.finfo(torch.float16).max
# Most values of a table that is coded together with others, and about how many values are coded in one go.
SMALL_VALUES, RUN_VALUES = 65_536, 1 << 24


class PackedRows(nn.Module):
    """Rows of one width and precision, from one table or several. They are zero until they are stored.

    Args:
        num_rows: Number of rows, N.
        width: Columns of each row, W.
        bits: Bits per value: 32, 16, 8, 4, 3 or 2.
        num_stretches: Number of stretches, T. At 8 bits and fewer each has a scale and an offset for every column.

    Attributes:
        values: (N, W) stored values; at 8 bits and fewer, uint8 (N, bytes of a row).
        scale: fp16 (T, W) step from one code to the next; only at 8 bits and fewer.
        offset: fp16 (T, W) value of code 0; only at 8 bits and fewer.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, num_rows: int, width: int, bits: int, num_stretches: int) -> None:
        super().__init__()
        self.width, self.bits = width, bits
        if bits > CODE_BITS:
            self.register_buffer(
                "values", torch.zeros(num_rows, width, dtype={32: torch.float32, 16: torch.float16}[bits])
            )
            return
        self.register_buffer("values", torch.zeros(num_rows, row_bytes(width, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(num_stretches, width, dtype=torch.float16))
        self.register_buffer("offset", torch.zeros(num_stretches, width, dtype=torch.float16))

    @torch.no_grad()
    def store(
        self,
        stretch: int,
        rows_N: Tensor,
        values_NW: Tensor,
        count_N: Tensor | None = None,
        *,
        fitted: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Pack all rows of a stretch.

        Args:
            stretch: Number of the stretch.
            rows_N: int64 rows to write to.
            values_NW: Values of these rows.
            count_N: How often each of these rows is read; see `fit_codes`.
            fitted: What `fit_codes` gives for the values; None calls it.

        Raises:
            ModelError: A value is not a number, or is beyond those of fp16.
        """
        if self.bits > CODE_BITS:
            self.values[rows_N] = values_NW.to(self.values.dtype)
            return
        values_NW = values_NW.float()
        if values_NW.numel() and not values_NW.abs().max() <= MOST_VALUE:
            raise ModelError(
                f"a table has values from {values_NW.min():g} to {values_NW.max():g}; codes of {self.bits} bits have fp16 "
                f"scales, which end at {MOST_VALUE:,.0f}: give the table 32 bits, or train it with embedding_l2"
            )
        scale_W, offset_W = fit_codes(values_NW, self.bits, count_N) if fitted is None else fitted
        self.scale[stretch], self.offset[stretch] = scale_W, offset_W
        for place_N, part_NW in zip(rows_N.split(CHUNK_ROWS), values_NW.split(CHUNK_ROWS), strict=True):
            codes_NW = codes_of(part_NW, scale_W, offset_W, self.bits).to(torch.uint8)
            self.values[place_N] = _packed(codes_NW, self.bits)

    def codes(self, rows_N: Tensor) -> Tensor:
        """Codes (N, W) of some rows, uint8; values where there are no codes."""
        found = self.values[rows_N]
        return found if self.bits > CODE_BITS else _unpacked(found.float(), self.width, self.bits).to(torch.uint8)

    def pieces(self, stretch: int, rows_N: Tensor, values_NW: Tensor, count_N: Tensor | None) -> Iterator[Piece]:
        """The arguments of `store` by precision."""
        yield self, stretch, rows_N, values_NW, count_N

    def forward(self, index: Tensor, stretch_C: Tensor) -> Tensor:
        """fp32 rows (.., C, W) for row numbers `index` (.., C); column c of `index` reads rows of stretch `stretch_C[c]`."""
        found = self.values.index_select(0, index.reshape(-1)).view(*index.shape, self.values.shape[1]).float()
        if self.bits > CODE_BITS:
            return found
        codes = _unpacked(found, self.width, self.bits)
        return codes * self.scale.index_select(0, stretch_C).float() + self.offset.index_select(0, stretch_C).float()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "offset"):  # files of earlier releases hold fp32 scales, which stay as they are
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.dtype == torch.float32:
                setattr(self, name, getattr(self, name).float())
        super()._load_from_state_dict(state_dict, prefix, *args)


# A store and the arguments of its `store`: the number of a stretch, and its rows, values and counts.
Piece: TypeAlias = tuple[PackedRows, int, Tensor, Tensor, Tensor | None]


class BandedRows(nn.Module):
    """Rows of one width from tables with bands: runs of rows of one precision, with scales of their own.

    Args:
        width: Columns of each row, W.
        bands_T: For each table, (rows, bits) of its bands in order.

    Attributes:
        stores: PackedRows of each precision, by its bits as text. A table is a stretch of those that it has rows in.
    """

    def __init__(self, width: int, bands_T: Sequence[Sequence[tuple[int, int]]]) -> None:
        super().__init__()
        self.width = width
        levels = sorted({bits for bands in bands_T for _, bits in bands}, reverse=True)
        sizes = {bits: [sum(rows for rows, b in bands if b == bits) for bands in bands_T] for bits in levels}
        users = {bits: [t for t, rows in enumerate(sizes[bits]) if rows] for bits in levels}
        self.stores = nn.ModuleDict(
            {str(bits): PackedRows(sum(sizes[bits]), width, bits, len(users[bits])) for bits in levels}
        )
        firsts = _starts([sum(rows for rows, _ in bands) for bands in bands_T])
        for bits in levels:
            own = {t: number for number, t in enumerate(users[bits])}
            before = [sum(rows for rows, b in bands if b > bits) for bands in bands_T]
            values = {
                "start": [first + rows for first, rows in zip(firsts, before, strict=True)],
                "size": sizes[bits],
                "place": _starts(sizes[bits]),
                # A table without rows of this precision reads a row of another table, which is multiplied by zero.
                "stretch": [own.get(t, 0) for t in range(len(bands_T))],
            }
            for name, numbers in values.items():
                dtype = torch.int64 if name == "stretch" else torch.int32
                self.register_buffer(f"{name}_{bits}", torch.tensor(numbers, dtype=dtype), persistent=False)

    def store(self, stretch: int, rows_N: Tensor, values_NW: Tensor, count_N: Tensor | None = None) -> None:
        """Pack all rows of a table, by its number; see `PackedRows.store`."""
        for store, own, place_N, part_NW, part_N in self.pieces(stretch, rows_N, values_NW, count_N):
            store.store(own, place_N, part_NW, part_N)

    def pieces(self, stretch: int, rows_N: Tensor, values_NW: Tensor, count_N: Tensor | None) -> Iterator[Piece]:
        """The rows of a table by precision, each with the arguments of `PackedRows.store`."""
        for bits, store in self._levels():
            start, size, place, own = (
                int(self.get_buffer(f"{name}_{bits}")[stretch]) for name in ("start", "size", "place", "stretch")
            )
            inside = (rows_N >= start) & (rows_N < start + size)
            if size:
                counts = None if count_N is None else count_N[inside]
                yield store, own, rows_N[inside] - start + place, values_NW[inside], counts

    def forward(self, index: Tensor, stretch_C: Tensor) -> Tensor:
        """fp32 rows (.., C, W) for row numbers `index` (.., C); column c of `index` reads the table `stretch_C[c]`."""
        total = None
        for bits, store in self._levels():
            start_C, size_C, place_C, own_C = (
                self.get_buffer(f"{name}_{bits}").index_select(0, stretch_C)
                for name in ("start", "size", "place", "stretch")
            )
            local = index - start_C
            inside = (local >= 0) & (local < size_C)
            found = store(torch.where(inside, local + place_C, 0), own_C) * inside[..., None]
            total = found if total is None else total + found
        assert total is not None
        return total

    def _levels(self) -> list[tuple[str, PackedRows]]:
        return list(self.stores.items())  # type: ignore[arg-type]


def packed_rows(width: int, bands_T: Sequence[Sequence[tuple[int, int]]]) -> PackedRows | BandedRows:
    """Room for rows of one width from tables with these bands; plain rows where all have one precision."""
    if any(len(bands) > 1 for bands in bands_T):
        return BandedRows(width, bands_T)
    return PackedRows(sum(bands[0][0] for bands in bands_T), width, bands_T[0][0][1], len(bands_T))


def counts_of(counts: Mapping[str, np.ndarray], name: str, num_rows: int) -> np.ndarray:
    """The counts of a table's rows.

    Raises:
        ModelError: There is not one for each row.
    """
    count_V = counts.get(name)
    if count_V is None or np.shape(count_V) != (num_rows,):
        given = "none" if count_V is None else f"an array of shape {np.shape(count_V)}"
        raise ModelError(f"counts has {given} for table {name!r}; give one number for each of its {num_rows:,} rows")
    return count_V


def store_each(stretches: Iterable[tuple[PackedRows | BandedRows, int, Tensor, Tensor, Tensor | None]]) -> None:
    """Pack the rows of several stretches: each a store and the arguments of its `store`. Small ones are coded together."""
    waiting: list[Piece] = []
    size = 0
    for store, stretch, rows_N, values_NW, count_N in stretches:
        waiting += store.pieces(stretch, rows_N, values_NW, count_N)
        size += values_NW.numel()
        if size >= RUN_VALUES:
            _store_pieces(waiting)
            waiting, size = [], 0
    _store_pieces(waiting)


def _store_pieces(pieces: Sequence[Piece]) -> None:
    coded = [piece for piece in pieces if piece[0].bits <= CODE_BITS]
    fitted = fit_each(
        [values_NW.float() for *_, values_NW, _ in coded],
        [store.bits for store, *_ in coded],
        [count_N for *_, count_N in coded],
    )
    for (store, stretch, rows_N, values_NW, _), codes in zip(coded, fitted, strict=True):
        store.store(stretch, rows_N, values_NW, fitted=codes)
    for store, stretch, rows_N, values_NW, _ in pieces:
        if store.bits > CODE_BITS:
            store.store(stretch, rows_N, values_NW)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)][:-1]


def _packed(codes_NW: Tensor, bits: int) -> Tensor:
    """uint8 (N, bytes of a row) of codes (N, W)."""
    planes, width = [], codes_NW.shape[1]
    for plane in bit_planes(bits):
        num_bytes = row_bytes(width, plane)
        part_NW = codes_NW & (2**plane - 1)
        codes_NW = codes_NW >> plane
        packed = part_NW.new_zeros(len(part_NW), num_bytes)
        for place, piece in enumerate(part_NW.split(max(1, num_bytes), 1)):
            packed[:, : piece.shape[1]] += piece << (place * plane)
        planes.append(packed)
    return torch.cat(planes, 1)


def _unpacked(found: Tensor, width: int, bits: int) -> Tensor:
    """Codes (.., W) of bytes (.., bytes of a row), all as floats, where ONNX has every operator."""
    total, start, unit = None, 0, 1
    for plane in bit_planes(bits):
        num_bytes = row_bytes(width, plane)
        left = found[..., start : start + num_bytes]
        pieces = []
        for _ in range(1, 8 // plane):
            above = (left / 2**plane).floor()
            pieces.append(left - 2**plane * above)
            left = above
        codes = torch.cat([*pieces, left], -1)[..., :width] if pieces else left
        total = codes if total is None else total + unit * codes
        start, unit = start + num_bytes, unit << plane
    assert total is not None
    return total


class Group(Protocol):
    """Processes that share the rows of a table; each gives what it knows of its own."""

    def summed(self, values: Tensor, /) -> Tensor: ...  # noqa: D102
    def largest(self, values: Tensor, /) -> Tensor: ...  # noqa: D102


def fit_codes(
    values_NW: Tensor, bits: int, count_N: Tensor | None = None, group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and offset (W,) of the columns, chosen for the smallest squared error.

    Both are fp32 tensors whose numbers fp16 holds. The offset is rounded down and the scale up, so that the codes span
    the range. A column of one number that fp16 holds has scale 0.

    Args:
        values_NW: Values, or the rows of them that this process holds.
        bits: Bits per code.
        count_N: How often each row is read, (N,), or each value, (N, W): its squared error counts as often, and once at
            least. None counts all rows alike.
        group: Processes that hold the other rows; None for a process that holds all.
    """
    summed, largest = (group.summed, group.largest) if group is not None else (_same, _same)
    num_rows = int(summed(torch.tensor(len(values_NW))))
    if not num_rows:
        return values_NW.new_zeros(values_NW.shape[1]), values_NW.new_zeros(values_NW.shape[1])
    if len(values_NW):
        low_W, high_W = values_NW.amin(0), values_NW.amax(0)  # aminmax takes ten times as long
    else:
        low_W = values_NW.new_full((values_NW.shape[1],), torch.inf)
        high_W = -low_W
    negative_low_W, high_W = largest(torch.stack([-low_W, high_W]))
    low_W = -negative_low_W
    weights = None
    if count_N is not None:
        weights = count_N.to(values_NW).clamp(min=1)
        weights = weights[:, None] if weights.ndim == 1 else weights
    total_W, uses_W = _sums(values_NW, weights)
    mean_W = (summed(total_W) / summed(uses_W)).clamp(low_W, high_W)
    clip_K1 = values_NW.new_tensor(CLIPS)[:, None]
    # lerp is exact at weight 1, so the offset of a range that is not clipped is the smallest value itself.
    offset_KW = _rounded(torch.lerp(mean_W, low_W, clip_K1), up=False)
    scale_KW = _rounded((torch.lerp(mean_W, high_W, clip_K1) - offset_KW) / (2**bits - 1), up=True)
    kernels = kernels_to_read(values_NW, values_NW.numel())
    errors_KW = summed(kernels.code_errors(values_NW, scale_KW, offset_KW, bits, weights))
    best_1W = errors_KW.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return scale_KW.gather(0, best_1W)[0], offset_KW.gather(0, best_1W)[0]


def _sums(values_NW: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of values and of their weights by column, (W,)."""
    if weights is None:
        return values_NW.sum(0), values_NW.new_tensor(float(len(values_NW)))
    return (values_NW * weights).sum(0), weights.expand_as(values_NW).sum(0)


def _same(values: Tensor) -> Tensor:
    return values


def fit_each(
    tables: Sequence[Tensor], bits: Sequence[int], counts: Sequence[Tensor | None] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """`fit_codes` of several tables, with the counts of their rows (N,); small ones are fitted together."""
    counts = [None] * len(tables) if counts is None else counts
    found: list[Any] = [None] * len(tables)
    for members in together(tables, bits):
        widths = [tables[i].shape[1] for i in members]
        of_members = [counts[i] for i in members]
        joined = None
        if all(count is not None for count in of_members):
            joined = torch.cat([c[:, None].expand(-1, w) for c, w in zip(of_members, widths, strict=True)], 1)  # type: ignore[index]
        scale_W, offset_W = fit_codes(torch.cat([tables[i] for i in members], 1), bits[members[0]], joined)
        for i, *codes in zip(members, scale_W.split(widths), offset_W.split(widths), strict=True):
            found[i] = tuple(codes)
    return found


def together(tables: Sequence[Tensor], bits: Sequence[int]) -> list[list[int]]:
    """Numbers of tables that are coded together: small ones of equally many rows and equal bits, side by side."""
    groups: dict[Any, list[int]] = {}
    for i, (table, level) in enumerate(zip(tables, bits, strict=True)):
        groups.setdefault((len(table), level) if table.numel() <= SMALL_VALUES else i, []).append(i)
    return list(groups.values())


def _rounded(values_W: Tensor, *, up: bool) -> Tensor:
    """The nearest numbers of fp16 that are not below the values, or not above."""
    near = values_W.half()
    beyond = near.float() < values_W if up else near.float() > values_W
    towards = torch.full_like(near, torch.inf if up else -torch.inf)
    return torch.where(beyond, torch.nextafter(near, towards), near).float()
