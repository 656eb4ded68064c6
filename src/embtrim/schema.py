"""What the columns of a log are: fields, tables, vocabulary sizes, and a fingerprint that ties plans to data.

A *field* is one column of the log. An id field owns `length` id columns (one, unless it is multi-valued) and reads one
*table*. Fields that name the same table share its vocabulary and its rows. A dense field is a float and has no table.

Ids are local to a table. Row 0 is for values that are out of vocabulary (OOV); rows 1.. are the values kept, most
frequent first (a hashed table has no order). PAD (-1) fills the unused id columns of a multi-valued field and reads as
zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import tomli_w
from pydantic import Field, model_validator

from embtrim.config import Config, read_toml
from embtrim.errors import DataError
from embtrim.rules import parse_rule, rule_or_none
from embtrim.system.files import write_then_rename

PAD = -1
OOV = 0

_LATER_KEYS = {"where": None, "time_format": None, "decimal": None, "keep": "first", "hash_function": None}
# Ids are int32. A schema that asks for more buckets or columns than these would take the memory before it is used.
MAX_ROWS = 2**31 - 1
MAX_COLUMNS = 1 << 20
MAX_BUCKETS = 1 << 20
# What a field's training column held, see docs/values.md. An instant is a timestamp with a zone.
Kind: TypeAlias = Literal["text", "integer", "decimal", "float", "float32", "boolean", "date", "timestamp", "instant"]


class FieldSpec(Config):
    """One column of a log and how it is encoded.

    Attributes:
        name: Name of the field, unique in the schema.
        column: Raw column that the field reads; None means `name`. Two fields may read one column.
        type: "categorical" (string or integer ids), "numeric" (a number turned into buckets, then ids), "dense" (a
            number kept as a float), or "multi" (several values at once: a list column, or a string with `separator`).
        transform: For numeric fields "log2" (Criteo's rule: v > 2 -> floor(ln(v)^2), else floor(v)) or "quantile:k";
            for dense fields "log1p", "standard" (zero mean, unit variance over the training rows) or "none".
        min_count: Least count of a value in the training rows; rarer values are out of vocabulary.
        hash_size: Number of rows into which values are hashed; None lists the values in a vocabulary.
        hash_function: Hash of a hashed field, which `encode` sets to "murmur3"; None is that of data encoded by earlier
            releases, see hashing.py.
        decimal: For numbers written with commas: "," for a decimal comma (1.217,5), "." for commas between thousands
            (1,217.5); None for plain numbers.
        separator: Text between the values of a multi field inside a string; None for a list column. White space
            around a value, and brackets and quotes as in ['a', 'b'], do not count.
        max_len: Number of id columns of a multi field, which uses max_len values of a row.
        keep: Which values of a longer row are used, the "first" or the "last"; the last of a history that ends with the
            newest.
        pooling: How the embeddings of a multi field's values become one vector.
        table: Name of the table; None means `name`. Fields with the same table share one vocabulary.
        nulls: Strings that mean "missing" in this column, in addition to the schema's; a number covers all its texts,
            so that "-999" covers -999.0. A missing value is a value of its own with its own row, except in a multi
            field, where it is an empty list.
        kind: What the training column held, such as "integer". Values of later files are brought to it: see
            docs/values.md. None lets `encode` find out; "text" keeps every text as it is.
        vocab_size: Rows of the field's table, OOV included; `encode` sets it.
    """

    name: str = Field(min_length=1)
    column: str | None = None
    type: Literal["categorical", "numeric", "dense", "multi"] = "categorical"
    transform: str | None = Field(default=None, pattern=r"^(log2|log1p|standard|none|quantile:[1-9][0-9]*)$")
    min_count: int = Field(default=1, ge=1)
    hash_size: int | None = Field(default=None, ge=1, lt=MAX_ROWS)
    hash_function: Literal["murmur3"] | None = None
    decimal: Literal[",", "."] | None = None
    separator: str | None = Field(default=None, min_length=1)
    max_len: int = Field(default=1, ge=1, le=1 << 16)
    keep: Literal["first", "last"] = "first"
    pooling: Literal["sum", "mean"] = "mean"
    table: str | None = None
    nulls: tuple[str, ...] = ()
    kind: Kind | None = None
    vocab_size: int | None = Field(default=None, ge=1, le=MAX_ROWS)

    @model_validator(mode="after")
    def _check_type(self) -> FieldSpec:
        numeric = self.transform is not None and (self.transform == "log2" or self.transform.startswith("quantile:"))
        dense = self.transform in ("log1p", "standard", "none")
        if self.type == "numeric" and not numeric:
            raise ValueError(f"numeric field {self.name!r} needs transform = 'log2' or 'quantile:k'")
        if self.type == "dense" and not dense:
            raise ValueError(f"dense field {self.name!r} needs transform = 'log1p', 'standard' or 'none'")
        if self.type in ("categorical", "multi") and self.transform is not None:
            raise ValueError(f"{self.type} field {self.name!r} takes no transform")
        if self.type != "multi" and (self.max_len != 1 or self.separator is not None or self.keep != "first"):
            raise ValueError(f"field {self.name!r}: max_len, separator and keep are for type = 'multi'")
        if self.type in ("categorical", "multi") and self.decimal is not None:
            raise ValueError(f"field {self.name!r}: decimal is for type = 'numeric' and 'dense'")
        if self.transform is not None and self.transform.startswith("quantile:"):
            digits = self.transform.partition(":")[2]
            if len(digits) > 9 or int(digits) > MAX_BUCKETS:
                raise ValueError(f"numeric field {self.name!r} has at most {MAX_BUCKETS:,} buckets")
        if self.type == "dense" and (self.table is not None or self.hash_size is not None):
            raise ValueError(f"dense field {self.name!r} has no table")
        return self

    @property
    def raw_column(self) -> str:
        """The column of the raw log that this field reads."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The table that this field reads."""
        return self.table or self.name

    @property
    def length(self) -> int:
        """Number of id columns that the field owns (0 for a dense field)."""
        return 0 if self.type == "dense" else self.max_len


class Schema(Config):
    """The fields of a log, its label, and, once the log is encoded, the vocabulary sizes.

    Attributes:
        label: Column with the binary label, or a rule that makes it, such as `rating >= 8`; see rules.py.
        where: Rule that chooses the rows of a log, such as `rating > 0`; None takes all rows. Rows that are scored need no
            label, and all of them are scored.
        weight: Column with a non-negative sample weight, or None.
        time: Column that orders rows for a split by time, or None.
        time_format: Form of the times in text, as strptime takes it ("%d/%m/%Y %H:%M"); None reads the forms that can
            be read in one way only, see docs/values.md.
        nulls: Strings that mean "missing" in every column.
        fields: The fields in the order in which models concatenate them.
        vocabulary_digest: Digest of the vocabularies; `encode` sets it.
    """

    label: str = Field(min_length=1)
    where: str | None = None
    weight: str | None = None
    time: str | None = None
    time_format: str | None = None
    nulls: tuple[str, ...] = ("",)
    fields: tuple[FieldSpec, ...] = Field(min_length=1)
    vocabulary_digest: str | None = None

    def __deepcopy__(self, memo: dict[int, object] | None = None) -> Schema:
        """The schema itself, which cannot change: models hold it, and copies of them need no copy of a thousand fields."""
        return self

    @model_validator(mode="after")
    def _check_fields(self) -> Schema:
        names = Counter(field.name for field in self.fields)
        twice = sorted(name for name, count in names.items() if count > 1)
        if twice:
            raise ValueError(f"field names must be unique; given twice: {', '.join(twice)}")
        # A rule over several columns may compare the outcome with a feature, such as a time watched with a duration.
        leaks = [field.name for field in self.fields if (field.raw_column,) == self.label_columns]
        if leaks:
            raise ValueError(f"field {leaks[0]!r} reads the label column {self.label_columns[0]!r}")
        if self.num_id_columns > MAX_COLUMNS:
            raise ValueError(f"the fields have {self.num_id_columns:,} id columns; at most {MAX_COLUMNS:,} are allowed")
        if self.where is not None:
            parse_rule(self.where)
        by_table: dict[str, FieldSpec] = {}
        for field in self.id_fields:
            first = by_table.setdefault(field.table_name, field)
            for key in ("vocab_size", "hash_size", "hash_function", "min_count"):
                if getattr(field, key) != getattr(first, key):
                    raise ValueError(f"fields {first.name!r} and {field.name!r} share a table but differ in {key}")
        return self

    @cached_property
    def label_columns(self) -> tuple[str, ...]:
        """The raw columns that the label reads."""
        rule = rule_or_none(self.label)
        return (self.label,) if rule is None else rule.columns

    @cached_property
    def where_columns(self) -> tuple[str, ...]:
        """The raw columns that choose the rows of a log."""
        return () if self.where is None else parse_rule(self.where).columns

    @cached_property
    def id_fields(self) -> tuple[FieldSpec, ...]:
        """The fields that read a table, in order; F in shape comments."""
        return tuple(field for field in self.fields if field.type != "dense")

    @cached_property
    def dense_fields(self) -> tuple[FieldSpec, ...]:
        """The fields kept as floats, in order."""
        return tuple(field for field in self.fields if field.type == "dense")

    @cached_property
    def tables(self) -> dict[str, int]:
        """Rows of each table by name, OOV included, in the order of first use."""
        sizes: dict[str, int] = {}
        for field in self.id_fields:
            if field.vocab_size is None:
                raise DataError(
                    f"schema is a draft: field {field.name!r} has no vocab_size; run `embtrim encode` first"
                )
            sizes[field.table_name] = field.vocab_size
        return sizes

    @cached_property
    def fields_of_table(self) -> dict[str, tuple[FieldSpec, ...]]:
        """The fields that read each table by its name, in the order of `tables`."""
        found: dict[str, list[FieldSpec]] = {}
        for field in self.id_fields:
            found.setdefault(field.table_name, []).append(field)
        return {name: tuple(fields) for name, fields in found.items()}

    @cached_property
    def num_id_columns(self) -> int:
        """Number of columns of an encoded id matrix; C in shape comments."""
        return sum(field.length for field in self.id_fields)

    @cached_property
    def column_slices(self) -> tuple[slice, ...]:
        """The columns of each id field in the id matrix."""
        slices, start = [], 0
        for field in self.id_fields:
            slices.append(slice(start, start + field.length))
            start += field.length
        return tuple(slices)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever a field, a size or a vocabulary does."""
        values = self.model_dump(mode="json")
        for field in values["fields"]:
            del field["kind"]  # says how other logs are read; the ids of this one are in the vocabulary
        # Keys that schemas of earlier releases lack count only where they say something.
        for part in (values, *values["fields"]):
            for key in [key for key, default in _LATER_KEYS.items() if key in part and part[key] == default]:
                del part[key]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """The fingerprint and the number of fields for messages, such as `9f2c04aa11d3 (39 fields)`."""
        return f"{self.fingerprint} ({len(self.fields)} fields)"

    def save_draft(self, path: str | Path) -> None:
        """Write the schema as TOML for the user to edit; fields leave out keys with default values."""
        values = self.model_dump(mode="json", exclude_none=True, exclude={"fields", "vocabulary_digest"})
        values["fields"] = [
            {"name": f.name, "type": f.type, **f.model_dump(mode="json", exclude_defaults=True, exclude={"vocab_size"})}
            for f in self.fields
        ]
        write_then_rename(Path(path), lambda file: tomli_w.dump(values, file))

    @classmethod
    def load_draft(cls, path: str | Path) -> Schema:
        """Read a schema from TOML.

        Raises:
            ConfigError: The file cannot be read or has a wrong key or value; the message names it.
        """
        return cls.parse(read_toml(path), where=str(path))

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], label: str = "label") -> Schema:
        """A schema of single-valued fields `f0, f1, ..` with the given vocabulary sizes, for synthetic data."""
        return cls(label=label, fields=tuple(FieldSpec(name=f"f{i}", vocab_size=n) for i, n in enumerate(sizes)))
