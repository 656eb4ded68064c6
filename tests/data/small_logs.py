"""Schemas and a frame that several tests of encoding use, and the parts of a dataset that they compare."""

import polars as pl

from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder import Encoder
from embtrim.schema import FieldSpec, Schema

ALL_TRAIN = "1:0:0"


def schema_of(*fields: FieldSpec, **settings) -> Schema:
    return Schema(label="y", fields=fields, **settings)


ONE = schema_of(FieldSpec(name="a"))
PRICED = schema_of(FieldSpec(name="a"), FieldSpec(name="price", type="numeric", transform="log2"))
DATED = pl.DataFrame(
    {"y": [0, 1, 1] * 400, "a": [str(i % 50) for i in range(1200)], "t": [i // 2 for i in range(1200)]}
)


def ids(data: EncodedDataset, split: str = "train") -> list:
    return data.split(split).ids.tolist()


def vocabulary(data: EncodedDataset, table: str) -> list[tuple]:
    assert data.folder is not None
    return Encoder.load(data.folder).vocabularies[table].rows()
