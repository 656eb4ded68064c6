"""Text in the dialects of other programs, bad lines, and the time that a fault takes to find."""

import contextlib
import gzip
import json
import logging

import polars as pl
import pytest

from embtrim.data.dataset import EncodedDataset
from embtrim.data.profile import Profile
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.data.text_rows import Grammar
from embtrim.errors import ConfigError, DataError
from tests.cli.workshop import call
from tests.data.old_dump import write_old_dump
from tests.data.small_logs import ONE, ids, vocabulary

ROWS = [
    ["y", "user", "title"],
    ["0", "u1", "plain"],
    ["1", "u2", "ca-fé"],
    ["1", "u1", 'say "hi", ok;'],
    ["0", "u3", ""],
]


LONG = b"0," + b"u" * 97 + b"\n"


def read(path, **options):
    """All rows of a log, in small chunks as in one."""
    log = open_log(path, ReadOptions(**options))
    frames = [pl.concat([chunk.frame for chunk in log.chunks(chunk_bytes=size)]) for size in (7, 1 << 20)]
    assert frames[0].equals(frames[1])
    return [list(log.columns), *map(list, frames[1].fill_null("").rows())], log


def text(separator=",", quote='"', escape='""', all_quoted=True, rows=ROWS, end="\n"):
    """Rows as another program writes them."""
    return "".join(
        separator.join(quote + c.replace('"', escape) + quote if all_quoted or '"' in c else c for c in row) + end
        for row in rows
    )


DIALECTS = {
    "semicolons, all quoted": (text(";").encode(), "separator ';', quote \", encoding utf-8"),
    "commas, quoted where needed": (text(all_quoted=False).encode(), "separator ',', quote \", encoding utf-8"),
    "pipes": (text("|").encode(), "separator '|'"),
    "tabs of R": (text("\t").encode(), "separator '\\t', quote \""),
    "hive": (text("\x01", all_quoted=False, escape='"').replace('"', "").encode(), "separator '\\x01'"),
    "two colons": (text("::").encode(), "separator '::', quote \""),
    "quotes are apostrophes": (text(quote="'", escape='"').encode(), "separator ',', quote '"),
    "backslashes of Spark and MySQL": (text(escape='\\"').encode(), 'quote " escaped by backslash'),
    "cp1252": (text(";").encode("cp1252"), "encoding cp1252"),
    "utf-16 with a mark": (text().encode("utf-16"), "encoding utf-16 with a byte order mark"),
    "utf-16 without a mark": (text().encode("utf-16-le"), "encoding utf-16-le"),
    "utf-16, big end first": (text().encode("utf-16-be"), "encoding utf-16-be"),
    "utf-8 with a mark": ("\ufeff".encode() + text().encode(), "utf-8 with a byte order mark"),
    "lines end in CR": (text(end="\r").encode(), "lines end in CR"),
    "utf-16, lines end in CR": (text(end="\r").encode("utf-16"), "lines end in CR"),
    "lines end in CR LF": (text(end="\r\n").encode(), "separator ','"),
    "gz of cp1252": (gzip.compress(text(";").encode("cp1252"), mtime=0), "encoding cp1252"),
    "Excel's note": (b"sep=;\r\n" + text(";", end="\r\n").encode(), "separator ';'"),
    "a space before quotes": (text(", ").encode(), "separator ','"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIALECTS)
def test_dialects_are_found_and_said(write, caplog, case):
    content, words = DIALECTS[case]
    with caplog.at_level(logging.INFO):
        found, log = read(write("log.csv", content))
    if case == "hive":
        found[3][2] = ROWS[3][2]
    assert found == ROWS
    assert words in log.files[0].describe()
    assert f"log.csv: {log.files[0].describe()}" in caplog.text
    assert words in str(log.describe()[0]["dialect"])


@pytest.mark.parametrize(
    "content, options, expected",
    [
        ("y;a\n0;u,v\n1;w,x\n", {"separator": ","}, [["y;a"], None]),
        ('y,a\n0,"u"\n1,v\n', {"quoted": False}, [["y", "a"], ["0", '"u"'], ["1", "v"]]),
        ("y,a\n0,'u,v'\n1,v\n", {"quote": "'"}, [["y", "a"], ["0", "u,v"], ["1", "v"]]),
        ('y,a\n0,"u\\",v"\n1,v\n', {"escape": "backslash"}, [["y", "a"], ["0", 'u",v'], ["1", "v"]]),
        ('y,a\n0,"c:\\"\n1,"\\\\"\n', {}, [["y", "a"], ["0", "c:\\"], ["1", "\\\\"]]),
        ('y,a\n0,"c:\\\\"\n1,"x\\"y"\n', {}, [["y", "a"], ["0", "c:\\"], ["1", 'x"y']]),
        ("y,a\n0,й\n".encode("cp1251"), {"encoding": "cp1251"}, [["y", "a"], ["0", "й"]]),
        ("y,a\n0,中|\n".encode("gb18030"), {"encoding": "gb18030"}, [["y", "a"], ["0", "中|"]]),
        (b"y,a\n0,\x81\x93\n", {}, [["y", "a"], ["0", "\x81“"]]),
        (b"y,a\n0,\x93\n", {"encoding": "latin-1"}, [["y", "a"], ["0", "\x93"]]),
        ("y,a\r0,u\n1,v\r", {"line_end": "cr"}, [["y", "a"], ["0", "u"], ["1", "v"]]),
        ("y\ta\n0\tu\\\tv\n1\tw\\\nx\n", {"escape": "backslash"}, [["y", "a"], ["0", "u\tv"], ["1", "w\nx"]]),
        ('y,a\n0,5" disk\n1,"x"\n0,3" and 5"\n', {}, [["y", "a"], ["0", '5" disk'], ["1", "x"], ["0", '3" and 5"']]),
        ('"y\n1",a\n0,u\n', {}, [["y\n1", "a"], ["0", "u"]]),
        ("y, a\n0,u\n", {}, [["y", "a"], ["0", "u"]]),
        ("\x1a\n0,u\n1,v\n\x1a", {"header": False, "columns": ("y", "a")}, [["y", "a"], ["0", "u"], ["1", "v"]]),
    ],
)
def test_options_overrule_what_is_found(write, content, options, expected):
    path = write("log.csv", content)
    if expected[1] is None:
        assert open_log(path, ReadOptions(**options)).columns == ("y;a",)
    else:
        assert read(path, **options)[0] == expected


@pytest.mark.parametrize(
    "content, columns, words",
    [
        (",user,item\n0,5,7\n1,5,7\n2,6,8\n", ["user", "item"], "index column 'column_1' left out"),
        ("Unnamed: 0,user\n7,5\n9,5\n", ["user"], "index column 'Unnamed: 0' left out"),
        ('"user","item"\n"1","5","7"\n"2","5","7"\n', ["user", "item"], "left out"),  # R's row names have no header
        (",user\n5,7\n5,8\n", ["column_1", "user"], ""),  # no index: a number comes twice
        ("user,item,\n5,7,\n5,7,\n", ["user", "item", "column_3"], ""),  # every line ends in a separator
        ("user,item\n5,7,\n5,7,\n", ["user", "item", "column_3"], ""),
    ],
)
def test_an_index_column_is_left_out(write, content, columns, words):
    found, log = read(write("log.csv", content))
    assert found[0] == columns
    assert (words or "quote") in log.files[0].describe()
    assert ("left out" in log.files[0].describe()) == bool(words)
    if "user" in columns:
        place = columns.index("user")
        assert found[1][place] in ("5", "7")


def test_the_index_column_may_be_asked_for(write):
    path = write("log.csv", ",user\n0,5\n1,5\n")
    assert read(path, index=False)[0] == [["column_1", "user"], ["0", "5"], ["1", "5"]]
    assert read(write("b.csv", "n,user\n5,1\n5,1\n"), index=True)[0] == [["user"], ["1"], ["1"]]


def test_text_that_is_ascii_at_first_may_prove_to_be_cp1252(write, caplog):
    path = write("log.csv", b"y,a\n" + LONG * 11_000 + b"1,\xe9\n" + LONG * 11_000)
    frame = pl.concat([chunk.frame for chunk in open_log(path).chunks(chunk_bytes=1 << 16)])
    assert frame["a"].unique(maintain_order=True).to_list() == ["u" * 97, "é"]
    assert "is not UTF-8 from line 11,002 on, and is read as cp1252" in caplog.text
    path.write_bytes(path.read_bytes() + b"1,\xc3\xa9\n")
    with pytest.raises(DataError, match=r"line 11,002 is not UTF-8; say the encoding, such as .*cp1252"):
        list(open_log(path).chunks())  # one block has both encodings


# --- bad lines --------------------------------------------------------------------------------------------------------


def dump(num_rows=400):
    """Rows in the style of an old public dump, and the numbers of its lines."""
    return ['"User-ID";"ISBN";"Rating"'] + [f'"{i % 37}";"{i:010}";"{i % 11}"' for i in range(num_rows)]


BAD = {
    "too few cells": ('"5";"0001"', "has 2 cells, the log has 3 columns"),
    "too many cells": ('"5";"0001";"3";"4"', "has 4 cells, the log has 3 columns"),
    "a quote that stays open": ('"5";"0001;"3"', "has text after the quote that closes a cell"),
    "a quote within a cell": ('"5";"a "b" c";"3"', "has text after the quote that closes a cell"),
    "a cut line": ('"5";"00', "has text after the quote that closes a cell"),
    "no cells": ("<br>", "has 1 cells, the log has 3 columns"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 24])
def test_bad_lines_are_named_or_skipped(write, caplog, case, chunk_bytes):
    bad, reason = BAD[case]
    lines = dump()
    lines.insert(200, bad)
    path = write("log.csv", "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"log.csv line 201 {reason}; .*on_error='skip'"):
        list(open_log(path).chunks(chunk_bytes=chunk_bytes))
    log = open_log(path, ReadOptions(on_error="skip"))
    chunks = list(log.chunks(chunk_bytes=chunk_bytes))
    frame = pl.concat([chunk.frame for chunk in chunks])
    assert frame["ISBN"].to_list() == [f"{i:010}" for i in range(400)]
    assert log.skipped.num_lines == 1
    assert log.skipped.first == (f"{path} line 201 {reason}: {bad}",)
    assert "skipped 1 lines (0.25%) that cannot be read" in caplog.text
    where = {chunk.first_row + i: chunk.locate(i) for chunk in chunks for i in (0, chunk.frame.height - 1)}
    assert all(place == f"{path} line {row + 2 + (row >= 199):,}" for row, place in where.items())


def test_two_bad_lines_that_make_up_for_each_other_are_found(write):
    path = write("log.csv", "y,a,b\n0,u,v\n1,w\n0,x,y,z\n")  # as many separators as three good lines have
    for columns in (["a"], ["y"], None):
        with pytest.raises(DataError, match="line 3 has 2 cells"):
            list(open_log(path).chunks(columns))


def test_more_than_one_percent_of_bad_lines_fail_anyway(write):
    lines = dump()
    lines[100:100] = ["<br>"] * 5
    path = write("log.csv", "\n".join(lines))
    with pytest.raises(
        DataError, match=r"(?s)5 lines cannot be read, more than 0.01 of all lines.*line 101 has 1 cells"
    ):
        list(open_log(path, ReadOptions(on_error="skip")).chunks())
    log = open_log(path, ReadOptions(on_error="skip", max_skipped=0.02))
    assert sum(chunk.frame.height for chunk in log.chunks()) == 400
    assert log.skipped.num_lines == 5


def test_skipped_lines_are_counted_in_the_encoded_folder_also_after_an_interrupt(run, write, monkeypatch):
    from tests.conftest import interrupt_encoding

    lines = ["y,a"] + [f"{i % 2},v{i % 9}" for i in range(300)]
    for place in (50, 150, 299):
        lines.insert(place, "broken")
    path = write("log.csv", "\n".join(lines))
    settings = {"options": ReadOptions(on_error="skip", max_skipped=0.1), "chunk_bytes": 512}
    whole = run(path, ONE, **settings)
    with monkeypatch.context() as patch:
        interrupt_encoding(patch)
        with pytest.raises(KeyboardInterrupt):
            run(path, ONE, out=path.parent / "again", **settings)
    again = run(path, ONE, out=path.parent / "again", **settings)
    for data in (whole, again):
        profile = Profile.load(data.folder)
        skipped = json.loads((data.folder / "meta.json").read_text())["skipped"]["train"]
        assert skipped["num_lines"] == 3
        assert {name: lines.model_dump(mode="json") for name, lines in profile.skipped.items()} == {"train": skipped}
        assert [line.partition(" line ")[2] for line in skipped["first"]] == [
            f"{n} has 1 cells, the log has 2 columns: broken" for n in (51, 151, 300)
        ]
    assert ids(again) == ids(whole)


def test_a_dump_of_old_style_is_encoded_and_says_what_it_skipped(tmp_path):
    write_old_dump(tmp_path / "ratings.csv", 3000, num_broken=12)
    done = call("encode", tmp_path / "ratings.csv", "--label", "rating >= 8", "--where", "rating > 0", "--on-error", "skip",
                "--out", tmp_path / "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "separator ';', quote \" escaped by backslash, encoding cp1252" in done.err
    told = json.loads(done.out)
    assert told["skipped"]["train"]["num_lines"] == 12
    assert len(told["skipped"]["train"]["first"]) == 10
    assert [line for line in told["skipped"]["train"]["first"] if line.endswith('"21";"0449212602";"8";"say \\";"x"')]
    assert sum(told["num_rows"].values()) == sum(
        line.split('";"')[2] not in ("0", "rating")
        for line in (tmp_path / "ratings.csv").read_text("latin-1").split("\n")
        if line.count('"') > 5
        and not line.startswith(('"17"' + ';"0195', '"18";"00603', '"19";"0374157', '"20";"a', '"21";"0449'))
    )
    titles = {str(row[0]).rstrip(" 0123456789") for row in vocabulary(EncodedDataset.load(tmp_path / "out"), "Title")}
    assert {"Éclair Müller", 'The "Old" Man; and the Sea', "À la carte, volume", "C:\\temp"} <= titles


def test_bad_lines_of_sparse_text_are_skipped(write):
    path = write("log.svm", "1 1:1 x\n" + "0 1:1 2:1\n" * 99 + "1 2:y\n")
    log = open_log(path, ReadOptions(on_error="skip", max_skipped=0.05))
    assert sum(chunk.frame.height for chunk in log.chunks()) == 99
    assert [line.partition("svm ")[2] for line in log.skipped.first] == [
        "line 1 is not index:value: 1 1:1 x", "line 101 is not index:value: 1 2:y"
    ]  # fmt: skip


def test_an_escape_that_the_head_does_not_show_is_named(write):
    path = write("log.csv", b'y,"a"\n' + LONG * 11_000 + b'1,"say \\"hi\\", ok"\n')
    with pytest.raises(DataError, match=r"line 11,002 .* escaped by backslashes: ReadOptions\(escape='backslash'\)"):
        list(open_log(path).chunks())
    log = open_log(path, ReadOptions(escape="backslash"))
    assert list(log.chunks())[-1].frame["a"][-1] == 'say "hi", ok'


def test_faults_take_time_linear_in_the_text(write, monkeypatch):
    seen = []
    is_regular = Grammar.is_regular
    monkeypatch.setattr(Grammar, "is_regular", lambda g, text, n: seen.append(len(text)) or is_regular(g, text, n))
    line = b'"12345";"na\xefve ""au"" lait";"7"\n'
    for content, options in [
        (line * 20_000, {"separator": ",", "header": False, "columns": ("one",)}),
        (b'y,a\n0,"u\n' + b"1,v\n" * 100_000, {}),
        (b"y,a\n" + b'0,"u\n' * 100_000, {"quoted": True}),
        (b"y,a\n" + b'"\n' * 100_000, {"quoted": True}),
        (b"y;a\n" + b"0;u\n" * 100_000 + b"1\n", {"on_error": "skip"}),
        (b"y,a\n" + b'0,"one\ntwo, ""2""\n\n"\n' * 30_000, {}),
    ]:
        seen.clear()
        log = open_log(write("log.csv", content), ReadOptions(**options))
        with contextlib.suppress(DataError):
            list(log.chunks(chunk_bytes=1 << 18))
        assert sum(seen) <= 12 * len(content)


def test_quoted_cells_of_several_lines_are_one_cell_wherever_a_chunk_ends(write):
    cell = 'one\ntwo, "2"\n\n'
    rows, _ = read(write("log.csv", text(all_quoted=True, rows=[["y", "a"], *[["1", cell]] * 40])))
    assert rows == [["y", "a"], *[["1", cell]] * 40]


def test_options_say_what_is_allowed():
    for options, message in [
        ({"encoding": "utf-99"}, "encoding 'utf-99' is not known"),
        ({"escape": "slash"}, "escape.*'double' or 'backslash'"),
        ({"on_error": "ignore"}, "on_error.*'fail' or 'skip'"),
        ({"quote": "''"}, "quote"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ReadOptions(**options)
