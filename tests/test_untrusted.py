"""Limits on what a stranger's file may hold, and texts without what a terminal would obey."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from embtrim import untrusted
from embtrim.cli.errors import fail
from embtrim.cli.terminal import _Printable, print_text
from embtrim.data.parquet_sizes import unpacked_bytes
from embtrim.errors import shown
from embtrim.untrusted import open_regular, parse_json, parse_toml, printable, read_bytes, read_toml_tables


@pytest.mark.parametrize(("text", "words"), [
    ("[" * 100_000, "nested too deeply"),
    ("9" * 5_000, "integer of 5,000 digits"),
    (str(2**63), "integer of 19 digits"),
    ("1e999", "1e999, which is not a finite number"),
    ("NaN", "NaN, which is not a finite number"),
    ("[" + "0," * untrusted.MAX_JSON_VALUES + "0]", "more than 2,000,000 values"),
    ("{", "Expecting property name"),
])  # fmt: skip
def test_json_beyond_a_limit_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    assert parse_json('[1, -9223372036854775808, 2.5, "x", null]') == [1, -(2**63), 2.5, "x", None]
    assert str(parse_json(f"[NaN, {10**30}]", any_number=True)) == f"[nan, {10**30}]"


@pytest.mark.parametrize(("text", "words"), [
    ("x = " + "[" * 20_000, "nested too deeply"),
    ("x = " + "9" * 5_000, "more than 64 bits"),
    (f"x = [[{{a = {2**63}}}]]", "integer 9223372036854775808"),
    ("x = ", "Invalid value"),
])  # fmt: skip
def test_toml_beyond_a_limit_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_toml(text)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(ValueError, match="more than 1 MB"):
        read_bytes("/dev/zero", 1 << 20, may_be_pipe=True)
    (tmp_path / "a.toml").write_text("a = 1")
    assert read_toml_tables(tmp_path / "a.toml") == {"a": 1}


def test_what_a_parquet_file_unpacks_to(tmp_path: Path):
    import polars as pl

    frame = pl.DataFrame({"a": ["x" * 1000] * 50_000, "b": range(50_000)})
    for compression in ("zstd", "snappy", "uncompressed"):
        frame.write_parquet(tmp_path / "a.parquet", compression=compression, row_group_size=7_000)
        found = unpacked_bytes(tmp_path / "a.parquet")
        assert 1_600_000 < found < 3_000_000, "texts that are alike are held once, a view each"
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-9] + content[-8:])
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        unpacked_bytes(tmp_path / "a.parquet")


def test_any_changed_byte_of_a_parquet_file_is_read_or_refused(tmp_path: Path):
    import polars as pl

    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": ["x", "y"], "b": [1, 2]}).write_parquet(path, compression="uncompressed")
    content = path.read_bytes()
    for place in range(len(content)):
        for byte in (0x00, 0x25, 0xFF):
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            with contextlib.suppress(ValueError):
                unpacked_bytes(path)


def test_a_terminal_sees_escapes(capsys: pytest.CaptureFixture[str]):
    evil = "a\x1b[31m\x07\r\x9b\u202e\ud800b\tc\n"
    assert printable(evil) == "a\\x1b[31m\\x07\\r\\x9b\\u202e\\ud800b\tc\n"
    print_text(evil)
    fail(evil, 1)
    table = Table("name\x1b")
    table.add_row(evil)
    screen = io.StringIO()
    Console(file=screen, width=100).print(_Printable(table))
    told = capsys.readouterr()
    for text in (told.out, told.err, screen.getvalue()):
        assert "\\x1b" in text
        assert not set(text) & set("\x1b\x07\r\x9b\u202e")


def test_long_values_are_cut_in_messages():
    assert shown("x" * 10_000) == "'" + "x" * 119 + ".."
    assert shown(10**6_000) == "a int"
    assert shown([1, "\x1b"]) == "[1, '\\x1b']"
