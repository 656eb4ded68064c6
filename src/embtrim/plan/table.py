"""The plan of one table: blocks of rows that are stored alike, and what follows from them.

A `TableShape` says how many rows a compact table has and which columns they keep: all that storing, counting and loading
need. A `TablePlan` is a shape that also says which rows of the full table these are.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from embtrim.errors import PlanError, shown
from embtrim.plan.budget import BYTES_PER_PARAM
from embtrim.schema import OOV

# How the stored columns of a row reach the width that the model reads; see plan.py.
Alignment = Literal["concat", "scatter", "project"]
# Where the tables will be served: sizes are counted as that backend stores them.
Target = Literal["torch", "onnx", "fbgemm"]
# Bits per stored value that a table may have.
BITS = (32, 16, 8, 4, 3, 2)
# Bits that a search may be asked for: the same for every table, or chosen table by table and band by band.
Bits = Literal[32, 16, 8, 4, 3, 2, "mixed"]
# FBGEMM's kernels take rows whose number of columns is a multiple of this.
FBGEMM_COLUMNS = 4
# Most columns of a full table, and most blocks of a table: enough for any embedding, and a file that claims more is refused
# before anything of that size is made.
MAX_WIDTH = 1 << 16
MAX_BLOCKS = 1 << 10
MAX_ROWS = 1 << 48
# Most bits of a value that is a code, which has a scale and an offset.
CODE_BITS = 8
# A scale and an offset, both in fp16.
BYTES_PER_SCALE = 4


@dataclass(frozen=True, eq=False)
class BlockShape:
    """Rows of one table that are stored alike: how many, and their columns.

    Attributes:
        num_rows: Number of rows in the block.
        columns: Kept columns of the full table, ascending; or an int where only their number is known.
        alignment: How narrow rows reach the full width: "concat" (no part of the model needs equal widths), "scatter" or
            "project"; see plan.py.
        bits: Bits per stored value, if the rows are a band of their own in a table of codes; None means those of the table.
    """

    num_rows: int
    columns: tuple[int, ...] | int
    alignment: Alignment = "scatter"
    bits: int | None = field(default=None, kw_only=True)

    @property
    def width(self) -> int:
        """Number of kept columns."""
        return self.columns if isinstance(self.columns, int) else len(self.columns)

    @property
    def kept_columns(self) -> tuple[int, ...]:
        """Kept columns; the first ones where only their number is known."""
        return tuple(range(self.columns)) if isinstance(self.columns, int) else self.columns

    def shape(self) -> BlockShape:
        """The block without its rows."""
        return BlockShape(self.num_rows, self.columns, self.alignment, bits=self.bits)


@dataclass(frozen=True, eq=False)
class Block(BlockShape):
    """Rows of one table that are stored alike: which ones, and their columns.

    Attributes:
        rows: Ids in the full table, ascending: int32, or int64 in a table of more than 2^31 rows; a range from 0 for the
            first rows, which takes no memory; None for all rows of the table. See `block_rows`.
    """

    rows: np.ndarray | range | None = None

    def places(self, rows: range) -> tuple[slice | np.ndarray, int]:
        """Which of some rows of the table the block has, as an index of them, and how many of its rows come before."""
        if self.rows is None:
            inside = rows if self.num_rows else range(0)
        elif isinstance(self.rows, range):
            inside = range(rows.start, min(rows.stop, len(self.rows)))
        else:
            first, stop = (int(np.searchsorted(self.rows, edge)) for edge in (rows.start, rows.stop))
            return self.rows[first:stop] - rows.start, first
        return slice(0, len(inside)), rows.start


@dataclass(frozen=True)
class TableShape:
    """How one compact table is laid out, without saying which rows of the full table it holds.

    Attributes:
        name: Name of the table in the schema; of a module of one's own, the path of the embedding.
        num_rows: Rows of the full table, OOV included.
        width: Columns of the full table, D.
        blocks: Rows that are stored alike; a row is in one block at most.
        bits: Bits per stored value, one of BITS, where a block does not say otherwise; see plan.py.
    """

    name: str
    num_rows: int
    width: int
    blocks: tuple[BlockShape, ...]
    bits: int = 32

    def __post_init__(self) -> None:
        where = f"plan for table {self.name!r}"
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise PlanError(
                f"{where}: bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, given {self.bits!r}"
            )
        if self.num_rows > MAX_ROWS:
            raise PlanError(f"{where}: given {self.num_rows:,} rows; {MAX_ROWS:,} are allowed")
        if not 0 <= self.width <= MAX_WIDTH or len(self.blocks) > MAX_BLOCKS:
            raise PlanError(
                f"{where}: given {self.width} columns and {len(self.blocks):,} blocks; 0..{MAX_WIDTH:,} columns and at most "
                f"{MAX_BLOCKS:,} blocks are allowed"
            )
        if self.num_kept > self.num_rows:
            raise PlanError(f"{where}: its blocks hold {self.num_kept:,} rows, the table {self.num_rows:,}")
        for block in self.blocks:
            if block.alignment not in get_args(Alignment):
                raise PlanError(f"{where}: alignment must be concat, scatter or project, given {block.alignment!r}")
            if block.num_rows < 0 or (isinstance(block.columns, int) and block.columns < 0):
                raise PlanError(
                    f"{where}: a block keeps {block.num_rows} rows and {block.columns} columns; 0 or more are allowed"
                )
            if not _fit(block.columns, self.width):
                raise PlanError(
                    f"{where}: columns must ascend within 0..{self.width - 1}, given {shown(block.columns)}"
                )
            if block.bits is not None and (block.bits not in BITS or max(block.bits, self.bits) > CODE_BITS):
                allowed = ", ".join(str(bits) for bits in BITS if bits <= CODE_BITS)
                raise PlanError(
                    f"{where}: a block of {block.bits} bits in a table of {self.bits}; bands have {allowed} bits, as their "
                    "table does"
                )
        if self.mixed and any(b.alignment != "project" and b.width not in (0, self.width) for b in self.blocks):
            raise PlanError(f"{where}: blocks of different columns in one table need alignment 'project'")
        if self.mixed and any(b.bits is not None for b in self.blocks):
            raise PlanError(f"{where}: rows of several widths cannot have bits of their own; give the table its bits")
        bits = [block.bits or self.bits for block in self.blocks]
        if bits != sorted(bits, reverse=True):
            raise PlanError(f"{where}: blocks of {bits} bits; the bits of the blocks must descend")

    def shape(self) -> TableShape:
        """The layout without the rows."""
        return TableShape(self.name, self.num_rows, self.width, tuple(b.shape() for b in self.blocks), self.bits)

    @cached_property
    def num_kept(self) -> int:
        """Number of rows that are in a block."""
        return sum(block.num_rows for block in self.blocks)

    @property
    def has_dropped(self) -> bool:
        """Whether some rows share the DROPPED row."""
        return self.num_kept < self.num_rows

    @property
    def num_compact_rows(self) -> int:
        """Rows of the compact table: the kept rows, and the DROPPED row if there is one."""
        return self.num_kept + self.has_dropped

    @cached_property
    def mixed(self) -> bool:
        """Whether matrices that tables share project the rows to D; see plan.py."""
        counted = any(isinstance(b.columns, int) and b.alignment == "project" for b in self.blocks)
        return len({block.columns for block in self.blocks}) > 1 or (counted and not self._keeps_whole_rows)

    @property
    def _keeps_whole_rows(self) -> bool:
        return all(block.width in (0, self.width) for block in self.blocks)

    @property
    def mixed_widths(self) -> tuple[int, ...]:
        """Widths below D of the rows of a mixed table, which are projected."""
        return tuple(sorted({w for _, w in self.segments if 0 < w < self.width})) if self.mixed else ()

    @property
    def renumbers(self) -> bool:
        """Whether compact ids differ from full ids."""
        return self.has_dropped or len(self.blocks) > 1

    @property
    def keeps_first_rows(self) -> bool:
        """Whether the kept rows are the first rows of the full table, in their order.

        Kept rows then keep their ids, and an id beyond them reads the DROPPED row by comparison, without a map. A shape
        does not know its rows: it says so only where every row is kept.
        """
        return all(block.num_rows == self.num_rows for block in self.blocks) and self.dropped_id in (None, 0)

    @property
    def map_dtype(self) -> np.dtype | None:
        """Type of the map from full to compact ids, needed where ids cannot be re-numbered; None if no map is needed."""
        if not self.renumbers or not self.output_width or self.keeps_first_rows:
            return None
        return smallest_dtype(self.num_compact_rows)

    @property
    def num_map_bytes(self) -> int:
        """Bytes of the map from full to compact ids; 0 if no map is needed."""
        return 0 if self.map_dtype is None else self.num_rows * self.map_dtype.itemsize

    @property
    def only_counts(self) -> bool:
        """Whether the plan says how many columns of a row are kept but not which, or projects rows of several widths."""
        counted = any(isinstance(b.columns, int) and 0 < b.width < self.width for b in self.blocks)
        return counted or (self.mixed and any(0 < b.width < self.width for b in self.blocks))

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Columns of the full table that the output of the compact table stands for, ascending."""
        if self.mixed:
            return tuple(range(self.width))
        return self.blocks[0].kept_columns if self.blocks else ()

    @property
    def output_width(self) -> int:
        """Columns that a field of this table occupies in `concat`."""
        if self.mixed:
            return self.width
        return self.blocks[0].width if self.blocks else 0

    @property
    def alignment(self) -> Alignment:
        """How the output of the table reaches the full width; a mixed table's output has it already."""
        return "scatter" if self.mixed or not self.blocks else self.blocks[0].alignment

    @property
    def _dropped_block(self) -> int:
        """The block that the DROPPED row is stored with: the last of the widest blocks of most bits."""
        sizes = [(block.width if self.mixed else 0, block.bits or self.bits) for block in self.blocks]
        return max(range(len(sizes)), key=lambda i: (sizes[i], i), default=-1)

    @property
    def _block_starts(self) -> list[int]:
        """First compact id of each block."""
        sizes = [b.num_rows + (i == self._dropped_block and self.has_dropped) for i, b in enumerate(self.blocks)]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(rows, width) of each run of compact ids of one width."""
        if not self.mixed:
            return ((self.num_compact_rows, self.output_width),)
        ends = [*self._block_starts[1:], self.num_compact_rows]
        return tuple(
            (end - start, b.width) for b, start, end in zip(self.blocks, self._block_starts, ends, strict=True)
        )

    @cached_property
    def bands(self) -> tuple[tuple[int, int], ...]:
        """(rows, bits) of each run of compact ids of one precision."""
        if self.mixed or len({block.bits for block in self.blocks}) < 2:
            bits = self.blocks[0].bits if self.blocks and not self.mixed else None
            return ((self.num_compact_rows, bits or self.bits),)
        ends = [*self._block_starts[1:], self.num_compact_rows]
        sizes = zip(self.blocks, self._block_starts, ends, strict=True)
        runs = itertools.groupby(
            ((end - start, b.bits or self.bits) for b, start, end in sizes), key=lambda size: size[1]
        )
        return tuple((sum(rows for rows, _ in run), bits) for bits, run in runs)

    @property
    def top_bits(self) -> int:
        """Bits of the values that have most."""
        return max(bits for _, bits in self.bands)

    @property
    def mean_width(self) -> int | float:
        """Columns per stored row, on average where rows have several widths."""
        if not self.mixed:
            return self.output_width
        return sum(rows * width for rows, width in self.segments) / max(1, self.num_compact_rows)

    @property
    def num_value_bytes(self) -> int:
        """Bytes of the stored values; codes include a scale and an offset per column and band."""
        if not self.mixed:
            return sum(stored_bytes(rows, self.output_width, bits) for rows, bits in self.bands)
        by_width: dict[int, int] = {}
        for rows, width in self.segments:
            by_width[width] = by_width.get(width, 0) + rows
        return sum(stored_bytes(rows, width, self.bits) for width, rows in by_width.items())

    @property
    def first_order_bits(self) -> int:
        """Bits per first-order weight of this table."""
        return max(self.top_bits, CODE_BITS)

    @property
    def num_first_order_bytes(self) -> int:
        """Bytes of the table's first-order weights, for a model that has them."""
        scale = BYTES_PER_SCALE if self.first_order_bits == 8 else 0
        return self.num_compact_rows * self.first_order_bits // 8 + scale

    @property
    def dropped_id(self) -> int | None:
        """Compact id of the DROPPED row, or None if no row was dropped."""
        if not self.has_dropped:
            return None
        block = self._dropped_block
        return self._block_starts[block] + self.blocks[block].num_rows if self.blocks else 0

    def oov_id(self) -> int | None:
        """Compact id of the OOV row; None if the row was dropped, or if a shape cannot tell."""
        starts = zip(self.blocks, self._block_starts, strict=True)
        return next((start for block, start in starts if block.num_rows == self.num_rows), None)

    def reads(self, id_map: np.ndarray) -> bool:
        """Whether the ids that a map gives are the table's compact ids. A shape cannot tell and says yes."""
        del id_map
        return True

    def grown(self, num_new: int, num_returned: int) -> TableShape:
        """The shape with rows for more values, stored behind the last block and as wide: the narrowest, if mixed.

        Rows that are there keep their compact ids. The DROPPED row moves behind the added rows where it was the last row.
        Where its place between two blocks would be left empty, one of the added rows takes that place.

        Args:
            num_new: Number of values that the full table has no row for.
            num_returned: Number of values of the full table that read the DROPPED row so far.
        """
        num_added = num_new + num_returned
        if not num_added:
            return self
        blocks = list(self.blocks) or [BlockShape(0, ())]
        like = min((block for block in blocks if block.width), key=lambda block: block.width, default=blocks[-1])
        if blocks[-1].columns != like.columns:
            blocks.append(dataclasses.replace(like, num_rows=0))
        blocks[-1] = dataclasses.replace(blocks[-1], num_rows=blocks[-1].num_rows + num_added)
        found = dataclasses.replace(self, num_rows=self.num_rows + num_new, blocks=tuple(blocks))
        home = self._dropped_block if self.blocks else 0
        if not self.has_dropped or home == len(blocks) - 1 or (found.has_dropped and found._dropped_block == home):
            return found
        blocks[home] = dataclasses.replace(blocks[home], num_rows=blocks[home].num_rows + 1)
        blocks[-1] = dataclasses.replace(blocks[-1], num_rows=blocks[-1].num_rows - 1)
        return dataclasses.replace(found, blocks=tuple(blocks))


@dataclass(frozen=True)
class TablePlan(TableShape):
    """What survives of one table: its layout, and which rows of the full table are kept.

    Attributes:
        blocks: Rows that are stored alike; a row is in one block at most.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"plan for table {self.name!r}"
        for block in self.blocks:
            rows = block.rows
            if rows is None:
                if block.num_rows not in (0, self.num_rows):
                    raise PlanError(
                        f"{where}: a block keeps {block.num_rows:,} of {self.num_rows:,} rows and does not say which; the "
                        "layout inside a bundle has no rows, give the plan that the search wrote, with its .npz"
                    )
                continue
            if isinstance(rows, range) and rows != range(len(rows)):
                raise PlanError(f"{where}: a range of rows is from 0 in steps of 1, given {rows}")
            if len(rows) != block.num_rows:
                raise PlanError(f"{where}: a block says {block.num_rows:,} rows and lists {len(rows):,}")
            rises = isinstance(rows, range) or not np.any(np.diff(rows) <= 0)
            if len(rows) and (not rises or rows[0] < 0 or rows[-1] >= self.num_rows):
                raise PlanError(f"{where}: row ids must ascend within 0..{self.num_rows - 1:,}")
        listed = [block.rows for block in self.blocks if block.rows is not None and block.num_rows]
        ranges = [rows for rows in listed if isinstance(rows, range)]
        arrays = [rows for rows in listed if not isinstance(rows, range)]
        together = np.sort(np.concatenate(arrays)) if len(listed) > 1 and arrays else np.zeros(0, np.int32)
        below = max(map(len, ranges), default=0)
        if len(ranges) > 1 or np.any(together[1:] == together[:-1]) or (len(together) and together[0] < below):
            raise PlanError(f"{where}: a row is in two blocks")

    @property
    def keeps_first_rows(self) -> bool:
        """Whether the kept rows are the first rows of the full table, in their order; see TableShape."""
        start = 0
        for block in self.blocks:
            last = start + block.num_rows - 1
            if block.rows is None and block.num_rows < self.num_rows:
                return False
            if block.rows is not None and block.num_rows and (block.rows[0], block.rows[-1]) != (start, last):
                return False
            start = last + 1
        return self.dropped_id in (None, start)

    def oov_id(self) -> int | None:
        """Compact id of the OOV row; None if the row was dropped."""
        for block, start in zip(self.blocks, self._block_starts, strict=True):
            if block.num_rows == self.num_rows or (block.rows is not None and len(block.rows) and block.rows[0] == OOV):
                return start
        return None

    def id_map(self, rows: range | None = None) -> np.ndarray | None:
        """Map from full ids to compact ids, int32, or int64 where compact ids need it; None where no id changes.

        Args:
            rows: Rows of the table that follow each other; None takes all of them, (num_rows,).
        """
        if not self.renumbers:
            return None
        rows = range(self.num_rows) if rows is None else rows
        dtype = row_dtype(self.num_compact_rows)
        id_map = np.full(len(rows), self.dropped_id if self.has_dropped else -1, dtype)
        for block, start in zip(self.blocks, self._block_starts, strict=True):
            places, before = block.places(rows)
            number = len(id_map[places])
            id_map[places] = np.arange(start + before, start + before + number, dtype=dtype)
        return id_map

    def reads(self, id_map: np.ndarray) -> bool:
        """Whether the ids that a map gives are the table's compact ids."""
        expected = self.id_map()
        return expected is not None and np.array_equal(id_map, expected)

    def block_of_row(self, rows: range | None = None) -> np.ndarray:
        """int32: the number of the block that each row of the full table is in; -1 for a row in none.

        Args:
            rows: Rows of the table that follow each other; None takes all of them, (num_rows,).
        """
        rows = range(self.num_rows) if rows is None else rows
        block_N = np.full(len(rows), -1, np.int32)
        for number, block in enumerate(self.blocks):
            block_N[block.places(rows)[0]] = number
        return block_N

    def kept_by_block(self) -> np.ndarray:
        """bool (number of blocks + 1, width): the columns that each block keeps, and none, for rows in no block.

        A count keeps the first columns.
        """
        kept = np.zeros((len(self.blocks) + 1, self.width), bool)
        for number, block in enumerate(self.blocks):
            kept[number, list(block.kept_columns)] = True
        return kept

    def kept_mask(self, rows: range | None = None) -> np.ndarray:
        """bool (rows, width): the entries of the full table that survive; a count keeps the first columns.

        Args:
            rows: Rows of the table that follow each other; None takes all of them.
        """
        return self.kept_by_block()[self.block_of_row(rows)]


def row_dtype(num_rows: int) -> type[np.signedinteger[Any]]:
    """Type of the ids of so many rows."""
    return np.int32 if num_rows <= 1 << 31 else np.int64


def block_rows(rows: np.ndarray, num_rows: int) -> np.ndarray | range | None:
    """Ascending ids as a block of a table of `num_rows` rows holds them: the first rows are a range, all of them None."""
    if len(rows) == num_rows:
        return None
    if len(rows) and rows[-1] == len(rows) - 1:
        return range(len(rows))
    return rows.astype(row_dtype(num_rows), copy=False)


TableT = TypeVar("TableT", bound=TableShape)


def _fit(columns: tuple[int, ...] | int, width: int) -> bool:
    """Whether kept columns, or their number, ascend within a table's columns."""
    if isinstance(columns, int):
        return columns <= width
    return all(a < b for a, b in itertools.pairwise((-1, *columns, width)))


def with_more_columns(table: TableT, number: int) -> TableT:
    """A table whose blocks keep that many further columns: the first columns that they do not keep."""
    left = [column for column in range(table.width) if column not in table.columns]
    columns = tuple(sorted((*table.columns, *left[:number])))
    return dataclasses.replace(table, blocks=tuple(dataclasses.replace(b, columns=columns) for b in table.blocks))


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one row of values: whole bytes, and at 3 bits the bytes of a row of 2 bits and of a row of 1 bit."""
    return sum(-(-width * plane // 8) for plane in bit_planes(bits))


def bit_planes(bits: int) -> tuple[int, ...]:
    """Bits of the parts in which a value is stored, such that no part lies across two bytes."""
    return (2, 1) if bits == 3 else (bits,)


def stored_bytes(num_rows: int, width: int, bits: int) -> int:
    """Bytes of rows of one width and precision from one table, with their scales."""
    return num_rows * row_bytes(width, bits) + (BYTES_PER_SCALE * width if bits <= CODE_BITS else 0)


def padded_width(width: int) -> int:
    """Columns that a row takes in FBGEMM's tables, which fill it up to a multiple of FBGEMM_COLUMNS."""
    return -(-width // FBGEMM_COLUMNS) * FBGEMM_COLUMNS


def smallest_dtype(num_compact_rows: int) -> np.dtype:
    """The smallest of uint8, int16, int32 and int64 that holds the compact ids of a table (torch has no index of uint16)."""
    kinds = (np.uint8, np.int16, np.int32)
    return np.dtype(next((kind for kind in kinds if num_compact_rows - 1 <= np.iinfo(kind).max), np.int64))


def map_params(num_rows: int, num_compact_rows: int) -> int:
    """Bytes of a map from `num_rows` full ids to compact ids, as a number of fp32 parameters, rounded up."""
    return -(-num_rows * smallest_dtype(num_compact_rows).itemsize // BYTES_PER_PARAM)


def projects(table: TableShape) -> bool:
    """Whether a uniform table owns a projection matrix M of output_width x D."""
    return not table.mixed and table.alignment == "project" and 0 < table.output_width < table.width


def describe_table(table: TableShape) -> str:
    """One table of a plan in a few words."""
    widths = ", ".join(f"{rows:,} rows x {width}" for rows, width in table.segments)
    columns = f" (columns {list(table.columns)})" if not table.mixed and 0 < table.output_width < table.width else ""
    bits = f", {describe_bits(table)} bits" if table.bits < 32 else ""
    return f"{widths} of {table.num_rows:,} x {table.width}{columns}{bits}"


def describe_bits(table: TableShape) -> str:
    """The bits of a table; of bands with their rows, as in "8 (100 rows), 4 (900 rows)"."""
    if len(table.bands) < 2:
        return str(table.top_bits)
    return ", ".join(f"{bits} ({rows:,} rows)" for rows, bits in table.bands)


def describe_difference(left: TableShape, right: TableShape) -> str:
    """How two plans of one table differ, in a few words; empty if they do not. Rows are compared where both know them."""
    change = f"{describe_table(left)} -> {describe_table(right)}"
    layouts = [[(b.num_rows, b.columns, b.alignment, b.bits) for b in t.blocks] for t in (left, right)]
    if describe_table(left) != describe_table(right):
        return change
    if layouts[0] != layouts[1]:
        return f"{change}, stored or aligned differently"
    if not (isinstance(left, TablePlan) and isinstance(right, TablePlan)):
        return ""
    rows = [[b.rows for b in t.blocks] for t in (left, right)]
    pairs = [(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
    same = all(a == b if isinstance(a, range) and isinstance(b, range) else np.array_equal(a, b) for a, b in pairs)
    return "" if same else f"{change}, other rows"
