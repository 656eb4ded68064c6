"""What a plan file holds: JSON, and the npz beside it where rows were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from embtrim.config import Config, Entry
from embtrim.errors import ConfigError, PlanError
from embtrim.plan.table import MAX_ROWS, MAX_WIDTH, Target
from embtrim.untrusted import read_json

PLAN_VERSION = 1

Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Rows = Annotated[int, Field(strict=True, ge=0, le=MAX_ROWS)]


class BlockEntry(Entry):
    """A block of a table; see `embtrim.plan.table.Block`.

    Attributes:
        num_rows: Number of rows.
        columns: Kept columns, or their number.
        alignment: How narrow rows reach the full width.
        bits: Bits of a band.
        rows: Name of the array of the npz that holds the ids of the rows.
        first: Whether the rows are the first ones of the table.
    """

    num_rows: Rows
    columns: Count | Annotated[tuple[Count, ...], Field(max_length=MAX_WIDTH)]
    alignment: str = "scatter"
    bits: int | None = Field(default=None, strict=True)
    rows: str | None = None
    first: bool = Field(default=False, strict=True)


class TableEntry(Entry):
    """A table; see `embtrim.plan.table.TablePlan`."""

    name: str
    num_rows: Rows
    width: Count
    blocks: tuple[BlockEntry, ...]
    bits: int = Field(default=32, strict=True)


class Details(Entry):
    """What a search wants remembered; the keys of a plan among it are typed."""

    model_config = ConfigDict(extra="allow")

    config: dict[str, Any] | None = None
    budget: str | None = None
    seed: int | None = Field(default=None, strict=True, ge=0)
    vocabulary_bytes: int | None = Field(default=None, strict=True, ge=0)
    target: Target | None = None
    left_bytes: int | None = Field(default=None, strict=True, ge=0)


class PlanFile(Config):
    """A plan; see `embtrim.plan.plan.PlanShape`.

    Attributes:
        rows_crc32: Checksum of what the npz holds.
    """

    plan_version: int
    fingerprint: str
    num_fields: Count
    first_order: bool = Field(default=False, strict=True)
    method: str = "manual"
    standalone: bool = Field(default=False, strict=True)
    details: Details = Details()
    rows_crc32: int | None = Field(default=None, strict=True)
    tables: tuple[TableEntry, ...]


def read_plan_file(path: Path) -> PlanFile:
    """Read the JSON of a plan.

    Raises:
        FileNotFoundError: The file is missing.
        PlanError: It is not a plan, or of a newer version.
    """
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise PlanError(f"this is not a valid plan ({error}); write it with SizePlan.save") from None
    if not isinstance(values, dict) or "plan_version" not in values:
        raise PlanError("this is not an embtrim plan: it has no plan_version")
    version = values["plan_version"]
    if version != PLAN_VERSION:
        raise PlanError(f"plan version {version}, this release reads {PLAN_VERSION}; upgrade embtrim")
    try:
        return PlanFile.parse(values)
    except ConfigError as error:
        raise PlanError(f"this is not a valid plan ({error}); write it with SizePlan.save") from None


def lengths_of(found: PlanFile) -> dict[str, int]:
    """Number of rows of each array of the npz that blocks name.

    Raises:
        PlanError: Two blocks of different numbers of rows name the same array.
    """
    lengths: dict[str, int] = {}
    for block in (block for table in found.tables for block in table.blocks):
        if block.rows is not None and lengths.setdefault(block.rows, block.num_rows) != block.num_rows:
            raise PlanError(f"blocks of different numbers of rows name the same rows {block.rows!r}")
    return lengths
