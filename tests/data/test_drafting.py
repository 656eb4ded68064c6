"""Schemas drafted from the first rows of a log."""

import logging

import numpy as np
import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.data.read_options import ReadOptions
from embtrim.errors import DataError
from embtrim.schema import Schema


class TestInference:
    @pytest.fixture
    def frame(self):
        rng = np.random.default_rng(0)
        n = 3000
        return pl.DataFrame(
            {
                "when": pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 2), "1s", eager=True).head(n),
                "click": rng.integers(0, 2, n),
                "user_id": rng.integers(0, 500, n),
                "device": rng.choice(["ios", "android"], n),
                "visits": np.floor(rng.pareto(0.8, n)).astype(int),
                "price": rng.normal(size=n),
                "genres": rng.choice(["a|b", "b|c", "a|c|d", "d", "a", "c", "b|d"], n),
                "tags": [["x"] * int(k) for k in rng.integers(0, 4, n)],
                "session": [f"s{i}" for i in range(n)],
                "void": [None] * n,
            }
        )

    def test_draft(self, frame):
        draft = infer_schema(frame)
        found = {field.name: (field.type, field.transform, field.separator, field.max_len) for field in draft.fields}
        assert found == {
            "user_id": ("categorical", None, None, 1),
            "device": ("categorical", None, None, 1),
            "visits": ("numeric", "log2", None, 1),
            "price": ("numeric", "quantile:20", None, 1),
            "genres": ("multi", None, "|", 3),
            "tags": ("multi", None, None, 3),
        }
        assert (draft.label, draft.time) == ("click", "when")

    def test_draft_is_written_and_can_be_edited_and_used(self, frame, run, tmp_path):
        out = tmp_path / "data"
        first = run(frame, out=out)
        path = tmp_path / "data.schema.toml"
        assert Schema.load_draft(path) == infer_schema(frame)
        run(frame, out=out, overwrite=True)  # the same draft again is no conflict
        path.write_text(path.read_text().replace('"quantile:20"', '"quantile:5"'))
        with pytest.raises(
            DataError, match=r"data.schema.toml exists and differs from the schema that would be inferred now"
        ):
            run(frame, out=out, overwrite=True)
        edited = run(frame, path, out=out, overwrite=True)
        assert edited.schema.tables["price"] == 6
        assert edited.schema.fingerprint != first.schema.fingerprint

    def test_labels(self, frame):
        assert infer_schema(frame.rename({"click": "bought"}), "bought").label == "bought"
        with pytest.raises(
            DataError, match=r"no column 'clicc'; did you mean 'click'\? label takes one of: when, click"
        ):
            infer_schema(frame, "clicc")
        with pytest.raises(DataError, match="no label column is named"):
            infer_schema(frame.drop("click"))
        with pytest.raises(DataError, match="no column that could be a field"):
            infer_schema(frame.select("click", "void"))

    def test_a_few_dirty_cells_in_a_column_of_numbers_are_said(self, caplog):
        price = [f"{n / 7:.2f}" for n in range(500)]
        price[3], price[77], price[78] = "$12.30", "1,200", "$12.30"
        frame = pl.DataFrame({"click": [0, 1] * 250, "price": price, "word": ["a", "7"] * 250})
        with caplog.at_level(logging.INFO, logger="embtrim"):
            assert [field.type for field in infer_schema(frame, "click").fields] == ["categorical"] * 2
        (said,) = [r.getMessage() for r in caplog.records if "categorical" in r.getMessage()]
        assert "'price'" in said
        assert "0.6% of its values are not numbers, such as '$12.30', '1,200';" in said

    def test_header_hint(self, write):
        with pytest.raises(DataError, match=r"the first line looks like data: .*ReadOptions\(header=False"):
            infer_schema(write("log.csv", "0,5,1\n1,6,2\n"), "label")
        draft = infer_schema(write("log.csv", "0,5,1\n1,6,2\n"), "column_1", ReadOptions(header=False))
        assert [field.name for field in draft.fields] == ["column_2", "column_3"]
