import copy
import json
import re

import numpy as np
import pytest
import torch
from pydantic import Field

from embtrim.config import Config, apply_overrides, read_toml, to_toml
from embtrim.data import dataset as dataset_module
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.data.encoding import encode
from embtrim.errors import ConfigError, DataError
from embtrim.schema import PAD, FieldSpec, Schema


class Inner(Config):
    keep: float = Field(default=0.5, gt=0)
    steps: int = 3


class Outer(Config):
    name: str = "x"
    inner: Inner = Inner()


class TestConfig:
    def test_unknown_key_names_the_nearest(self):
        with pytest.raises(ConfigError, match=r"\[search\] unknown key 'kep' for Inner; did you mean 'keep'\?"):
            Inner.parse({"kep": 1}, where="search")
        with pytest.raises(ConfigError, match=r"unknown key 'stepz' for Inner; did you mean 'steps'\?"):
            Outer.parse({"inner": {"stepz": 1}})
        with pytest.raises(ConfigError, match="allowed: keep, steps"):
            Inner.parse({"zzz": 1})

    def test_wrong_value(self):
        with pytest.raises(ConfigError, match="Inner: keep, given -1"):
            Inner(keep=-1)

    def test_frozen_and_replace(self):
        inner = Inner()
        with pytest.raises(ValueError, match="frozen"):
            inner.keep = 1  # type: ignore[misc]
        assert inner.replace(keep=2.0).keep == 2.0
        assert inner.keep == 0.5
        with pytest.raises(ConfigError):
            inner.replace(kep=2)

    def test_toml_round_trip(self, tmp_path):
        path = tmp_path / "settings.toml"
        path.write_text(to_toml(Outer(name="y", inner=Inner(steps=9))))
        assert Outer.parse(read_toml(path)) == Outer(name="y", inner=Inner(steps=9))

    def test_broken_toml(self, tmp_path):
        path = tmp_path / "settings.toml"
        path.write_text("a = 1\nb = = 2\n")
        with pytest.raises(ConfigError, match=r"settings.toml is not valid TOML: .*line 2"):
            read_toml(path)
        with pytest.raises(ConfigError, match="does not exist"):
            read_toml(tmp_path / "none.toml")

    def test_overrides(self):
        values = {"inner": {"keep": 0.1}}
        changed = apply_overrides(values, ["inner.keep=0.3", "name=deepfm", "inner.steps=4"])
        assert changed == {"inner": {"keep": 0.3, "steps": 4}, "name": "deepfm"}
        assert values == {"inner": {"keep": 0.1}}
        for bad in ("inner.keep", "=3"):
            with pytest.raises(ConfigError, match=r"--set takes section.key=value"):
                apply_overrides(values, [bad])
        with pytest.raises(ConfigError, match="is a value, not a section"):
            apply_overrides({"name": "x"}, ["name.deep=1"])


class TestFieldSpec:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"type": "numeric"}, "needs transform = 'log2' or 'quantile:k'"),
            ({"type": "numeric", "transform": "log1p"}, "needs transform = 'log2'"),
            ({"type": "numeric", "transform": "quantile:0"}, "transform"),
            ({"type": "dense", "transform": "log2"}, "needs transform = 'log1p'"),
            ({"transform": "log2"}, "takes no transform"),
            ({"max_len": 3}, "are for type = 'multi'"),
            ({"separator": "|"}, "are for type = 'multi'"),
            ({"type": "dense", "transform": "none", "hash_size": 5}, "has no table"),
            ({"min_count": 0}, "min_count"),
            ({"typ": "multi"}, "did you mean 'type'"),
            ({"name": ""}, "name"),
        ],
    )
    def test_contradictions(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            FieldSpec(**{"name": "f", **settings})

    def test_defaults(self):
        field = FieldSpec(name="f")
        assert (field.raw_column, field.table_name, field.length) == ("f", "f", 1)
        assert FieldSpec(name="d", type="dense", transform="none").length == 0


class TestSchema:
    SCHEMA = Schema(
        label="y",
        time="t",
        fields=(
            FieldSpec(name="item", vocab_size=5, table="items"),
            FieldSpec(name="price", type="dense", transform="log1p"),
            FieldSpec(name="history", type="multi", max_len=3, table="items", vocab_size=5),
            FieldSpec(name="user", vocab_size=7),
        ),
    )

    def test_layout(self):
        assert self.SCHEMA.tables == {"items": 5, "user": 7}
        assert self.SCHEMA.num_id_columns == 5
        assert self.SCHEMA.column_slices == (slice(0, 1), slice(1, 4), slice(4, 5))
        assert [field.name for field in self.SCHEMA.dense_fields] == ["price"]

    @pytest.mark.parametrize(
        "fields, message",
        [
            ((FieldSpec(name="a"), FieldSpec(name="a")), "given twice: a"),
            ((FieldSpec(name="a", column="y"),), "reads the label column 'y'"),
            (
                (FieldSpec(name="a", table="t"), FieldSpec(name="b", table="t", min_count=2)),
                "share a table but differ in min_count",
            ),
            ((), "fields"),
        ],
    )
    def test_contradictions(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            Schema(label="y", fields=fields)

    def test_a_draft_has_no_sizes(self):
        with pytest.raises(DataError, match="run `embtrim encode` first"):
            _ = Schema(label="y", fields=(FieldSpec(name="a"),)).tables

    def test_draft_round_trip(self, tmp_path):
        drafts = self.SCHEMA.replace(
            fields=tuple(f.replace(vocab_size=None) for f in self.SCHEMA.fields), nulls=("", "NA")
        )
        drafts.save_draft(tmp_path / "draft.toml")
        assert Schema.load_draft(tmp_path / "draft.toml") == drafts

    def test_draft_with_a_typo(self, tmp_path):
        path = tmp_path / "draft.toml"
        path.write_text('label = "y"\n[[fields]]\nname = "a"\nmincount = 2\n')
        with pytest.raises(
            ConfigError, match=r"draft.toml\] unknown key 'mincount' for FieldSpec; did you mean 'min_count'\?"
        ):
            Schema.load_draft(path)

    def test_fingerprint_follows_every_part(self):
        seen = {self.SCHEMA.fingerprint}
        seen.add(self.SCHEMA.replace(label="z").fingerprint)
        seen.add(self.SCHEMA.replace(vocabulary_digest="0").fingerprint)
        seen.add(self.SCHEMA.replace(fields=self.SCHEMA.fields[:3]).fingerprint)
        assert len(seen) == 4
        assert Schema.parse(self.SCHEMA.model_dump(mode="json")).fingerprint == self.SCHEMA.fingerprint


def make(num_rows: int = 10, **arrays) -> EncodedDataset:
    schema = Schema(
        label="y",
        fields=(FieldSpec(name="a", vocab_size=4), FieldSpec(name="g", type="multi", max_len=2, vocab_size=3)),
    )
    ids = np.stack([np.arange(num_rows) % 4, np.arange(num_rows) % 3, np.full(num_rows, PAD)], 1).astype(np.int32)
    return EncodedDataset(schema, {"train": SplitArrays(ids, (np.arange(num_rows) % 2).astype(np.float32), **arrays)})


class TestDataset:
    def test_batches_in_order(self):
        data = make(10, weights=np.arange(10, dtype=np.float32))
        batches = list(data.batches("train", 4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert data.num_batches("train", 4) == 3
        assert torch.cat([b.ids_BC for b in batches]).tolist() == data.split("train").ids.tolist()
        assert torch.cat([b.weights_B for b in batches]).tolist() == list(range(10))  # type: ignore[arg-type]
        assert batches[0].ids_BC.dtype == torch.int32

    @pytest.mark.parametrize("window, chunk", [(1 << 20, 4096), (64, 8)])
    def test_shuffled_batches_hold_every_row_once(self, monkeypatch, window, chunk):
        monkeypatch.setattr(dataset_module, "WINDOW_ROWS", window)
        monkeypatch.setattr(dataset_module, "CHUNK_ROWS", chunk)
        data = make(1000, weights=np.arange(1000, dtype=np.float32))

        def order(seed):
            return torch.cat([b.weights_B for b in data.batches("train", 30, shuffle_seed=seed)]).tolist()

        assert sorted(order(1)) == list(range(1000))
        assert order(1) == order(1)
        assert order(1) != order(2)
        assert all(len(b) == 30 for b in list(data.batches("train", 30, shuffle_seed=1))[:-1])

    def test_value_counts_and_id_maps(self):
        data = make(10)
        assert data.value_counts()["a"].tolist() == [3, 3, 2, 2]
        assert data.value_counts()["g"].tolist() == [4, 3, 3]
        mapped = data.with_id_maps({"a": np.array([0, 1, 0, 2], np.int32)})
        assert mapped.value_counts()["a"].tolist() == [5, 3, 2]
        assert next(mapped.batches("train", 4)).ids_BC.tolist() == [[0, 0, PAD], [1, 1, PAD], [0, 2, PAD], [2, 0, PAD]]
        assert data.split("train").ids[2, 0] == 2
        with pytest.raises(DataError, match="id map for table 'a' has 2 rows"):
            data.with_id_maps({"a": np.array([0, 1])})

    def test_shapes_are_checked(self):
        schema = make().schema
        with pytest.raises(DataError, match=r"ids are int64 \(2, 3\)"):
            EncodedDataset(schema, {"train": SplitArrays(np.zeros((2, 3), np.int64), np.zeros(2, np.float32))})
        with pytest.raises(DataError, match="has no split 'test'; it has train"):
            make().split("test")

    @pytest.mark.parametrize(("column", "value", "message"), [
        (0, 4, "ids of field 'a' lie in 0..4, its table has rows 0..3"),
        (0, -1, "ids of field 'a' lie in -1..3, its table has rows 0..3"),
        (2, 3, "its table has rows -1..2, -1 where there is no value"),
        (2, -2, "its table has rows -1..2, -1 where there is no value"),
    ])  # fmt: skip
    def test_ids_lie_in_their_tables(self, column, value, message):
        """An id beyond its table would read another table's row."""
        schema, ids = make(10).schema, np.array(make(10).split("train").ids)
        ids[5, column] = value
        with pytest.raises(DataError, match=re.escape(message)):
            EncodedDataset(schema, {"train": SplitArrays(ids, np.zeros(10, np.float32))})

    def test_damaged_folders(self, tmp_path):
        import polars as pl

        frame = pl.DataFrame({"y": [0, 1] * 20, "a": ["u", "v"] * 20})
        options = {"split": "1:0:0", "progress": False}
        for name, content, message in [
            ("meta.json", None, "meta.json does not exist"),
            ("meta.json", '{"format_version": 99}', "has dataset format 99, this release reads 1"),
            ("meta.json", "{", "meta.json cannot be read"),
            ("schema.json", None, "schema.json does not exist"),
            ("train/ids.npy", None, "ids.npy does not exist"),
            ("train/labels.npy", "x", "labels.npy is damaged"),
        ]:
            folder = tmp_path / f"{name.replace('/', '-')}-{content and len(content)}"
            encode(frame, Schema(label="y", fields=(FieldSpec(name="a"),)), out=folder, **options)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_text(content)
            with pytest.raises(DataError, match=message):
                EncodedDataset.load(folder)
        meta = json.loads((folder / "meta.json").read_text())
        meta["num_rows"]["train"] = 7
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(DataError):
            EncodedDataset.load(folder)
        with pytest.raises(DataError, match="is this a folder written by `embtrim encode`"):
            EncodedDataset.load(tmp_path)

    def test_truncated_ids(self, tmp_path):
        import polars as pl

        frame = pl.DataFrame({"y": [0, 1] * 200, "a": ["u", "v"] * 200})
        encode(
            frame, Schema(label="y", fields=(FieldSpec(name="a"),)), out=tmp_path / "d", split="1:0:0", progress=False
        )
        path = tmp_path / "d" / "train" / "ids.npy"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match="is damaged"):
            EncodedDataset.load(tmp_path / "d")


def test_a_copy_of_a_model_shares_the_schema():
    schema = Schema(label="y", fields=(FieldSpec(name="a", vocab_size=3),))
    assert copy.deepcopy({"of": [schema]})["of"][0] is schema
    assert schema.replace(label="z").label == "z"
