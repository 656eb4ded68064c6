"""The plan of one table: blocks of rows that are stored alike, and what follows from them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from embtrim.errors import PlanError
from embtrim.plan.budget import BYTES_PER_PARAM
from embtrim.schema import OOV

Alignment = Literal["concat", "scatter", "project"]


BITS = (32, 16, 8, 4)


Target = Literal["torch", "onnx", "fbgemm"]


FBGEMM_COLUMNS = 4


# Of a scale and its offset, fp32 both.
BYTES_PER_SCALE = 2 * BYTES_PER_PARAM


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one table that are stored alike.

    Attributes:
        num_rows: rows in the block.
        columns: kept columns of the full table, ascending; or an int where only their number is known.
        alignment: "concat" (no model part needs equal widths), "scatter" or "project"; see the module docstring.
        rows: int32 ids in the full table, ascending; None means all rows, or - in a plan read without its npz,
            as inside a bundle - rows that are not at hand.
    """

    num_rows: int
    columns: tuple[int, ...] | int
    alignment: Alignment = "scatter"
    rows: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Number of kept columns."""
        return self.columns if isinstance(self.columns, int) else len(self.columns)

    @property
    def kept_columns(self) -> tuple[int, ...]:
        """Kept columns; where only their number is known, the first ones."""
        return tuple(range(self.columns)) if isinstance(self.columns, int) else self.columns


@dataclass(frozen=True)
class TablePlan:
    """What survives of one table.

    Attributes:
        name: the table's name in the schema (for a foreign model, the module's path).
        num_rows: rows of the full table, OOV included.
        width: columns of the full table, D.
        blocks: see Block; a row is in at most one.
        bits: of a stored value, one of BITS; see the module docstring.
    """

    name: str
    num_rows: int
    width: int
    blocks: tuple[Block, ...]
    bits: int = 32

    def __post_init__(self) -> None:
        where = f"plan for table {self.name!r}"
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise PlanError(
                f"{where}: bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, given {self.bits!r}"
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
            columns = block.kept_columns
            if any(b <= a for a, b in itertools.pairwise(columns)) or any(not 0 <= c < self.width for c in columns):
                raise PlanError(f"{where}: columns must ascend within 0..{self.width - 1}, given {block.columns}")
            if block.rows is not None:
                rows = block.rows
                if len(rows) != block.num_rows:
                    raise PlanError(f"{where}: a block says {block.num_rows:,} rows and lists {len(rows):,}")
                if len(rows) and (np.any(np.diff(rows) <= 0) or rows[0] < 0 or rows[-1] >= self.num_rows):
                    raise PlanError(f"{where}: row ids must ascend within 0..{self.num_rows - 1:,}")
        listed = [block.rows for block in self.blocks if block.rows is not None]
        if len(listed) > 1 and len(np.unique(np.concatenate(listed))) != sum(map(len, listed)):
            raise PlanError(f"{where}: a row is in two blocks")
        if self.mixed and any(b.alignment != "project" and b.width not in (0, self.width) for b in self.blocks):
            raise PlanError(f"{where}: blocks of different columns in one table need alignment 'project'")

    @property
    def num_kept(self) -> int:
        """Rows that are in a block."""
        return sum(block.num_rows for block in self.blocks)

    @property
    def has_dropped(self) -> bool:
        """Whether some rows share the DROPPED row."""
        return self.num_kept < self.num_rows

    @property
    def num_compact_rows(self) -> int:
        """Rows of the compact table: those kept, and the DROPPED row if there is one."""
        return self.num_kept + self.has_dropped

    @property
    def mixed(self) -> bool:
        """Whether rows are projected to D by matrices that tables share (see the module docstring)."""
        counted = any(isinstance(b.columns, int) and b.alignment == "project" for b in self.blocks)
        return len({block.columns for block in self.blocks}) > 1 or (counted and not self._keeps_whole_rows)

    @property
    def _keeps_whole_rows(self) -> bool:
        return all(block.width in (0, self.width) for block in self.blocks)

    @property
    def mixed_widths(self) -> tuple[int, ...]:
        """Widths below D of a mixed table's rows, which are projected."""
        return tuple(sorted({w for _, w in self.segments if 0 < w < self.width})) if self.mixed else ()

    @property
    def renumbers(self) -> bool:
        """Whether compact ids differ from full ones."""
        return self.has_dropped or len(self.blocks) > 1

    @property
    def keeps_first_rows(self) -> bool:
        """Whether the kept rows are the first ones in their order, and compact ids so far the full ones.

        An id beyond them then reads the DROPPED row by comparison, with no map. Rows that are not at hand count as others.
        """
        start = 0
        for block in self.blocks:
            last = start + block.num_rows - 1
            if block.rows is None and block.num_rows < self.num_rows:
                return False
            if block.rows is not None and block.num_rows and (block.rows[0], block.rows[-1]) != (start, last):
                return False
            start = last + 1
        return self.dropped_id in (None, start)

    @property
    def map_dtype(self) -> np.dtype | None:
        """Of the map from full to compact ids that the table needs where ids cannot be re-numbered; None: no map."""
        if not self.renumbers or not self.output_width or self.keeps_first_rows:
            return None
        return smallest_dtype(self.num_compact_rows)

    @property
    def num_map_bytes(self) -> int:
        """Bytes of that map."""
        return 0 if self.map_dtype is None else self.num_rows * self.map_dtype.itemsize

    @property
    def only_counts(self) -> bool:
        """Whether the plan says how many columns of a row are kept, or projects rows of several widths: not which."""
        counted = any(isinstance(b.columns, int) and 0 < b.width < self.width for b in self.blocks)
        return counted or (self.mixed and any(0 < b.width < self.width for b in self.blocks))

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of the full table that the compact table's output stands for, ascending."""
        if self.mixed:
            return tuple(range(self.width))
        return self.blocks[0].kept_columns if self.blocks else ()

    @property
    def output_width(self) -> int:
        """Columns that a field of this table occupies in `concat`."""
        return len(self.columns)

    @property
    def alignment(self) -> Alignment:
        """How the table's output reaches the full width: of a mixed table, as it is."""
        return "scatter" if self.mixed or not self.blocks else self.blocks[0].alignment

    @property
    def _dropped_block(self) -> int:
        """The block that the DROPPED row is stored with: the last, of a mixed table the last of the widest."""
        last = len(self.blocks) - 1
        return max(range(len(self.blocks)), key=lambda i: (self.blocks[i].width, i)) if self.mixed else last

    @property
    def _block_starts(self) -> list[int]:
        """First compact id of each block."""
        sizes = [b.num_rows + (i == self._dropped_block and self.has_dropped) for i, b in enumerate(self.blocks)]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(rows, width) of each run of compact ids of one width."""
        if not self.mixed:
            return ((self.num_compact_rows, self.output_width),)
        ends = [*self._block_starts[1:], self.num_compact_rows]
        return tuple(
            (end - start, b.width) for b, start, end in zip(self.blocks, self._block_starts, ends, strict=True)
        )

    @property
    def mean_width(self) -> int | float:
        """Columns that a stored row has: on average, where rows have several widths."""
        if not self.mixed:
            return self.output_width
        return sum(rows * width for rows, width in self.segments) / max(1, self.num_compact_rows)

    @property
    def num_value_bytes(self) -> int:
        """Bytes of the stored values, with the scales and offsets of 8- and 4-bit codes: one each a column."""
        rows = sum(rows * -(-width * self.bits // 8) for rows, width in self.segments)
        columns = sum({width for _, width in self.segments})
        return rows + (BYTES_PER_SCALE * columns if self.bits <= 8 else 0)

    @property
    def first_order_bits(self) -> int:
        """Bits of a first-order weight of this table."""
        return max(self.bits, 8)

    @property
    def num_first_order_bytes(self) -> int:
        """Bytes of the table's first-order weights, if the model has them."""
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
        """Compact id of the OOV row; None if it was dropped, or the plan was read without its rows."""
        for block, start in zip(self.blocks, self._block_starts, strict=True):
            if block.num_rows == self.num_rows or (block.rows is not None and len(block.rows) and block.rows[0] == OOV):
                return start
        return None

    def id_map(self) -> np.ndarray | None:
        """int32 map from full ids to compact ids, or None where no id changes.

        Raises:
            PlanError: the plan was read without its rows.
        """
        if not self.renumbers:
            return None
        id_map = np.full(self.num_rows, self.dropped_id if self.has_dropped else -1, np.int32)
        for block, start in zip(self.blocks, self._block_starts, strict=True):
            rows = np.arange(self.num_rows) if block.rows is None and block.num_rows == self.num_rows else block.rows
            if rows is None:
                raise PlanError(
                    f"plan for table {self.name!r} was read without its rows; load it with the .npz beside it"
                )
            id_map[rows] = np.arange(start, start + block.num_rows, dtype=np.int32)
        return id_map

    def reads(self, id_map: np.ndarray) -> bool:
        """Whether ids that this map gives are the table's compact ids; of a plan without its rows nothing can be said."""
        if any(block.rows is None and block.num_rows < self.num_rows for block in self.blocks):
            return True
        expected = self.id_map()
        return expected is not None and np.array_equal(id_map, expected)

    def grown(self, num_new: int, num_returned: int) -> TablePlan:
        """The layout with rows for more values, behind those that it has and of their width: the narrowest, if mixed.

        The compact ids of rows that are there stay. The DROPPED row moves behind the rows added where it was the last; where
        its place would be left empty between two blocks, a row that is added takes it.

        Args:
            num_new: values that the full table has no row for.
            num_returned: values of the full table that read the DROPPED row so far.
        """
        assert all(block.rows is None for block in self.blocks), "a layout, as bundles hold it, lists no rows"
        num_added = num_new + num_returned
        if not num_added:
            return self
        blocks = list(self.blocks) or [Block(0, ())]
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

    def kept_mask(self) -> np.ndarray:
        """bool (num_rows, width): the entries of the full table that survive; a count keeps the first columns."""
        mask = np.zeros((self.num_rows, self.width), bool)
        for block in self.blocks:
            columns = np.array(block.kept_columns, np.int64)
            rows = np.arange(self.num_rows) if block.rows is None else block.rows
            mask[np.ix_(rows, columns)] = True
        return mask


def with_more_columns(table: TablePlan, number: int) -> TablePlan:
    """A table whose blocks keep further columns, the first that it does not keep."""
    left = [column for column in range(table.width) if column not in table.columns]
    columns = tuple(sorted((*table.columns, *left[:number])))
    return dataclasses.replace(table, blocks=tuple(dataclasses.replace(b, columns=columns) for b in table.blocks))


def padded_width(width: int) -> int:
    """Columns that a row of so many takes in fbgemm's tables."""
    return -(-width // FBGEMM_COLUMNS) * FBGEMM_COLUMNS


def smallest_dtype(num_compact_rows: int) -> np.dtype:
    """The smallest of uint8, int16 and int32 that holds the compact ids of so many rows (torch indexes by no uint16)."""
    return np.dtype(next((d for d in (np.uint8, np.int16) if num_compact_rows - 1 <= np.iinfo(d).max), np.int32))


def map_params(num_rows: int, num_compact_rows: int) -> int:
    """Parameters that take the bytes of a map from `num_rows` ids to compact ones, rounded up."""
    return -(-num_rows * smallest_dtype(num_compact_rows).itemsize // BYTES_PER_PARAM)


def projects(table: TablePlan) -> bool:
    """Whether a uniform table owns a projection matrix M of output_width x D."""
    return not table.mixed and table.alignment == "project" and 0 < table.output_width < table.width


def describe_table(table: TablePlan) -> str:
    """One table of a plan in a few words."""
    widths = ", ".join(f"{rows:,} rows x {width}" for rows, width in table.segments)
    columns = f" (columns {list(table.columns)})" if not table.mixed and 0 < table.output_width < table.width else ""
    bits = f", {table.bits} bits" if table.bits < 32 else ""
    return f"{widths} of {table.num_rows:,} x {table.width}{columns}{bits}"


def describe_difference(left: TablePlan, right: TablePlan) -> str:
    """How two plans of one table differ, in a few words; empty if they do not."""
    change = f"{describe_table(left)} -> {describe_table(right)}"
    layouts = [[(b.num_rows, b.columns, b.alignment) for b in t.blocks] for t in (left, right)]
    if describe_table(left) != describe_table(right):
        return change
    if layouts[0] != layouts[1]:
        return f"{change}, stored or aligned differently"
    rows = [[b.rows for b in t.blocks] for t in (left, right)]
    same = all(np.array_equal(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None)
    return "" if same else f"{change}, other rows"


# Precisions that a search can be told: bits of every table, or by table.
Bits = Literal[32, 16, 8, 4, "mixed"]
