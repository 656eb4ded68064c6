"""Labels and sample weights: words for labels, and values that cannot be used."""

import polars as pl
import pytest

from embtrim.errors import DataError
from tests.data.small_logs import ONE, PRICED


class TestBadLabelsAndWeights:
    @pytest.mark.parametrize(
        "row, message",
        [
            ("2,u,1", r"line 18,204: label 'y' is '2'; a label is 0 or 1"),
            (",u,1", r"line 18,204: label 'y' is missing; drop the row"),
            ("yes,u,1", r"line 18,204: label 'y' is 'yes'"),
        ],
    )
    def test_text_names_the_line(self, run, write, row, message):
        rows = [f"{i % 2},u,{i}" for i in range(20_000)]
        rows[18_204 - 2] = row
        path = write("log.csv", "y,a,price\n" + "\n".join(rows))
        for chunk_bytes in (1 << 24, 50_000):
            with pytest.raises(DataError, match=message):
                run(path, PRICED, chunk_bytes=chunk_bytes)

    @pytest.mark.parametrize(
        "column, message",
        [
            ({"y": [0.0, 1.0, float("nan")]}, "row 3: label 'y' is missing"),
            ({"y": [0, 1, None]}, "row 3: label 'y' is missing"),
            ({"y": [0.0, 1.0, 0.3]}, "row 3: label 'y' is 0.3"),
            ({"y": [[0], [1], [1]]}, "label column 'y' holds List"),
            ({"w": [1.0, -1.0, 1.0]}, "row 2: weight 'w' is -1.0"),
            ({"w": [1.0, None, 1.0]}, "row 2: weight 'w' is None"),
            ({"w": [1.0, 1.0, 1e39]}, r"row 3: weight 'w' is 1e[+]?39; a weight is a finite number"),
        ],
    )
    def test_frames_name_the_row(self, run, column, message):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["u"] * 3, "price": [1, 2, 3], "w": [1, 1, 1], **column})
        with pytest.raises(DataError, match=message):
            run(frame, PRICED.replace(weight="w"))


def test_words_for_labels(run, write):
    data = run(write("log.csv", "y,a\nTrue,u\nfalse,v\n 1,u\n0.0,u\n"), ONE)
    assert data.split("train").labels.tolist() == [1, 0, 1, 0]
