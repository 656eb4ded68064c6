"""The graph from raw values, the stand-alone encoder and the golden rows agree with embtrim, and need neither it nor torch."""

from __future__ import annotations

import datetime as dt
import http.client
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embtrim
from embtrim.compaction.compacting import compact
from embtrim.data.encoder import Encoder
from embtrim.data.transforms import bucket_numbers
from embtrim.errors import DataError
from embtrim.models import DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import FieldSpec, Kind, Schema
from embtrim.serving import raw_inputs
from embtrim.serving.bundle import Bundle, load_bundle, save
from embtrim.serving.exporting import export
from tests.serving.export_models import model_of, schema_of
from tests.serving.triton_config import check_repository

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5
NUM_ROWS = 600
# Makes torch and embtrim impossible to import, and onnxruntime all that a program finds beside numpy and polars.
ALONE = "import sys, runpy; sys.modules.update(torch=None, embtrim=None, onnx=None); runpy.run_path({!r}, run_name='__main__')"

FIELDS = (
    FieldSpec(name="user", min_count=3),
    FieldSpec(name="item"),
    FieldSpec(name="rating", nulls=("2.5",)),
    FieldSpec(name="single"),
    FieldSpec(name="member"),
    FieldSpec(name="day"),
    FieldSpec(name="moment"),
    FieldSpec(name="price", type="numeric", transform="quantile:10"),
    FieldSpec(name="price again", column="price", type="dense", transform="standard"),
    FieldSpec(name="count", type="numeric", transform="log2", nulls=("-999",)),
    FieldSpec(name="count as text", column="count", nulls=("-999",)),
    FieldSpec(name="amount", type="dense", transform="log1p"),
    FieldSpec(name="plain", column="amount", type="dense", transform="none"),
    FieldSpec(name="hashed", hash_size=50),
    FieldSpec(name="hashed item", column="item", hash_size=40, nulls=("1000003",)),
    FieldSpec(name="hashed count", column="count", type="numeric", transform="log2", hash_size=30, nulls=("-999",)),
    FieldSpec(name="tags", type="multi", max_len=3),
    FieldSpec(name="history", type="multi", max_len=4, keep="last", pooling="sum"),
    FieldSpec(name="genres", type="multi", separator="|", max_len=3, nulls=("C",)),
    FieldSpec(name="hashed tags", column="tags", type="multi", max_len=3, hash_size=11),
)


def raw_rows(seed: int, num_rows: int = NUM_ROWS) -> pl.DataFrame:
    rng = np.random.default_rng(seed)

    def some(values, share: float = 0.1) -> pl.Series:
        return pl.Series(values).set(pl.Series(rng.random(num_rows) < share), None)

    def lists(values, most: int) -> list[list]:
        return [rng.choice(values, rng.integers(0, most)).tolist() for _ in range(num_rows)]

    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, num_rows),
            "user": some([f"u{i} é" for i in rng.zipf(1.3, num_rows) % 500]),
            "item": some(rng.integers(0, 300, num_rows) * 1_000_003),
            "rating": some(rng.integers(0, 20, num_rows) / 4),
            "single": some((rng.integers(0, 20, num_rows) / 7).astype(np.float32)),
            "member": some(rng.random(num_rows) < 0.4),
            "day": some([dt.date(2024, 1, 1) + dt.timedelta(days=int(i)) for i in rng.integers(0, 30, num_rows)]),
            "moment": [dt.datetime(2024, 1, 1, int(i), tzinfo=dt.timezone.utc) for i in rng.integers(0, 24, num_rows)],
            "price": some(rng.gamma(2, 10, num_rows).round(2)),
            "count": pl.Series(rng.integers(-2, 500, num_rows)).set(pl.Series(rng.random(num_rows) < 0.05), -999),
            "amount": some(rng.normal(size=num_rows) * 100),
            "hashed": some([f"h{i}" for i in rng.integers(0, 500, num_rows)]),
            "tags": lists([f"t{i}" for i in range(20)], 7),
            "history": lists(range(50), 9),
            "genres": ["|".join(part) for part in lists(["A", "B", "C", "D e"], 5)],
        }
    )


def saved(folder: Path, fields: tuple[FieldSpec, ...], rows: pl.DataFrame) -> Path:
    """The bundle of an untrained compact model that dropped half of the rows of each table."""
    data = embtrim.encode(rows, Schema(label="click", fields=fields), out=folder / "data")
    full = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5, seed=0)
    kept = {t: np.arange(0, n, 2, dtype=np.int32) for t, n in data.schema.tables.items()}
    blocks = {t: (Block(len(ids), (0, 2), "scatter", ids),) for t, ids in kept.items()}
    tables = [TablePlan(t, n, 4, blocks[t]) for t, n in data.schema.tables.items()]
    plan = SizePlan(data.schema.fingerprint, len(data.schema.id_fields), tuple(tables), first_order=True)
    save(compact(full, plan), folder / "bundle", data.recode(plan))
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(saved(tmp_path_factory.mktemp("raw"), FIELDS, raw_rows(0)))


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "out"
    export(bundle, "onnx", folder)
    return folder


def standalone(folder: Path) -> Any:
    """The encoder of an export, as its encode.py makes it."""
    spec = importlib.util.spec_from_file_location("encode", folder / "encode.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Encoder()


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE.format(str(folder / "check.py"))]
    return subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})


def test_the_graph_and_the_encoder_agree_with_predict_on_rows_never_seen(bundle, folder):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    encoder = standalone(folder)
    rows = raw_rows(1)
    narrow = rows.with_columns(pl.col("price", "rating", "amount").cast(pl.Float32))
    for frame in (raw_rows(0), rows, narrow, rows.head(1), rows.select(reversed(rows.columns))):
        expected = bundle.predict(frame)
        (scores,) = session.run(["score"], encoder.graph_inputs(frame))
        assert np.abs(scores - expected).max() < TOLERANCE
        encoded = bundle.encoder.encode_chunk(frame)
        ids, dense = encoder.encode(frame)
        np.testing.assert_array_equal(ids, encoded.ids)
        np.testing.assert_allclose(dense, encoded.dense, rtol=1e-6)
    assert bundle.predict(rows).std() > 0.1


def test_frames_of_all_libraries_are_encoded_alike(folder):
    encoder = standalone(folder)
    rows = raw_rows(1).with_columns(pl.col("price", "rating", "amount").cast(pl.Float32))
    rows = rows.with_columns(
        pl.when(pl.int_range(pl.len()) % 7 == 0).then(None).otherwise(pl.col("rating")).alias("rating")
    )
    expected, _ = encoder.encode(rows)
    arrow = rows.to_arrow()
    nullable = arrow.to_pandas(types_mapper={pa.float32(): pd.Float32Dtype(), pa.int64(): pd.Int64Dtype()}.get)
    columns = {name: arrow.column(name) for name in arrow.column_names}
    frames = (
        arrow,
        arrow.combine_chunks().to_batches()[0],
        nullable,
        arrow.to_pandas(types_mapper=pd.ArrowDtype),
        columns,
    )
    for frame in (*frames, {name: rows[name] for name in rows.columns}):
        np.testing.assert_array_equal(encoder.encode(frame)[0], expected)


@pytest.mark.parametrize("dtype", ["list", "large_list", "dictionary"])
def test_float32_cells_of_pyarrow_keep_their_text(dtype, tmp_path):
    encoder_of(tmp_path, "float", ["0.1", "0.7"])
    alone = standalone(tmp_path)
    one = pa.array([0.1, None, 0.7], pa.float32())
    many = pa.array([[0.1, 0.7], None, [None, 0.1]], pa.list_(pa.float32()))
    one = one.dictionary_encode() if dtype == "dictionary" else one
    many = many.cast(pa.large_list(pa.float32())) if dtype == "large_list" else many
    ids, _ = alone.encode(pa.table({"one": one, "many": many}))
    expected, _ = alone.encode({"one": ["0.1", None, "0.7"], "many": [["0.1", "0.7"], None, ["0.1"]]})
    assert ids.tolist() == expected.tolist()
    assert len({*ids[:, 0].tolist()}) == 3


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            [{"one": "7"}],
            ValueError,
            r"rows are a dict of columns, such as \{'user': \['ann'\]\}, or a table; given a list",
        ),
        ({"one": "ann", "many": ["7"]}, ValueError, "column 'one' is one str; give a list with one value for each row"),
        ({"one": 7, "many": ["7"]}, ValueError, "column 'one' is one int; give"),
        ({"one": np.array(7.0), "many": ["7"]}, ValueError, "column 'one' is one ndarray; give"),
        ({"one": ["7"]}, KeyError, "the rows have no column 'many'; they have one"),
        (pl.DataFrame({"many": ["7"]}), KeyError, "the rows have no column 'one'; they have many"),
        (pa.table({"many": ["7"]}), KeyError, "the rows have no column 'one'; they have many"),
        ({"one": ["7", "8"], "many": ["7"]}, ValueError, "columns of different lengths: one 2, many 1"),
    ],
)
def test_rows_that_are_not_columns_are_refused(rows, error, message, tmp_path):
    encoder_of(tmp_path, "text", ["7"])
    with pytest.raises(error, match=message):
        standalone(tmp_path).encode(rows)


def test_golden_rows_are_replayed_without_torch_and_embtrim(folder):
    golden = json.loads((folder / "golden.json").read_text())
    assert len(golden["rows"]) == len(golden["ids"]) == len(golden["scores"]) == 32
    assert set(golden["rows"][0].values()) == {None}
    assert np.std(golden["scores"]) > 0.1
    done = run_check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("model.onnx", "model_ids.onnx", "encode.py, ids", "encode.py, dense"):
        assert f"{name}: 32 rows, largest difference" in done.stdout


@pytest.mark.parametrize("part", ["scores", "ids"])
def test_the_check_sees_a_difference(part, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    golden = json.loads((folder / "golden.json").read_text())
    if part == "scores":
        golden["scores"][7] += 1e-3
    else:
        golden["ids"][7][0] += 1
    for name in ("golden.json", "check.py"):
        (tmp_path / name).unlink()
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    (tmp_path / "check.py").write_bytes((folder / "check.py").read_bytes())
    assert run_check(tmp_path).returncode == 1


def test_the_readme_runs_and_names_every_input(folder, bundle):
    text = (folder / "README.md").read_text()
    for field in FIELDS:
        assert f"| {field.name} " in text
    assert "MurmurHash3" in text
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["raw_inputs"]) == [field.name for field in FIELDS]
    assert manifest["raw_inputs"]["item"]["dtype"] == "int64"
    assert manifest["raw_inputs"]["rating"]["dtype"] == "float64"
    assert manifest["raw_inputs"]["price again"]["column"] == "price"
    names: dict[str, Any] = {"encoded": standalone(folder).encode(raw_rows(1)), "folder": str(folder)}
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names["ids"], names["dense"] = names["encoded"]
    exec(code.replace('"model_ids.onnx"', 'folder + "/model_ids.onnx"'), names)
    np.testing.assert_allclose((1 + np.tanh(names["logits"] / 2)) / 2, bundle.predict(raw_rows(1)), atol=TOLERANCE)


def test_an_export_looks_at_the_keys_of_a_field_once(bundle, monkeypatch, tmp_path):
    looked_at: list[str] = []
    number_keys = raw_inputs._number_keys

    def counted(field: FieldSpec, *given: Any) -> Any:
        looked_at.append(field.name)
        return number_keys(field, *given)

    monkeypatch.setattr(raw_inputs, "_number_keys", counted)
    monkeypatch.setattr(raw_inputs, "_dtypes", WeakKeyDictionary())
    manifest = export(bundle, "onnx", tmp_path / "out")
    assert manifest["raw_inputs"]["item"]["dtype"] == "int64"
    assert "item" in looked_at
    assert len(looked_at) == len(set(looked_at))


def test_weights_in_a_file_of_their_own_are_shared_by_both_graphs(bundle, folder, tmp_path):
    manifest = export(bundle, "onnx", tmp_path / "out", external_data=True, triton="ads")
    found = [name for name in manifest["files"] if name.endswith(".data")]
    assert found == ["model_ids.onnx.data", "triton/ads/1/model_ids.onnx.data"]
    assert run_check(tmp_path / "out").returncode == 0
    session = check_repository(tmp_path / "out" / "triton", "ads", batches=True)
    assert {value.name for value in session.get_inputs()} == set(manifest["raw_inputs"])
    assert "TYPE_STRING" in (tmp_path / "out" / "triton" / "ads" / "config.pbtxt").read_text()
    feeds = standalone(tmp_path / "out").graph_inputs(raw_rows(3))
    expected = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, feeds)
    np.testing.assert_array_equal(session.run(None, feeds), expected)
    assert "`triton/` is a model repository" in (tmp_path / "out" / "README.md").read_text()


def test_a_hash_that_onnx_lacks_leaves_the_encoder(bundle, tmp_path, caplog):
    """Data and bundles of earlier releases have no hash_function."""
    rows = raw_rows(0)
    data = embtrim.encode(
        rows, Schema(label="click", fields=(FieldSpec(name="hashed", hash_size=50),)), out=tmp_path / "d"
    )
    old = data.schema.replace(fields=(data.schema.fields[0].replace(hash_function=None),))
    model = DeepFM(old, embedding_dim=4, hidden_units=(8,), init_std=0.5)
    info: dict[str, Any] = {"metrics": {}}
    manifest = export(Bundle(model.eval(), Encoder(old, {}), info), "onnx", tmp_path / "out")
    assert "model.onnx" not in manifest["files"]
    assert "fields hashed were hashed by blake2b" in caplog.text
    assert "no graph from raw values" in (tmp_path / "out" / "README.md").read_text()
    ids, _ = standalone(tmp_path / "out").encode(rows)
    np.testing.assert_array_equal(ids, Encoder(old, {}).encode_chunk(rows).ids)
    assert run_check(tmp_path / "out").returncode == 0


@pytest.mark.parametrize("format", ["pt2", "torchrec"])
def test_other_formats_hold_the_encoder_and_golden_rows(format, bundle, tmp_path):
    export(bundle, format, tmp_path / "out")
    done = run_check(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encode.py, ids: 32 rows, largest difference 0" in done.stdout


def test_a_model_alone_has_golden_ids(tmp_path):
    export(model_of("deepfm", schema_of()), "onnx", tmp_path / "out")
    assert not (tmp_path / "out" / "encode.py").exists()
    assert not (tmp_path / "out" / "model.onnx").exists()
    done = run_check(tmp_path / "out")
    assert (done.returncode, "model_ids.onnx: 32 rows" in done.stdout) == (0, True), done.stdout + done.stderr


# ---- the stand-alone encoder, on texts of every kind -----------------------------------------------------------------

ODD = [
    "",
    " ",
    "7",
    " 7",
    "07",
    "+7",
    "7.0",
    "7.50",
    "7.5",
    "-0",
    "-0.0",
    ".5",
    "1e3",
    "1E+3",
    "0.00001234",
    "1e-7",
    "1e21",
]
ODD += [
    "9007199254740993",
    "9007199254740993.0",
    "1e400",
    "nan",
    "NaN",
    "inf",
    "-999",
    "-999.0",
    " -999",
    "0999",
    "x",
    "é",
]
ODD += [
    "True",
    "TRUE",
    "true",
    "t",
    "yes",
    "1",
    "0",
    "1.0",
    "false",
    "F",
    "no",
    "0.0",
    "2024-03-01",
    "2024-3-1",
    "0999-03-01",
]
ODD += ["2024-03-01 08:00:00", "2024-03-01T08:00:00.250", "2024-03-01 08:00 PM", "2024-03-01T08:00:00Z", "2024-02-30"]
ODD += [
    "2024-03-01T08:00:00+02:00",
    "2024-03-01 00:00:00",
    "2024-03-01T08:00:00.5Z",
    "2024-03-01 24:00:00",
    "1_000",
    "0x1",
]
ODD += ["['a', 'b']", "a|b", "[1, 2]", "( x )", "None", "a||b", '["a|b", c]', "[]", "[None]", "a b|c"]
KINDS: tuple[Kind | None, ...] = (
    None,
    "text",
    "integer",
    "decimal",
    "float",
    "float32",
    "boolean",
    "date",
    "timestamp",
    "instant",
)


def encoder_of(folder: Path, kind: Kind | None, listed: list[str]) -> Encoder:
    fields = (
        FieldSpec(name="one", kind=kind, nulls=("-999",), vocab_size=100),
        FieldSpec(name="hash", column="one", kind=kind, nulls=("-999",), hash_size=97, hash_function="murmur3", vocab_size=98),
        FieldSpec(name="many", kind=kind, type="multi", separator="|", max_len=2, vocab_size=100),
        FieldSpec(name="last", column="many", kind=kind, type="multi", separator="|", max_len=2, keep="last", hash_size=9, vocab_size=10),
    )  # fmt: skip
    texts = [None, *dict.fromkeys(listed)]
    frame = pl.DataFrame({"value": texts, "id": range(1, len(texts) + 1), "count": [1] * len(texts)})
    frame = frame.cast({"value": pl.String, "id": pl.Int32})
    encoder = Encoder(Schema(label="y", fields=fields), {"one": frame, "many": frame})
    encoder.save(folder / "encoder")
    (folder / "manifest.json").write_text("{}")
    source = Path(embtrim.__file__).parent / "serving" / "standalone" / "encode.py"
    (folder / "encode.py").write_bytes(source.read_bytes())
    return encoder


@pytest.mark.parametrize("kind", KINDS)
@given(
    listed=st.lists(st.sampled_from(ODD[2:]), max_size=8),
    cells=st.lists(
        st.one_of(st.none(), st.sampled_from(ODD), st.text("0179.-+eE |'[]", max_size=5)), min_size=1, max_size=6
    ),
)
@settings(max_examples=30, deadline=None)
def test_texts_are_encoded_as_embtrim_does(kind, listed, cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    encoder = encoder_of(folder, kind, listed)
    alone = standalone(folder)
    for cell in cells:
        rows = {"one": [cell], "many": [cell]}
        try:
            expected = encoder.encode_chunk(pl.DataFrame(rows, schema={"one": pl.String, "many": pl.String})).ids
        except DataError:
            with pytest.raises(ValueError):
                alone.encode(rows)
            continue
        np.testing.assert_array_equal(alone.encode(rows)[0], expected, err_msg=repr(cell))


CELLS: dict[str, tuple[Any, list[Any]]] = {
    "integers": (pl.Int64, [0, 7, -999, 2**53 + 1, None]),
    "floats": (
        pl.Float64,
        [0.0, -0.0, 7.0, 7.5, 0.1, 1e-5, 1.25e-5, -1e-5, 1e-7, 1e16, 1.5e21, 1e300, float("nan"), None],
    ),
    "singles": (pl.Float32, [0.1, 7.0, 1e-5, 3.4e38, 16777216.0, 1.1754943508222875e-38, None]),
    "booleans": (pl.Boolean, [True, False, None]),
    "days": (pl.Date, [dt.date(2024, 3, 1), dt.date(999, 1, 1), None]),
    "moments": (pl.Datetime("us"), [dt.datetime(2024, 3, 1), dt.datetime(2024, 3, 1, 8, 0, 0, 250_000), None]),
    "instants": (pl.Datetime("us", "Europe/Paris"), [dt.datetime(2024, 3, 1, 8, tzinfo=dt.timezone.utc), None]),
    "times": (pl.Time, [dt.time(8), dt.time(8, 0, 0, 500_000), None]),
}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("cells", CELLS)
def test_typed_cells_are_encoded_as_embtrim_does(kind, cells, tmp_path):
    encoder = encoder_of(
        tmp_path, kind, ["0", "7", "7.5", "0.1", "0.00001", "true", "false", "2024-03-01", "08:00:00.5"]
    )
    dtype, values = CELLS[cells]
    alone = standalone(tmp_path)
    for value in values:
        frame = pl.DataFrame(
            {"one": pl.Series([value], dtype=dtype), "many": pl.Series([[value]], dtype=pl.List(dtype))}
        )
        try:
            expected = encoder.encode_chunk(frame).ids
        except DataError:
            with pytest.raises(ValueError):
                alone.encode(frame)
            continue
        np.testing.assert_array_equal(alone.encode(frame)[0], expected, err_msg=repr(value))


def test_numbers_near_the_borders_of_log2_are_in_one_bucket_as_floats_of_either_kind(bundle, folder):
    border_N = np.exp(np.sqrt(np.arange(1, 40)))
    numbers = np.concatenate([border_N * (1 + shift) for shift in (-1e-8, -1e-9, 0, 1e-9, 1e-8)] + [[1.99999999]])
    rows = raw_rows(0, len(numbers)).with_columns(count=pl.Series(numbers))
    single = rows.with_columns(pl.col("count").cast(pl.Float32))
    names = [field.name for field in bundle.encoder.schema.id_fields if field.type != "multi"]
    column, field = names.index("count"), next(f for f in bundle.encoder.schema.fields if f.name == "count")
    unlike = bucket_numbers(numbers, field, {}) != bucket_numbers(numbers.astype(np.float32).astype(float), field, {})
    assert unlike.sum() > 20  # data of earlier versions keep these
    expected = bundle.encoder.encode_chunk(single).ids[:, column]
    np.testing.assert_array_equal(bundle.encoder.encode_chunk(rows).ids[:, column], expected)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for frame in (rows, single):
        np.testing.assert_array_equal(standalone(folder).encode(frame)[0][:, column], expected)
        (scores,) = session.run(["score"], standalone(folder).graph_inputs(frame))
        np.testing.assert_allclose(scores, bundle.predict(frame), atol=TOLERANCE)


PLAIN_CELLS = {
    "user": ["u1 é", None, "", "-999", "never seen"],
    "item": [1000003, 0, None, -(2**63), 2**63 - 1, 10**18, -(10**18), 10**18 - 1, -5],
    "count": [-999, None, 3, 499, 7_000_000],
    "price": [1.5, None, float("nan"), 3, -2.25],
    "amount": [10**17, -0.0, None],
}


@pytest.mark.parametrize("column", PLAIN_CELLS)
@pytest.mark.parametrize("form", [list, np.array, lambda cells: pd.Series(cells, dtype=object)])
def test_columns_of_plain_cells_become_inputs_as_single_cells_do(folder, monkeypatch, column, form):
    alone, cells = standalone(folder), PLAIN_CELLS[column]
    if form is np.array:
        cells = [cell for cell in cells if cell is not None]
    rows = {name: [None] * len(cells) for name in alone.columns} | {column: form(cells)}
    quick = alone.graph_inputs(rows)
    monkeypatch.setattr(alone, "_quick_input", lambda field, cells: None)
    for name, values in alone.graph_inputs(rows).items():
        assert quick[name].dtype == values.dtype, name
        np.testing.assert_array_equal(quick[name], values, err_msg=name)


def test_inputs_of_model_onnx_are_made_without_the_vocabulary(folder, tmp_path):
    for name in ("encode.py", "manifest.json", "encoder"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, tmp_path / name)
    expected = standalone(folder)
    (tmp_path / "encoder" / "vocab.parquet").unlink()
    rows = json.loads((folder / "golden.json").read_text())["rows"]
    columns = {name: [row[name] for row in rows] for name in expected.columns}
    for name, values in standalone(tmp_path).graph_inputs(columns).items():
        np.testing.assert_array_equal(values, expected.graph_inputs(columns)[name], err_msg=name)


def test_the_example_server_answers_as_predict_and_refuses_in_words(bundle, folder):
    path = Path(__file__).parents[2] / "examples" / "serve_http.py"
    example = runpy.run_path(str(path))
    server = example["make_server"](*example["open_export"](folder), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)

    def post(body: str, path: str = "/score") -> tuple[int, dict[str, Any]]:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    golden = json.loads((folder / "golden.json").read_text())
    columns = {name: [row[name] for row in golden["rows"]] for name in golden["rows"][0]}
    status, answer = post(json.dumps(columns))
    assert status == 200
    np.testing.assert_allclose(answer["score"], golden["scores"], atol=TOLERANCE)
    status, answer = post(json.dumps({**columns, "user": ["ann"]}))
    assert (status, "columns of equal length" in answer["error"]) == (400, True)
    status, answer = post(json.dumps({"user": ["ann"]}))
    assert (status, answer["columns"]) == (400, list(bundle.encoder.columns))
    assert post("{}", "/other")[0] == 404
    connection.close()
    server.shutdown()
    server.server_close()
