"""Raw cells to values, in logs of any format; cells that cannot be used."""

import numpy as np
import polars as pl
import pytest

from embtrim.data.reading import open_log
from embtrim.errors import DataError
from embtrim.schema import FieldSpec
from tests.data.small_logs import ONE, PRICED, ids, schema_of, vocabulary


class TestCanonicalValues:
    def test_the_same_log_as_csv_and_parquet_gives_the_same_ids(self, run, tmp_path):
        frame = pl.DataFrame(
            {
                "y": [True, False, True, False],
                "a": [3, 12, 3, None],
                "f": [1.0, 2.5, None, 1.0],
                "d": [None, 1, 2, 2],
                "n": [5.0, None, 70.0, 5.0],
            },
            schema_overrides={"d": pl.Int32},
        ).with_columns(pl.date(2024, 1, pl.col("d") + 1).alias("d"))
        fields = [FieldSpec(name=n) for n in "afd"] + [FieldSpec(name="n", type="numeric", transform="log2")]
        frame.write_parquet(tmp_path / "log.parquet")
        as_text = frame.with_columns(pl.col("f").map_elements(lambda v: f"{v:g}", return_dtype=pl.String))
        as_text.write_csv(tmp_path / "log.csv")
        one, two = (run(tmp_path / f"log.{suffix}", schema_of(*fields)) for suffix in ("parquet", "csv"))
        assert ids(one) == ids(two)
        assert one.schema.fingerprint == two.schema.fingerprint
        assert one.split("train").labels.tolist() == two.split("train").labels.tolist() == [1, 0, 1, 0]

    def test_two_fields_may_read_one_column(self, run):
        frame = pl.DataFrame({"y": [0, 1], "a": [3, 100]})
        fields = (
            FieldSpec(name="id", column="a"),
            FieldSpec(name="size", column="a", type="numeric", transform="log2"),
        )
        assert ids(run(frame, schema_of(*fields))) == [[2, 1], [1, 2]]

    @pytest.mark.slow
    @pytest.mark.parametrize("nulls", [(), ("-1",)])
    def test_numbers_are_the_same_whether_a_chunk_parses_as_numbers_or_not(self, run, write, nulls):
        cells = [
            "5",
            " 5",
            "5 ",
            "+5",
            "5.",
            ".5",
            "1e1",
            "-1",
            "-1.0",
            "nan",
            "NaN",
            "",
            "007",
            "3.5",
            "1000000",
            "-7.25",
        ]
        fields = (
            FieldSpec(name="n", type="numeric", transform="log2", nulls=nulls),
            FieldSpec(name="q", column="n", type="numeric", transform="quantile:4", nulls=nulls),
            FieldSpec(name="d", column="n", type="dense", transform="log1p", nulls=nulls),
        )
        frame = pl.DataFrame({"y": ["0", "1"] * 32, "n": [cells[i % 16] for i in range(64)]})
        expected = run(frame, schema_of(*fields))
        path = write("log.tsv", "y\tn\n" + "\n".join("\t".join(row) for row in frame.rows()))
        parsed = [chunk.frame["n"].dtype for chunk in open_log(path).chunks(chunk_bytes=20, numbers=["n"])]
        assert set(parsed) == {pl.Float64, pl.String}
        for chunk_bytes in (20, 1 << 24):
            data = run(path, schema_of(*fields), chunk_bytes=chunk_bytes)
            assert ids(data) == ids(expected)
            assert data.split("train").dense.tolist() == expected.split("train").dense.tolist()

    def test_lists_need_a_multi_field(self, run):
        with pytest.raises(DataError, match="column 'a' holds lists; declare field 'a' as type = 'multi'"):
            run(pl.DataFrame({"y": [0, 1], "a": [[1], [2]]}), ONE)

    def test_text_needs_a_separator(self, run):
        with pytest.raises(DataError, match="needs separator"):
            run(pl.DataFrame({"y": [0, 1], "a": ["p", "q"]}), schema_of(FieldSpec(name="a", type="multi")))

    def test_structs_are_refused(self, run):
        with pytest.raises(DataError, match="column 'a' holds Struct"):
            run(pl.DataFrame({"y": [0, 1], "a": [{"b": 1}, {"b": 2}]}), ONE)

    def test_padded_numbers_and_stated_nulls(self, run, write):
        path = write("log.csv", "y,a,price\n0,u, 5\n1,u,NA\n0,u,-1\n1,u,nan\n0,u,\n")
        schema = PRICED.replace(nulls=("NA", "-1"))
        data = run(path, schema)
        value_of = {i: v for v, i, _ in vocabulary(data, "price")}
        assert [value_of[row[1]] for row in ids(data)] == ["2", None, None, None, None]


class TestBadValues:
    @pytest.mark.parametrize(
        "row, message",
        [
            (
                "0,u,n/a",
                r"log.csv line 18,204: column 'price' holds 'n/a', which is not a number; declare it categorical or add 'n/a'",
            ),
            ("0,u,inf", r"line 18,204: column 'price' holds 'inf', which is not finite"),
        ],
    )
    def test_text_names_the_line(self, run, write, row, message):
        rows = [f"{i % 2},u,{i}" for i in range(20_000)]
        rows[18_204 - 2] = row
        path = write("log.csv", "y,a,price\n" + "\n".join(rows))
        for chunk_bytes in (1 << 24, 50_000):
            with pytest.raises(DataError, match=message):
                run(path, PRICED, chunk_bytes=chunk_bytes)

    def test_lists_are_not_numbers(self, run):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["u"] * 3, "price": [[1], [2], [3]], "w": [1, 1, 1]})
        with pytest.raises(DataError, match=r"column 'price' holds List.* not a number"):
            run(frame, PRICED.replace(weight="w"))

    def test_numbers_beyond_float32(self, run):
        """They would be infinite in what is written, and every loss from then on would be NaN."""
        dense = schema_of(FieldSpec(name="a"), FieldSpec(name="price", type="dense", transform="none"))
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["u"] * 3, "price": [1.0, -1e39, 3.0]})
        with pytest.raises(
            DataError, match=r"row 2: column 'price' gives -1e[+]39, which float32 cannot hold; declare"
        ):
            run(frame, dense)
        fields = (dense.fields[0], dense.fields[1].replace(transform="log1p"))
        assert np.isfinite(run(frame, dense.replace(fields=fields)).split("train").dense).all()
