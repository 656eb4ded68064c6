"""The encoder: raw rows to ids, files on disk, id maps."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.data import encoder_files
from embtrim.data.encoder import Encoder
from embtrim.data.numbering import Numbering
from embtrim.data.reading import open_log
from embtrim.data.tally import KNOWN, MISSING, UNSEEN
from embtrim.errors import DataError
from embtrim.schema import FieldSpec
from tests.data.small_logs import ids, schema_of


class TestEncoder:
    FRAME = pl.DataFrame(
        {
            "y": [0, 1, 1, 0],
            "a": ["u", "u", "v", None],
            "q": [1.0, 2.0, 3.0, None],
            "d": [0.5, 1.5, None, 2.5],
            "g": [["x", "z"], ["x"], None, ["z"]],
            "h": ["k", "l", "m", None],
        }
    )
    SCHEMA = schema_of(
        FieldSpec(name="a"),
        FieldSpec(name="q", type="numeric", transform="quantile:2"),
        FieldSpec(name="d", type="dense", transform="standard"),
        FieldSpec(name="g", type="multi", max_len=2),
        FieldSpec(name="h", hash_size=50),
    )

    @pytest.fixture
    def data(self, run):
        return run(self.FRAME, self.SCHEMA)

    def test_needs_no_label_and_gives_what_encode_wrote(self, data):
        chunk = Encoder.load(data.folder).encode_chunk(self.FRAME.drop("y").reverse().with_columns(extra=1))
        assert chunk.ids[::-1].tolist() == ids(data)
        assert chunk.dense[::-1].tolist() == data.split("train").dense.tolist()
        assert chunk.ids.dtype == np.int32
        assert chunk.dense.dtype == np.float32

    def test_unseen_values_are_oov(self, data):
        frame = pl.DataFrame({"a": ["w"], "q": [9.0], "d": [0.0], "g": [["w", "x"]], "h": ["w"]})
        row = Encoder.load(data.folder).encode_chunk(frame).ids[0]
        assert row[0] == 0
        assert row[1] > 0
        assert row[2:4].tolist() == [0, 1]
        assert row[4] > 0  # a hashed value is never unseen

    def test_empty_frame(self, data):
        assert Encoder.load(data.folder).encode_chunk(self.FRAME.clear()).ids.shape == (0, 5)

    def test_missing_columns_and_wrong_types(self, data):
        encoder = Encoder.load(data.folder)
        with pytest.raises(DataError, match="no column 'd', 'h'; they have y, a, q, g; needed: a, q, d, g, h"):
            encoder.encode_chunk(self.FRAME.drop("d", "h"))
        with pytest.raises(DataError, match="row 2: column 'd' holds 'x', which is not a number"):
            encoder.encode_chunk(self.FRAME.with_columns(d=pl.Series(["1", "x", "2", "3"])))

    def test_save_and_load(self, data, tmp_path):
        first = Encoder.load(data.folder)
        first.save(tmp_path / "copy")
        second = Encoder.load(tmp_path / "copy")
        assert second.schema == first.schema
        assert second.transforms == first.transforms
        assert second.encode_chunk(self.FRAME).ids.tolist() == ids(data)

    def test_a_vocabulary_is_read_some_rows_at_a_time(self, data, monkeypatch):
        whole = Encoder.load(data.folder).vocabularies
        assert max(len(frame) for frame in whole.values()) > 2
        monkeypatch.setattr(encoder_files, "_SLICE_ROWS", 2)
        slices = Encoder.load(data.folder).vocabularies
        assert list(slices) == list(whole)
        assert all(slices[name].equals(frame) for name, frame in whole.items())

    def test_the_encoder_of_some_rows_encodes_them_alike(self, data):
        encoder = Encoder.load(data.folder)
        rows = pl.DataFrame({"a": ["v", "w", None], "q": [9.0, 1.0, None], "d": [0.0] * 3, "g": [["z", "w"], [], None]})
        rows = rows.with_columns(h=pl.Series(["w", "k", None]))
        few = encoder.for_rows(rows)
        assert few.vocabularies["a"]["value"].to_list() == ["v", None]
        assert few.vocabularies["g"]["value"].to_list() == ["z"]
        assert few.encode_chunk(rows).ids.tolist() == encoder.encode_chunk(rows).ids.tolist()

    def test_the_encoder_of_some_rows_knows_other_spellings_of_their_values(self, run):
        data = run(pl.DataFrame({"y": [0, 1, 1, 0], "a": [1, 1, 2, 3]}), schema_of(FieldSpec(name="a", kind="integer")))
        encoder, rows = Encoder.load(data.folder), pl.DataFrame({"a": ["1.0", "2", "02", "4"]})
        few = encoder.for_rows(rows)
        assert set(few.vocabularies["a"]["value"]) == {"1", "2"}
        assert few.encode_chunk(rows).ids.tolist() == encoder.encode_chunk(rows).ids.tolist()

    def test_damaged_folders(self, data, tmp_path):
        for name in ("schema.json", "vocab.parquet", "transforms.json"):
            folder = tmp_path / name.replace(".", "-")
            Encoder.load(data.folder).save(folder)
            (folder / name).write_bytes((folder / name).read_bytes()[:20])
            with pytest.raises(DataError, match=name):
                Encoder.load(folder)

    def test_id_maps(self, data, tmp_path):
        encoder = Encoder.load(data.folder)
        sizes = data.schema.tables
        maps = {name: np.arange(size, dtype=np.int32) for name, size in sizes.items()}
        maps["a"][:] = [0, 1, 0, 2]  # u kept, v merged into OOV, missing moves up
        maps["h"] = (np.arange(sizes["h"]) % 7).astype(np.int32)
        mapped = encoder.with_id_maps(maps)
        mapped.save(tmp_path / "mapped")
        mapped = Encoder.load(tmp_path / "mapped")
        found = mapped.encode_chunk(self.FRAME).ids
        stored = np.array(ids(data))
        assert found[:, 0].tolist() == [1, 1, 0, 2]
        assert found[:, 1:4].tolist() == stored[:, 1:4].tolist()
        assert found[:, 4].tolist() == (stored[:, 4] % 7).tolist()
        assert mapped.vocabularies["a"]["value"].to_list() == ["u", None]  # the vocabulary shrinks with the table
        by_dataset = next(data.with_id_maps(maps).batches("train", 4)).ids_BC
        assert by_dataset.tolist() == found.tolist()

    def test_id_maps_may_move_oov_and_be_chained(self, data):
        encoder = Encoder.load(data.folder)
        once = encoder.with_id_maps({"a": np.array([3, 2, 1, 0])})
        assert once.encode_chunk(self.FRAME).ids[:, 0].tolist() == [2, 2, 1, 0]
        unseen = self.FRAME.with_columns(a=pl.lit("w"))
        assert once.encode_chunk(unseen).ids[:, 0].tolist() == [3] * 4
        twice = once.with_id_maps({"a": np.array([5, 6, 7, 8])})
        assert twice.encode_chunk(self.FRAME).ids[:, 0].tolist() == [7, 7, 6, 5]
        assert twice.encode_chunk(unseen).ids[0, 0] == 8
        with pytest.raises(DataError, match="unknown table 'nope'"):
            encoder.with_id_maps({"nope": np.arange(3)})
        with pytest.raises(DataError, match="has 2 rows, its ids go up to 3"):
            encoder.with_id_maps({"a": np.arange(2)})

    @pytest.mark.parametrize("num_values", [4, 400])
    def test_texts_read_once_are_read_as_cells(self, num_values):
        field = FieldSpec(name="a", kind="integer", nulls=("-1",), vocab_size=num_values + 2)
        listed = [*map(str, range(num_values)), None]
        ids = np.arange(1, num_values + 2, dtype=np.int32)
        vocabulary = pl.DataFrame({"value": pl.Series(listed, dtype=pl.String), "id": ids, "count": ids[::-1]})
        encoder = Encoder(schema_of(field), {"a": vocabulary})
        texts = ["2", None, "1.0", "new", "-1", "", " 3", "-1.0"]
        found, status = encoder.read_texts(field, pl.Series("value", texts))
        missing = num_values + 1
        assert found.tolist() == [3, missing, 2, 0, missing, missing, 4, missing]
        assert status.tolist() == [KNOWN, MISSING, KNOWN, UNSEEN, MISSING, MISSING, KNOWN, MISSING]
        assert found.tolist() == encoder.encode_chunk(pl.DataFrame({"a": texts})).ids[:, 0].tolist()

    @pytest.mark.slow
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), min_size=1, max_size=30
        ),
        st.integers(1, 3),
    )
    def test_any_text_round_trips(self, values, min_count):
        frame = pl.DataFrame({"a": pl.Series(values, dtype=pl.String)})
        draft = schema_of(FieldSpec(name="a", min_count=min_count))
        numbering = Numbering(draft, {})
        codes = numbering.codes(next(open_log(frame).chunks()))
        numbering.count([[codes]])
        _, vocabularies = numbering.vocabularies()
        encoder = Encoder(draft.replace(fields=(draft.fields[0].replace(vocab_size=99),)), vocabularies)
        found = encoder.encode_chunk(frame).ids[:, 0]
        clean = [None if value in (None, "") else value for value in values]
        value_of = {i: v for v, i, _ in vocabularies["a"].rows()}
        for value, i in zip(clean, found, strict=True):
            assert (value_of[i] == value) if clean.count(value) >= min_count else i == 0
        assert numbering.encoded_by(encoder)(codes)[0].tolist() == found.tolist()
