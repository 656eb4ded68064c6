"""Ids of hashed fields: id = 1 + blake2b-64(UTF-8 text, key "embtrim") mod hash_size, the same on every machine.

A missing value is hashed as the text "\\0missing".
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import polars as pl

MISSING_TOKEN = "\0missing"
HASH_KEY = b"embtrim"


@cache
def missing_hash(hash_size: int) -> int:
    """The hashed id of a missing value."""
    return int(hash_values(pl.Series([None], dtype=pl.String), hash_size)[0])


def hash_values(values: pl.Series, hash_size: int) -> np.ndarray:
    """Hashed ids 1..hash_size of texts: int32 (N,); see the module docstring."""
    texts = values.fill_null(MISSING_TOKEN)
    distinct = texts.unique()
    digests = [hashlib.blake2b(text.encode(), digest_size=8, key=HASH_KEY).digest() for text in distinct]
    ids = [1 + int.from_bytes(digest, "little") % hash_size for digest in digests]
    if not ids:
        return np.empty(0, np.int32)
    return texts.replace_strict(distinct, ids, return_dtype=pl.Int32).to_numpy()
