"""Lists written as text: their parts, how a draft finds them, and which of them a field keeps."""

import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.data.text_lists import TextList, find_text_lists, split_texts
from embtrim.errors import ConfigError
from embtrim.schema import PAD, FieldSpec
from tests.data.small_logs import ids, schema_of, vocabulary


@pytest.mark.parametrize(
    "separator, text, parts",
    [
        ("|", "a| b |", ["a", "b"]),
        (",", "Action, Comedy", ["Action", "Comedy"]),
        (",", "[9, 5, 6]", ["9", "5", "6"]),
        (",", " ['a', \"b, c\",'it\\'s'] ", ["a", "b, c", "it's"]),
        (",", '["a","b"]', ["a", "b"]),
        (",", "{1,2}", ["1", "2"]),
        (",", "(1, 2)", ["1", "2"]),
        (",", "[None, 7, nan]", ["7"]),
        (",", "None, 7", ["None", "7"]),
        (",", "['None', 7]", ["None", "7"]),
        (",", "[]", []),
        (",", "", []),
        (",", None, None),
        ("|", "Toy (1995)|(Heat)", ["Toy (1995)", "(Heat)"]),
        ("|", "a\u2003|b", ["a", "b"]),
        (" ", "[ 9  5\n 6]", ["9", "5", "6"]),
        ("::", "a::b c", ["a", "b c"]),
    ],
)
@pytest.mark.parametrize("beside", ["x", " x", "['y']", '["z, z"]'])
def test_parts(separator, text, parts, beside):
    # The cells of a chunk do not change how one of them is read.
    assert split_texts(pl.Series([beside, text, beside]), separator).to_list()[1] == parts


@pytest.mark.parametrize(
    "texts, found",
    [
        (["[9, 5, 6]", "[7]", "[]", None] * 9, TextList(",", 3)),
        ([f"[{k}, {k + 1}]" for k in range(2000)], TextList(",", 2)),
        ([f"{k}|{k + 1}|{7 * k}" for k in range(2000)], TextList("|", 3)),
        ([f"N{k} N{3 * k}" for k in range(300)], TextList(" ", 2)),
        ([f"{'ABCDE'[k % 5]}, {'CDEFG'[k % 3]}" for k in range(60)], TextList(",", 2)),
        (["a^b", "b^c"] * 9, TextList("^", 2)),
        (["[1 2 3]"] * 9, TextList(" ", 3)),
        (["[('a;b')]"] * 9, TextList(",", 1)),
        ([f"Hello world, how is {k}" for k in range(300)], None),
        (["Paris, 12 Rue", "Lyon, 3 Rue"] * 9, None),
        (["New York", "Los Angeles"] * 9, None),
        (["2024-01-01 10:00", "2024-01-02 11:00"] * 9, None),
        (["(new)", "(old)"] * 9, None),
        (['[{"id": 1, "name": "x"}]'] * 9, "it holds objects or nested lists as text; write the values that matter as a list"),
        (["[[1, 2], [3]]"] * 9, "it holds objects or nested lists as text; write the values that matter as a list"),
        ([], None),
    ],
)  # fmt: skip
def test_a_draft_finds_lists(texts, found):
    assert find_text_lists(pl.Series(texts, dtype=pl.String)) == found


def test_histories_that_differ_in_every_row_are_lists(tmp_path):
    hist = [[(7 * k + j * j) % 200 for j in range(10)] for k in range(2000)]
    lists = pl.DataFrame({"click": [0, 1] * 1000, "hist": hist})
    drafts = []
    for number, text in enumerate((lambda row: "|".join(map(str, row)), str)):
        lists.with_columns(hist=pl.Series([text(row) for row in hist])).write_csv(tmp_path / f"{number}.csv")
        (field,) = infer_schema(tmp_path / f"{number}.csv").fields
        drafts.append((field.type, field.separator, field.max_len))
    assert drafts == [("multi", "|", 10), ("multi", ",", 10)]


def test_the_same_ids_however_a_list_is_written(run):
    lists = [["b", "a"], ["c"], [], ["a", "c", "b"]]
    texts = {
        "|": ["b|a", "c", "", "a| c|b"],
        ",": ["['b', 'a']", "c", "[]", '["a","c", b]'],
    }
    field = FieldSpec(name="a", type="multi", max_len=2)
    expected = run(pl.DataFrame({"y": [0, 1, 1, 0], "a": lists}), schema_of(field))
    for separator, cells in texts.items():
        data = run(pl.DataFrame({"y": [0, 1, 1, 0], "a": cells}), schema_of(field.replace(separator=separator)))
        assert ids(data) == ids(expected)
        assert vocabulary(data, "a") == vocabulary(expected, "a")


@pytest.mark.parametrize("cells, separator", [([["x", "y", "z"], ["z"]], None), (["x|y|z", "z"], "|")])
def test_keep_last_reads_the_end_of_a_list(run, cells, separator):
    field = FieldSpec(name="a", type="multi", max_len=2, separator=separator)
    frame = pl.DataFrame({"y": [0, 1], "a": cells})
    first, last = (run(frame, schema_of(field.replace(keep=keep))) for keep in ("first", "last"))
    assert [value for value, _, _ in vocabulary(first, "a")] == ["x", "y", "z"]
    assert vocabulary(last, "a") == [("z", 1, 2), ("y", 2, 1)]
    assert ids(last) == [[2, 1], [1, PAD]]


def test_keep_is_for_lists():
    with pytest.raises(ConfigError, match="max_len, separator and keep are for type = 'multi'"):
        FieldSpec(name="a", keep="last")
    assert schema_of(FieldSpec(name="a")).fingerprint == schema_of(FieldSpec(name="a", keep="first")).fingerprint
    multi = FieldSpec(name="a", type="multi", max_len=2)
    assert schema_of(multi).fingerprint != schema_of(multi.replace(keep="last")).fingerprint
