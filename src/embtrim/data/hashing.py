"""Ids of hashed fields: id = 1 + hash(UTF-8 text) mod hash_size, the same on every machine.

The hash is MurmurHash3 (x86, 32 bits, seed 0), which ONNX graphs can compute, or, in a field without `hash_function`,
blake2b-64 with the key "embtrim", read as a little-endian number. A missing value is hashed as the text "\\0missing".
"""

from __future__ import annotations

import hashlib

import mmh3
import numpy as np
import polars as pl

from embtrim.schema import FieldSpec

MISSING_TOKEN = "\0missing"
HASH_KEY = b"embtrim"


def missing_hash(field: FieldSpec) -> int:
    """The hashed id of a missing value."""
    return _hash(MISSING_TOKEN, field)


def hash_values(values: pl.Series, field: FieldSpec) -> np.ndarray:
    """Ids 1..hash_size of texts as cells of a hashed field: int32 (N,); see the module docstring."""
    texts = values.fill_null(MISSING_TOKEN)
    distinct = texts.unique()
    ids = [_hash(text, field) for text in distinct]
    if not ids:
        return np.empty(0, np.int32)
    return texts.replace_strict(distinct, ids, return_dtype=pl.Int32).to_numpy()


def _hash(text: str, field: FieldSpec) -> int:
    assert field.hash_size is not None
    if field.hash_function == "murmur3":
        number = mmh3.hash(text.encode(), 0, signed=False)
    else:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=HASH_KEY).digest()
        number = int.from_bytes(digest, "little")
    return 1 + number % field.hash_size
