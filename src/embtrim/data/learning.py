"""What the transforms of a new dataset learn from its training rows: quantile edges, mean and standard deviation.

Parts of a log may be read apart and merged in any order. The result is the same to the last bit: a sample depends on the
rows alone, and the moments of chunks are merged in the order of the log.

Shapes: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from embtrim.data.cells import number_columns, to_numbers
from embtrim.data.encoder import Encoder, digest
from embtrim.data.log_file import Chunk
from embtrim.data.splitting import Sample, Splitter
from embtrim.data.transforms import Moments, is_learned, quantile_edges
from embtrim.schema import FieldSpec, Schema


def learned_fields(schema: Schema) -> list[FieldSpec]:
    """The fields whose transform is learned."""
    return [field for field in schema.fields if is_learned(field.transform)]


def learned_columns(schema: Schema, splitter: Splitter) -> tuple[list[str], set[str]]:
    """The columns that learning reads, and those among them that text may give as numbers."""
    columns = [field.raw_column for field in learned_fields(schema)]
    numbers = set(columns) & set(number_columns(schema))
    return columns + ([splitter.column] if splitter.column is not None else []), numbers


class Learned:
    """What the learned transforms need of the training rows read so far."""

    def __init__(self, schema: Schema, seed: int) -> None:
        self._schema = schema
        self._samples = {f.name: Sample(seed) for f in learned_fields(schema) if f.transform != "standard"}
        # By field and first row of a chunk.
        self._moments: dict[str, dict[int, Moments]] = {
            f.name: {} for f in learned_fields(schema) if f.transform == "standard"
        }

    def add(self, chunk: Chunk, splitter: Splitter) -> None:
        """Look at the training rows of a chunk.

        Raises:
            DataError: A cell is not a number.
        """
        is_train_N = splitter.assign(chunk) == 0
        values = to_numbers(chunk.frame, learned_fields(self._schema), self._schema, chunk.locate)
        for name, sample in self._samples.items():
            rows = np.flatnonzero(is_train_N & values[name].is_not_null().to_numpy())
            sample.add(chunk.first_row, values[name].gather(rows), rows)
        for name, moments in self._moments.items():
            moments[chunk.first_row] = Moments.of(values[name].filter(pl.Series(is_train_N)).drop_nulls().to_numpy())

    def shrunk(self) -> Learned:
        """The same, once it holds no more values than it needs."""
        for sample in self._samples.values():
            sample.shrunk()
        return self

    def merge(self, other: Learned) -> None:
        """Add what another part of the log holds."""
        for name, sample in self._samples.items():
            sample.merge(other._samples[name])
        for name, moments in self._moments.items():
            moments |= other._moments[name]

    def transforms(self) -> dict[str, dict[str, Any]]:
        """What the transforms have learned, by field."""
        found: dict[str, dict[str, Any]] = {}
        for field in learned_fields(self._schema):
            if field.name in self._samples:
                num_buckets = int((field.transform or "").partition(":")[2])
                values = self._samples[field.name].values().to_numpy()
                found[field.name] = {"edges": quantile_edges(values, num_buckets)}
                continue
            whole = Moments()
            for _, part in sorted(self._moments[field.name].items()):
                whole.merge(part)
            found[field.name] = whole.result()
        return found


def new_encoder(
    schema: Schema, vocabularies: dict[str, pl.DataFrame], transforms: Mapping[str, Mapping[str, Any]]
) -> Encoder:
    """The encoder of a new dataset.

    Args:
        schema: The fields, with their kinds and without sizes.
        vocabularies: By table the values kept, see `Numbering.vocabularies`.
        transforms: What the transforms have learned, by field.
    """
    fields = []
    for spec in schema.fields:
        if spec.type != "dense":
            kept = spec.hash_size or vocabularies[spec.table_name].height
            spec = spec.replace(vocab_size=1 + kept)
        fields.append(spec)
    encoded = schema.replace(fields=tuple(fields), vocabulary_digest=digest(vocabularies, transforms))
    return Encoder(encoded, vocabularies, transforms)
