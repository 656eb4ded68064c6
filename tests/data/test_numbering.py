"""Codes in order of appearance, their counts and the ids that take their place, against plain Python."""

import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.data.encoder import Encoder
from embtrim.data.hashing import hash_values
from embtrim.data.numbering import Numbering
from embtrim.data.reading import open_log
from embtrim.errors import DataError
from embtrim.schema import PAD, FieldSpec, Schema

TEXTS = st.one_of(st.none(), st.sampled_from(["", "NA", "3", "03", "-1", "x", "é", "3.0"]), st.text("ab3", max_size=2))
NUMBERS = st.one_of(st.none(), st.sampled_from([-1e15, -3e9, -1.0, -0.5, 0.0, 2.0, 3.0, 1e18]), st.floats(-5, 50))
ROW = st.tuples(TEXTS, TEXTS, NUMBERS, TEXTS, st.lists(TEXTS, max_size=4), TEXTS)
MAX_LEN = 2
HASHED = FieldSpec(name="h", hash_size=20)


def schema(min_count: int) -> Schema:
    def field(name: str, table: str | None = None, **settings) -> FieldSpec:
        return FieldSpec(name=name, table=table, min_count=1 if "hash_size" in settings else min_count, **settings)

    return Schema(
        label="y",
        fields=(
            field("a", "t", nulls=("NA",)),
            field("b", "t"),
            field("n", "t", type="numeric", transform="log2"),
            field("g", "u"),
            field("tags", "u", type="multi", max_len=MAX_LEN),
            HASHED,
            field("hashed_tags", column="tags", type="multi", max_len=MAX_LEN, hash_size=20),
        ),
    )


def value_of(name: str, cell):
    """The canonical value of a cell, None where missing; a list of them for a multi field."""
    if name == "tags":
        return [text for text in cell if text not in (None, "")][:MAX_LEN]
    if name == "n":
        if cell is None:
            return None
        return str(math.floor(math.log(cell) ** 2) if cell > 2 else max(math.floor(cell), -(2**31) + 1))
    return None if cell in (None, "", *(["NA"] if name == "a" else [])) else cell


def plain_ids(draft: Schema, rows: list, num_training: int) -> list[list[int]]:
    """The ids of rows by the rules of encoder.py, one value after another."""
    names = [field.name for field in draft.fields[:6]]
    values = [{name: value_of(name, cell) for name, cell in zip(names, row, strict=True)} for row in rows]
    counts: dict[str, Counter] = {"t": Counter(), "u": Counter()}
    for row in values[:num_training]:
        for field in draft.fields[:5]:
            cell = row[field.name]
            counts[field.table_name].update(cell if field.type == "multi" else [cell])
    ids = {}
    for table, counter in counts.items():
        kept = [value for value, count in counter.items() if count >= draft.fields[0].min_count]
        kept.sort(key=lambda value: (-counter[value], value is None, (value or "").encode()))
        ids[table] = {value: 1 + place for place, value in enumerate(kept)}
    result = []
    for row in values:
        tags = [ids["u"].get(tag, 0) for tag in row["tags"]]
        hashed, *hashed_tags = hash_values(pl.Series([row["h"], *row["tags"]], dtype=pl.String), HASHED).tolist()
        single = [ids["t"].get(row[name], 0) for name in ("a", "b", "n")]
        unused = [PAD] * (MAX_LEN - len(tags))
        result.append([*single, ids["u"].get(row["g"], 0), *tags, *unused, hashed, *hashed_tags, *unused])
    return result


def frame_of(draft: Schema, rows: list) -> pl.DataFrame:
    dtypes = {"n": pl.Float64, "tags": pl.List(pl.String)}
    columns = {field.name: [row[i] for row in rows] for i, field in enumerate(draft.fields[:6])}
    return pl.DataFrame({name: pl.Series(cells, dtype=dtypes.get(name, pl.String)) for name, cells in columns.items()})


def encoder_of(draft: Schema, vocabularies: dict[str, pl.DataFrame]) -> Encoder:
    sizes = {name: 1 + frame.height for name, frame in vocabularies.items()}
    fields = [f.replace(vocab_size=1 + f.hash_size if f.hash_size else sizes[f.table_name]) for f in draft.fields]
    return Encoder(draft.replace(fields=tuple(fields)), vocabularies)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 3), st.integers(1, 3))
@pytest.mark.slow
def test_ids_are_those_of_plain_python(rows, num_training, min_count, num_blocks):
    draft, num_training = schema(min_count), min(num_training, len(rows))
    frame = frame_of(draft, rows)
    numbering = Numbering(draft, {})
    codes = np.concatenate([numbering.codes(chunk) for chunk in open_log(frame).chunks(chunk_bytes=1)], axis=1)
    blocks = np.array_split(codes[:, :num_training], num_blocks, axis=1)
    numbering.count([blocks[:1], blocks[1:]] if num_blocks > 1 else [blocks])
    _, vocabularies = numbering.vocabularies()
    encoder = encoder_of(draft, vocabularies)
    expected = plain_ids(draft, rows, num_training)
    assert numbering.encoded_by(encoder)(codes).T.tolist() == expected
    assert encoder.encode_chunk(frame).ids.tolist() == expected


def test_goes_on_from_its_state():
    draft = schema(1)
    first, second = (frame_of(draft, [(text, "b", 1.0, "g", ["x", text], "h")]) for text in ("old", "new"))
    whole, before, after = (Numbering(draft, {}) for _ in range(3))
    codes = [whole.codes(next(open_log(frame).chunks())) for frame in (first, second)]
    before.codes(next(open_log(first).chunks()))
    after.restore(before.state())
    assert after.codes(next(open_log(second).chunks())).tolist() == codes[1].tolist()
    assert after.state().equals(whole.state())
    assert after.texts("u").to_list() == ["g", "x", "old", "new"]
    twice = pl.concat([before.state(), before.state()])
    with pytest.raises(DataError, match="values of table 't' cannot be numbered as before"):
        Numbering(draft, {}).restore(twice)


def test_ids_of_an_encoder_with_id_maps():
    draft = schema(1)
    frame = frame_of(draft, [("a", "b", 1.0, "g", ["x"], "h"), (None, "b", None, "g", ["x", "y"], None)])
    numbering = Numbering(draft, {})
    codes = numbering.codes(next(open_log(frame).chunks()))
    numbering.count([[codes]])
    encoder = encoder_of(draft, numbering.vocabularies()[1])
    maps = {name: np.arange(size)[::-1].copy() for name, size in encoder.schema.tables.items()}
    mapped = encoder.with_id_maps(maps)
    ids = numbering.encoded_by(mapped)(codes).T
    assert ids.tolist() == mapped.encode_chunk(frame).ids.tolist()
    assert ids[0, -1] == PAD
