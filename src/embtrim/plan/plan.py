"""Size plans: what survives of every table. The only place that counts parameters and bytes.

A plan is data: it can be saved (as JSON, with an npz beside it where rows were chosen), read, edited by hand, diffed, and
applied to a model that was never searched. For each table it lists *blocks*: the rows, the columns that they keep or
their number, and the alignment. A field-level method gives one block per table, row pruning one block of kept rows, and
sizes per feature value several blocks. Rows in no block share the table's one DROPPED row.

The layout of a table follows from its blocks:
- *uniform*: all blocks keep the same columns, and the table is as wide as they are. Where a model needs equal widths, a
  narrow table is brought to the full width by "scatter" (the kept columns return to their places) or "project" (the
  table has a matrix M in R^{d x D} of its own, without bias).
- *mixed*: the blocks have several widths, or a width that is only a number, and all "project". The table gives D columns:
  a row of width s is multiplied by W_s in R^{s x D}, which all mixed tables share; a row of width D is taken as it is.

Precision is a third lever, beside rows and columns. A table of fewer than 32 bits is trained in fp32 and quantised
afterwards. At 16 bits its values are fp16. At 8 bits and fewer its values are codes, with an fp16 scale and offset for each
column of the rows of one width; a row of codes fills whole bytes. Blocks of a uniform table of codes may have bits of their
own: these *bands* have scales of their own too. First-order weights have 16 bits where the table has 16, and otherwise 8
bits with one scale and offset. The projection that a table of fewer than 32 bits owns is fp16; shared ones stay fp32.

Compact ids of a table run through its blocks in order; the DROPPED row comes last in the last of the widest blocks of most
bits.

A `PlanShape` is a plan without its rows: what storing, counting and loading a compact model need. A bundle holds a shape,
because its vocabulary already says which values have a row. A `SizePlan` knows its rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embtrim.errors import BudgetError, PlanError
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan_file import PLAN_VERSION, BlockEntry, PlanFile, lengths_of, read_plan_file
from embtrim.plan.rows_file import crc32_of, read_rows, set_aside
from embtrim.plan.table import (
    FBGEMM_COLUMNS,
    Alignment,
    Block,
    BlockShape,
    TablePlan,
    TableShape,
    TableT,
    Target,
    describe_difference,
    describe_table,
    map_params,
    padded_width,
    projects,
    row_dtype,
    with_more_columns,
)
from embtrim.schema import Schema
from embtrim.system.files import write_then_rename
from embtrim.system.holding import hold

if TYPE_CHECKING:
    from typing_extensions import Self

# Ids of rows that a digest takes at a time.
CHUNK_IDS = 1 << 20
# Fields of a plan that a plan file holds among its details.
IN_DETAILS = ("budget", "seed", "vocabulary_bytes", "target", "left_bytes")


@dataclass(frozen=True, repr=False)
class PlanShape:
    """How large every table is, and where the plan came from: a plan without the ids of its rows.

    Attributes:
        fingerprint: Fingerprint of the schema, or of the embeddings of a module of one's own, that the plan is for.
        num_fields: Number of id fields of the schema; messages name it.
        tables: One entry per table, in the order of the schema.
        first_order: Whether the model keeps one first-order weight per row.
        method: Name of the search that made the plan.
        details: What the search wants remembered, such as its settings and scores.
        standalone: Whether each table stands alone in a module of one's own, whose ids cannot be re-numbered. The table
            then has projections of its own, and a map of its ids if rows other than the first are kept or re-sized.
        target: Where the tables will be served, as the search was told; None if it was not told.
        budget: Budget that the search kept to; None for a plan that no search made.
        seed: Seed of the search.
        vocabulary_bytes: Bytes of the vocabulary, counted against the budget beside `num_bytes`; None where the budget
            does not include the vocabulary.
        left_bytes: Bytes of the embeddings of a module of one's own that the plan leaves alone, such as first-order terms.
            They are in no budget and not in `num_bytes`, but in the `table_bytes` of an export's manifest. None for models
            of embtrim.models, whose plans cover everything.
    """

    fingerprint: str
    num_fields: int
    tables: tuple[TableShape, ...]
    first_order: bool = False
    method: str = "manual"
    details: dict[str, Any] = field(default_factory=dict)
    standalone: bool = False
    target: Target | None = None
    budget: Budget | None = None
    seed: int | None = None
    vocabulary_bytes: int | None = None
    left_bytes: int | None = None

    def shape(self) -> PlanShape:
        """The plan without its rows, and of its details without all but the settings: what a bundle holds."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(PlanShape)}
        details = {name: value for name, value in self.details.items() if name == "config"}
        tables = tuple(table.shape() for table in self.tables)
        return PlanShape(**{**fields, "tables": tables, "details": details, "vocabulary_bytes": None})

    def with_bits(self, bits: int | Mapping[str, int]) -> Self:
        """The same rows and columns at another precision.

        Args:
            bits: 32, 16, 8, 4, 3 or 2 for every table, or a number for each named table; the other tables keep their
                bits. Named tables lose bands of other bits. A plan for the target fbgemm forgets its target if a table
                gets fewer than 32 bits: FBGEMM has no such tables.

        Raises:
            PlanError: The number is not one of these, or the plan has no table of a given name.

        Example:
            >>> plan = SizePlan.full(Schema.from_sizes([100, 10]), width=4).with_bits(8)
            >>> plan.num_params, plan.num_bytes()  # one byte per parameter, a scale and an offset per column
            (440, 472)
        """
        by_name = bits if isinstance(bits, Mapping) else {t.name: bits for t in self.tables}
        names = [t.name for t in self.tables]
        unknown = [name for name in by_name if name not in names]
        if unknown:
            raise PlanError(f"with_bits names table {unknown[0]!r}, the plan has {', '.join(names)}")
        tables = tuple(_in_bits(t, by_name[t.name]) if t.name in by_name else t for t in self.tables)
        found = dataclasses.replace(self, tables=tables)
        if found.target == "fbgemm" and found.is_quantized:  # FBGEMM stores 32 bits only
            found = dataclasses.replace(found, target=None)
        return found

    def made_by(self, method: str, budget: Budget, seed: int, details: dict[str, Any]) -> Self:
        """The same plan under the name of a search, with what the search wants remembered."""
        return dataclasses.replace(self, method=method, budget=budget, seed=seed, details=details)

    @property
    def width(self) -> int:
        """Columns of the widest full table, D."""
        return max((table.width for table in self.tables), default=0)

    @property
    def shared_projection_widths(self) -> tuple[int, ...]:
        """Widths s of the matrices W_s that mixed tables share, ascending."""
        return tuple(sorted({w for t in self.tables for w in t.mixed_widths}))

    @property
    def num_shared_projection_params(self) -> int:
        """Parameters of the matrices W_s; none where each table stands alone and has matrices of its own."""
        return 0 if self.standalone else sum(s * self.width for s in self.shared_projection_widths)

    @property
    def num_projection_params(self) -> int:
        """Parameters of all projections to the full width."""
        return sum(map(self._own_projection_params, self.tables)) + self.num_shared_projection_params

    def _own_projection_params(self, table: TableShape) -> int:
        """Parameters of the projections that belong to one table."""
        if projects(table):
            return table.output_width * table.width
        return sum(s * table.width for s in table.mixed_widths) if self.standalone else 0

    def _map_params(self, table: TableShape) -> int:
        """Bytes of the id map of a table in a module of one's own, as a number of parameters, rounded up."""
        if not self.standalone or table.map_dtype is None:
            return 0
        return map_params(table.num_rows, table.num_compact_rows)

    @property
    def num_params(self) -> int:
        """Embedding parameters: rows, DROPPED rows, projections and id maps, without first-order weights."""
        return sum(map(self.table_params, self.tables)) + self.num_shared_projection_params

    def table_params(self, table: TableShape) -> int:
        """Embedding parameters that one table adds to `num_params`, without the projections that it shares."""
        stored = sum(rows * width for rows, width in table.segments)
        return stored + self._own_projection_params(table) + self._map_params(table)

    @property
    def num_first_order_params(self) -> int:
        """First-order weights: one per compact row, if the model has them."""
        return sum(t.num_compact_rows for t in self.tables) if self.first_order else 0

    @property
    def num_full_params(self) -> int:
        """Embedding parameters of the full tables, which a percentage refers to."""
        return sum(t.num_rows * t.width for t in self.tables)

    @property
    def keeps_all(self) -> bool:
        """Whether every table keeps all its rows, in their order, and all its columns, as the full model does."""
        return not any(table.renumbers or table.output_width < table.width for table in self.tables)

    @property
    def keeps_nothing(self) -> bool:
        """Whether no table keeps a row with a column."""
        return not any(block.num_rows and block.width for table in self.tables for block in table.blocks)

    @property
    def is_quantized(self) -> bool:
        """Whether a table has fewer than 32 bits."""
        return any(t.bits < 32 for t in self.tables)

    @property
    def slot_ratio(self) -> float:
        """Kept share of the (table, column) slots; for a mixed table, the kept share of its entries."""
        kept = sum(
            sum(rows * width for rows, width in t.segments) / t.num_rows if t.mixed else t.output_width
            for t in self.tables
        )
        return kept / max(1, sum(t.width for t in self.tables))

    @property
    def digest(self) -> str:
        """Twelve hex digits over what is kept, equal for plans that lay out the same tables."""
        state = hashlib.sha256(f"{self.fingerprint} {self.first_order} {self.standalone}".encode())
        for table in self.tables:
            bits = "" if table.bits == 32 else f" {table.bits} bits"
            state.update(f"\0{table.name} {table.num_rows} {table.width}{bits}".encode())
            for block in table.blocks:
                own = "" if block.bits is None else f" {block.bits} bits"
                state.update(f"\0{block.num_rows} {block.columns} {block.alignment}{own}".encode())
                if isinstance(block, Block) and block.rows is not None:
                    for part in _hashed(block.rows, table.num_rows):
                        state.update(part)
        return state.hexdigest()[:12]

    @property
    def coverage(self) -> float:
        """Share of the bytes of all embeddings of the full model that the plan covers."""
        covered = BYTES_PER_PARAM * self.num_full_params
        return covered / max(1, covered + (self.left_bytes or 0))

    def max_params(self, budget: Budget) -> int:
        """Embedding parameters that a budget allows an fp32 plan with the first-order weights of this plan."""
        return budget.max_params(self.num_full_params, self.num_first_order_params)

    def num_bytes(self, target: Target | None = None) -> int:
        """Bytes of the tables as a target stores them; the tables of an export for that target agree within 1%.

        The manifest of an export also counts the embeddings that the plan of a module of one's own leaves alone, `left_bytes`.

        The count includes the values at their bits, their scales, projections, first-order weights, and the id maps of a
        module of one's own. The count excludes the vocabulary, which belongs to the encoder (see `vocabulary_bytes`), and
        the description of the layout in the graph of an export, a few dozen bytes per column of ids.

        Args:
            target: Where the tables will be served. "torch" (bundles, pt2; the default) and "onnx" store the same bytes.
                "fbgemm" (TorchRec) fills every row up to a multiple of four columns, as its kernels ask; first-order
                weights are tables of their own and are filled up too.

        Raises:
            PlanError: The target is fbgemm, and a table has rows of several widths or fewer than 32 bits.
        """
        shared = BYTES_PER_PARAM * self.num_shared_projection_params
        return shared + sum(self.table_bytes(table, target) for table in self.tables)

    def table_bytes(self, table: TableShape, target: Target | None = None, budget: Budget | None = None) -> int:
        """Bytes that one table adds to `num_bytes`, without the projections that it shares with other tables.

        Args:
            table: A table of this plan, or one that might take its place.
            target: Where the tables will be served; see `num_bytes`.
            budget: Count only the bytes that count against this budget: a percentage leaves out first-order weights.

        Raises:
            PlanError: See `num_bytes`.
        """
        if target == "fbgemm" and (table.mixed or table.bits != 32):
            what = "stores rows of several widths" if table.mixed else f"has {table.bits} bits"
            raise PlanError(f"table {table.name!r} {what}, which fbgemm's tables cannot; choose target torch or onnx")
        total = table.num_value_bytes + (BYTES_PER_PARAM if table.bits == 32 else 2) * self._own_projection_params(
            table
        )
        if self.standalone:
            total += table.num_map_bytes
        if budget is None or budget.kind == "bytes":
            total += self._first_order_bytes(table, target)
        if target == "fbgemm":
            padding = padded_width(table.output_width) - table.output_width
            total += BYTES_PER_PARAM * padding * table.num_compact_rows
        return total

    def _first_order_bytes(self, table: TableShape, target: Target | None) -> int:
        if not self.first_order:
            return 0
        return table.num_first_order_bytes * (padded_width(1) if target == "fbgemm" else 1)

    def with_free_columns(self) -> Self:
        """The plan with further columns in the place of FBGEMM's padding, which costs their bytes anyway.

        A table gets the first columns that it does not keep. Projected tables stay as they are, since a further column
        would cost a further row of the projection.
        """
        tables = []
        for table in self.tables:
            free = padded_width(table.output_width) - table.output_width
            fixed = not free or table.mixed or table.alignment == "project"
            tables.append(table if fixed else with_more_columns(table, free))
        return dataclasses.replace(self, tables=tuple(tables))

    def with_padded_columns(self, budget: Budget, wanted: Mapping[str, int]) -> Self:
        """The plan with as many further groups of four columns as a budget has room for in FBGEMM's tables.

        Args:
            budget: A budget in percent or bytes.
            wanted: Number of columns of each table in a plan that ignores padding. Tables with fewer columns are widened
                first, then the tables where a group of columns takes the fewest bytes.
        """
        tables = list(self.tables)
        rounding = 1e-6  # bytes, for the rounding of a percentage
        room = self.max_bytes(budget, "fbgemm") - self.num_bytes("fbgemm") + rounding
        while True:
            fitting = []
            for number, t in enumerate(tables):
                if t.blocks and not t.mixed and t.alignment != "project" and t.output_width < t.width:
                    wider = with_more_columns(t, FBGEMM_COLUMNS)
                    more = self.table_bytes(wider, "fbgemm") - self.table_bytes(t, "fbgemm")
                    if more <= room:
                        fitting.append((t.output_width >= wanted[t.name], more, number, wider))
            if not fitting:
                return dataclasses.replace(self, tables=tuple(tables))
            _, more, number, tables[number] = min(fitting, key=lambda choice: choice[:3])
            room -= more

    def max_bytes(self, budget: Budget, target: Target | None = None) -> float:
        """Bytes that a budget allows a plan with the bits and first-order weights of this plan, for a target.

        A percentage refers to the fp32 bytes of the full tables. It counts values, scales, projections and padding, but
        not first-order weights. A budget in parameters is converted with the average bytes per parameter of this plan.
        """
        if budget.kind == "params":
            return self.num_bytes(target) * budget.amount / max(1, self.num_params)
        first_order = 0 if budget.kind == "bytes" else sum(self._first_order_bytes(t, target) for t in self.tables)
        return self.counted_bytes(budget) + first_order

    def counted_bytes(self, budget: Budget) -> float:
        """Bytes for all that counts against a budget in percent or bytes; see `table_bytes`."""
        assert budget.kind != "params", "the bytes of a parameter depend on the plan"
        return budget.amount if budget.kind == "bytes" else budget.amount * BYTES_PER_PARAM * self.num_full_params

    def check_schema(self, schema: Schema) -> None:
        """Raise PlanError if the plan was made for another schema."""
        if self.fingerprint != schema.fingerprint:
            raise PlanError(
                f"plan was made for schema {self.fingerprint} ({self.num_fields} fields), this is "
                f"{schema.fingerprint} ({len(schema.id_fields)} fields); search again or encode with the same schema"
            )
        if [(t.name, t.num_rows) for t in self.tables] != list(schema.tables.items()):
            raise PlanError(f"the tables of the plan are not those of its schema {schema.describe()}; search again")

    def check_tables(self, full: SizePlan) -> None:
        """Raise PlanError unless the plan lists the tables of `full` in the same order, with the same rows and widths."""
        mine, theirs = ([(t.name, t.num_rows, t.width) for t in plan.tables] for plan in (self, full))
        for given, needed in itertools.zip_longest(mine, theirs):
            if given != needed:
                names = ["nothing" if t is None else f"table {t[0]!r} of {t[1]:,} x {t[2]}" for t in (given, needed)]
                raise PlanError(f"plan has {names[0]} where the model has {names[1]}; search again with this model")

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and, where rows were chosen, the rows to the same name with `.npz`."""
        path = Path(path)
        arrays: dict[str, np.ndarray] = {}
        tables = []
        for number, table in enumerate(self.tables):
            blocks = []
            for place, block in enumerate(table.blocks):
                entry: dict[str, Any] = {
                    "num_rows": block.num_rows,
                    "columns": block.columns,
                    "alignment": block.alignment,
                }
                if block.bits is not None:
                    entry["bits"] = block.bits
                rows = block.rows if isinstance(block, Block) else None
                if isinstance(rows, range):
                    entry["first"] = True
                elif rows is not None:
                    entry["rows"] = f"t{number}b{place}"
                    arrays[entry["rows"]] = rows.astype(row_dtype(table.num_rows))
                blocks.append(entry)
            tables.append({"name": table.name, "num_rows": table.num_rows, "width": table.width, "blocks": blocks})
            if table.bits != 32:
                tables[-1]["bits"] = table.bits
        head = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("tables", *IN_DETAILS)
        }
        head["details"] = self._stored_details()
        if arrays:
            head["rows_crc32"] = crc32_of(arrays)
        text = json.dumps({"plan_version": PLAN_VERSION, **head, "tables": tables}, indent=1)
        with hold(path) if arrays else nullcontext(), set_aside(path.with_suffix(".npz")) if arrays else nullcontext():
            if arrays:
                write_then_rename(path.with_suffix(".npz"), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            write_then_rename(path, lambda file: file.write(text.encode()))

    def _stored_details(self) -> dict[str, Any]:
        """The details in the order of the file format, which holds the fields of a search among them."""
        details = dict(self.details)
        config = {"config": details.pop("config")} if "config" in details else {}
        budget = None if self.budget is None else str(self.budget)
        before = {"budget": budget, "seed": self.seed}
        after = {name: getattr(self, name) for name in ("vocabulary_bytes", "target", "left_bytes")}
        found = {**config, **before, **details, **after}
        return {name: value for name, value in found.items() if value is not None or name not in IN_DETAILS}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan. A PlanShape leaves its rows aside and does not need the npz.

        Raises:
            PlanError: The file is missing, is not a plan, is of a newer version, or contradicts itself.
        """
        path = Path(path)
        try:
            found = read_plan_file(path)
            known = {name: getattr(found.details, name) for name in IN_DETAILS}
            budget = known.pop("budget")
            return cls(
                fingerprint=found.fingerprint,
                num_fields=found.num_fields,
                tables=cls._read_tables(found, path.with_suffix(".npz")),  # type: ignore[arg-type]
                first_order=found.first_order,
                method=found.method,
                details=found.details.model_dump(exclude_unset=True, exclude=set(IN_DETAILS)),
                standalone=found.standalone,
                budget=None if budget is None else Budget.parse(budget),
                **known,
            )
        except FileNotFoundError as error:
            raise PlanError(
                f"{error.filename} does not exist; a plan is a .json and, where rows were chosen, an .npz"
            ) from None
        except (PlanError, BudgetError) as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def _read_tables(cls, found: PlanFile, rows: Path) -> tuple[TableShape, ...]:
        """The tables of a plan file; `rows` is the path of its npz."""
        del rows
        return tuple(
            TableShape(
                t.name, t.num_rows, t.width,
                tuple(BlockShape(b.num_rows, b.columns, b.alignment, bits=b.bits) for b in t.blocks),  # type: ignore[arg-type]
                t.bits,
            )
            for t in found.tables
        )  # fmt: skip

    def diff(self, other: PlanShape) -> str:
        """Lines that say which tables another plan keeps differently; empty if there are none."""
        theirs = {table.name: table for table in other.tables}
        lines = []
        for table in self.tables:
            if table.name not in theirs:
                lines.append(f"{table.name}: {describe_table(table)} -> gone")
            elif difference := describe_difference(table, theirs[table.name]):
                lines.append(f"{table.name}: {difference}")
        return "\n".join(lines + [f"{name}: new" for name in theirs if name not in {t.name for t in self.tables}])

    def __repr__(self) -> str:
        kept = f"{self.num_params:,} of {self.num_full_params:,} embedding parameters"
        return f"<{type(self).__name__} by {self.method}: {kept}, {len(self.tables)} tables>"

    def summary(self) -> str:
        """What the plan keeps, in words, one line per table."""
        head = (
            f"{self.method}: {self.num_params:,} of {self.num_full_params:,} embedding parameters "
            f"({self.num_params / max(1, self.num_full_params):.2%}), {self.slot_ratio:.1%} of the slots, "
            f"{self.num_bytes(self.target):,} bytes with {self.num_first_order_params:,} first-order weights"
            + (f", beside {self.vocabulary_bytes:,} of the vocabulary" if self.vocabulary_bytes else "")
        )
        if self.left_bytes is not None:
            head += f"; covers {self.coverage:.1%} of all embedding bytes, {self.left_bytes:,} are left alone"
        return "\n".join([head, *(f"  {t.name}: {describe_table(t)}" for t in self.tables)])


@dataclass(frozen=True, repr=False)
class SizePlan(PlanShape):
    """What survives of every table, with the ids of its rows, and where the plan came from.

    Attributes:
        tables: One entry per table, in the order of the schema.

    Example:
        >>> plan = SizePlan.full(Schema.from_sizes([100, 10]), width=4)
        >>> plan.num_params, plan.num_bytes()
        (440, 1760)
    """

    tables: tuple[TablePlan, ...]

    @classmethod
    def full(cls, schema: Schema, width: int, first_order: bool = False) -> SizePlan:
        """The plan that keeps everything."""
        tables = tuple(
            TablePlan(name, rows, width, (Block(rows, tuple(range(width))),)) for name, rows in schema.tables.items()
        )
        return cls(schema.fingerprint, len(schema.id_fields), tables, first_order, method="full")

    def with_columns(
        self,
        columns: Mapping[str, Sequence[int]],
        alignment: Alignment = "scatter",
    ) -> SizePlan:
        """A field-level plan over the same tables: all rows, the given columns of each.

        Args:
            columns: Kept columns by table name, in any order. A table that is not named keeps no column.
            alignment: How narrow tables reach the full width.
        """
        tables = tuple(
            dataclasses.replace(t, blocks=(Block(t.num_rows, tuple(sorted(columns.get(t.name, ()))), alignment),))
            for t in self.tables
        )
        return dataclasses.replace(self, tables=tables)

    @classmethod
    def _read_tables(cls, found: PlanFile, rows: Path) -> tuple[TablePlan, ...]:
        lengths = lengths_of(found)
        wide = any(table.num_rows > 1 << 31 for table in found.tables)
        arrays = read_rows(rows, found.rows_crc32, lengths, wide) if lengths else {}

        def block_of(entry: BlockEntry) -> Block:
            listed = range(entry.num_rows) if entry.first else None
            if entry.rows is not None:
                listed = arrays[entry.rows]
            return Block(entry.num_rows, entry.columns, entry.alignment, listed, bits=entry.bits)  # type: ignore[arg-type]

        return tuple(
            TablePlan(t.name, t.num_rows, t.width, tuple(map(block_of, t.blocks)), t.bits) for t in found.tables
        )


def _hashed(rows: np.ndarray | range, num_rows: int) -> Iterator[bytes]:
    """What a digest takes of the rows of a block, the same for a range and for the ids in it."""
    if num_rows > 1 << 31 and len(rows) and rows[-1] == len(rows) - 1:
        yield f" first {len(rows)}".encode()  # to write them all down would take minutes
        return
    for start in range(0, len(rows), CHUNK_IDS):
        yield np.ascontiguousarray(rows[start : start + CHUNK_IDS], row_dtype(num_rows)).tobytes()


def _in_bits(table: TableT, bits: int) -> TableT:
    """The table at another precision, the same for all its rows."""
    if any(block.bits is not None for block in table.blocks):
        table = dataclasses.replace(table, blocks=tuple(dataclasses.replace(b, bits=None) for b in table.blocks))
    return dataclasses.replace(table, bits=bits)
