"""The ONNX graph from raw values to scores: an encoder in standard operators in front of the graph that takes ids.

Operators: ONNX 18, LabelEncoder of ai.onnx.ml 4, and for hashed fields MurmurHash3, a contrib operator that onnxruntime has
built in.

Shapes: B rows, L values of a multi field, K columns of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from embtrim.data.cells import null_numbers, nulls_of
from embtrim.data.encoder import Encoder
from embtrim.data.hashing import missing_hash
from embtrim.data.transforms import MISSING_BUCKET
from embtrim.data.values import as_float32
from embtrim.errors import ModelError
from embtrim.schema import PAD, FieldSpec
from embtrim.serving.graphs import ONNX_FILE_BYTES
from embtrim.serving.onnx_files import Parts, read_parts, write_parts
from embtrim.serving.raw_inputs import MISSING_INTEGER, Keys, dtype_of, keys_bytes, keys_of, missing_text, raw_inputs

NETWORK = "network/"
SCORE = "score"
_TYPES = {"string": TensorProto.STRING, "int64": TensorProto.INT64, "float64": TensorProto.DOUBLE}
# ln(x)^2 of the largest float64 is below it.
_MOST_BUCKETS = 1 << 20


def write_raw_graph(ids_graph: Path, encoder: Encoder, out: Path) -> None:
    """Write the graph from raw values to probabilities.

    Args:
        ids_graph: Graph that takes `ids` and `dense` and gives `logits`. Weights in a file of their own are shared, not copied.
        encoder: Encoder of the ids.
        out: File to write, in the folder of `ids_graph`.

    Raises:
        ModelError: A field is hashed by a function that ONNX lacks, or the vocabulary is too large for a file.
    """
    hashed = [f.name for f in encoder.schema.id_fields if f.hash_size and f.hash_function != "murmur3"]
    if hashed:
        raise ModelError(
            f"no graph from raw values: fields {', '.join(hashed)} were hashed by blake2b, which ONNX does not have; encode the "
            "log again and train on that, or turn raw values into ids by encode.py"
        )
    if (size := keys_bytes(encoder)) > ONNX_FILE_BYTES:
        raise ModelError(
            f"no graph from raw values: its vocabulary takes {size:,} bytes, and an ONNX file holds 2 GB with it; drop rows, or "
            "turn raw values into ids by encode.py"
        )
    model, data = read_parts(ids_graph)
    onnx.compose.add_prefix(model, NETWORK, inplace=True)
    graph, network = model.graph, [*model.graph.node]
    del graph.node[:]
    builder = _Builder(graph)
    ids = [_ids_of_field(builder, encoder, field) for field in encoder.schema.id_fields]
    builder.node("Cast", [builder.node("Concat", ids, axis=1)], [f"{NETWORK}ids"], to=TensorProto.INT32)
    dense = [_dense_column(builder, encoder, field) for field in encoder.schema.dense_fields]
    if dense:
        builder.node("Cast", [builder.node("Concat", dense, axis=1)], [f"{NETWORK}dense"], to=TensorProto.FLOAT)
    graph.node.extend([*network, helper.make_node("Sigmoid", [graph.output[0].name], [SCORE])])
    inputs = [
        helper.make_tensor_value_info(name, _TYPES[entry["dtype"]], entry["shape"])
        for name, entry in raw_inputs(encoder).items()
    ]
    score = helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, ["batch"])
    parts: list[tuple[Any, list[Any]]] = [(graph.input, inputs), (graph.output, [score]), (graph.value_info, [])]
    for part, new in parts:
        del part[:]
        part.extend(new)
    graph.initializer.extend(builder.constants)
    graph.name, model.producer_name = "embtrim", "embtrim"
    for name in ("producer_version", "doc_string", "metadata_props"):
        model.ClearField(name)
    domains = {entry.domain: entry.version for entry in model.opset_import} | {"ai.onnx.ml": 4, "com.microsoft": 1}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in domains.items())
    write_parts(Parts(model, {NETWORK + name: values for name, values in data.items()}), out)


class _Builder:
    """Adds nodes to a graph, and collects constants; every result has a name of its own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants: list[TensorProto] = []

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output; the name of the output."""
        names = list(outputs) or [f"encoder/{len(self.graph.node)}"]
        self.graph.node.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """The name of a constant."""
        name = f"encoder/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def column(self, vector: str) -> str:
        """(B, 1) of (B,)."""
        return self.node("Unsqueeze", [vector, self.constant([1])])

    def lookup(self, values: str, keys: Sequence[str] | np.ndarray, ids: np.ndarray, default: int) -> str:
        """int64 ids of values; `default` for values that are not among the keys."""
        if isinstance(keys, np.ndarray):
            tensor = numpy_helper.from_array(keys, "keys")
        else:
            texts: Any = [key.encode() for key in keys]
            tensor = helper.make_tensor("keys", TensorProto.STRING, [len(keys)], texts)
        return self.node(
            "LabelEncoder",
            [values],
            domain="ai.onnx.ml",
            keys_tensor=tensor,
            values_tensor=numpy_helper.from_array(ids.astype(np.int64), "values"),
            default_tensor=numpy_helper.from_array(np.array([default], np.int64), "default"),
        )


def _ids_of_field(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """The ids of a field: int64 (B, length)."""
    if field.type == "multi":
        return _compacted(builder, field, _ids_of_parts(builder, encoder, field))
    if field.type == "numeric":
        return builder.column(_ids_of_numbers(builder, encoder, field))
    if field.hash_size:
        return builder.column(_hashed_category(builder, encoder, field))
    keys = keys_of(encoder, field)
    found = _found(builder, field.name, keys)
    if keys.dtype == "float64":
        missing = builder.node("IsNaN", [field.name])
        found = builder.node("Where", [missing, builder.constant(keys.missing), found])
    return builder.column(found)


def _found(builder: _Builder, values: str, keys: Keys) -> str:
    if not len(keys.values):  # LabelEncoder wants a key; no value equals infinity
        return builder.lookup(values, np.array([np.inf]), np.array([keys.unseen]), keys.unseen)
    return builder.lookup(values, keys.values, keys.ids_V, keys.unseen)


def _hashed_category(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """Ids of a hashed categorical field: int64 (B,)."""
    integers = dtype_of(encoder, field) == "int64"
    texts = builder.node("Cast", [field.name], to=TensorProto.STRING) if integers else field.name
    hashed = _hashed(builder, texts, field)
    if integers:
        nulls = [int(number) for number in null_numbers(encoder.schema, field) if number.is_integer()]
        keys: Sequence[str] | np.ndarray = np.unique(np.array([*nulls, MISSING_INTEGER], np.int64))
    else:
        keys = list(dict.fromkeys([*nulls_of(encoder.schema, field), missing_text(encoder.schema, field)]))
    is_missing = builder.lookup(field.name, keys, np.ones(len(keys)), 0)
    missing = builder.constant(missing_hash(field))
    ids = builder.node("Where", [builder.node("Cast", [is_missing], to=TensorProto.BOOL), missing, hashed])
    return _mapped(builder, encoder, field, ids)


def _ids_of_parts(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """Ids of all values of a multi field, PAD where there is none: int64 (B, L)."""
    if not field.hash_size:
        return _found(builder, field.name, keys_of(encoder, field))
    nulls = list(dict.fromkeys([*nulls_of(encoder.schema, field), ""]))
    is_kept = builder.lookup(field.name, nulls, np.zeros(len(nulls)), 1)
    ids = _mapped(builder, encoder, field, _hashed(builder, field.name, field))
    return builder.node("Where", [builder.node("Cast", [is_kept], to=TensorProto.BOOL), ids, builder.constant(PAD)])


def _ids_of_numbers(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """Ids of a numeric field: int64 (B,)."""
    numbers = _without_nulls(builder, encoder, field)
    if field.transform == "log2":
        if "rounded" in encoder.transforms.get(field.name, {}):
            single = builder.node("Cast", [numbers], to=TensorProto.FLOAT)
            single = builder.node("Cast", [single], to=TensorProto.DOUBLE)
            numbers = builder.node("Where", [builder.node("IsInf", [single]), numbers, single])
        two = builder.constant(2.0, np.float64)
        root = builder.node("Log", [builder.node("Max", [numbers, two])])
        least = builder.constant(MISSING_BUCKET + 1, np.float64)
        low = builder.node("Max", [numbers, least])
        square = builder.node("Mul", [root, root])
        bucket = builder.node("Where", [builder.node("Greater", [numbers, two]), square, low])
        bucket = builder.node("Min", [builder.node("Floor", [bucket]), builder.constant(_MOST_BUCKETS, np.float64)])
    else:
        edges = builder.constant(encoder.transforms[field.name]["edges"], np.float64)
        above = builder.node("GreaterOrEqual", [builder.column(numbers), edges])
        count = builder.node("Cast", [above], to=TensorProto.DOUBLE)
        bucket = builder.node("ReduceSum", [count, builder.constant([1])], keepdims=0)
    is_missing = builder.node("IsNaN", [numbers])
    bucket = builder.node("Where", [is_missing, builder.constant(MISSING_BUCKET, np.float64), bucket])
    bucket = builder.node("Cast", [bucket], to=TensorProto.INT64)
    if field.hash_size:
        hashed = _hashed(builder, builder.node("Cast", [bucket], to=TensorProto.STRING), field)
        ids = builder.node("Where", [is_missing, builder.constant(missing_hash(field)), hashed])
        return _mapped(builder, encoder, field, ids)
    listing = encoder.listing(field)
    keys = np.append(listing.values.to_numpy().astype(np.int64), MISSING_BUCKET)
    return builder.lookup(bucket, keys, np.append(listing.ids_V, listing.missing), listing.unseen)


def _dense_column(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """The values of a dense field: float64 (B, 1)."""
    numbers = _without_nulls(builder, encoder, field)
    if field.transform == "log1p":
        larger = builder.node("Add", [builder.node("Abs", [numbers]), builder.constant(1.0, np.float64)])
        value = builder.node("Mul", [builder.node("Sign", [numbers]), builder.node("Log", [larger])])
    elif field.transform == "standard":
        fitted = encoder.transforms[field.name]
        centred = builder.node("Sub", [numbers, builder.constant(fitted["mean"], np.float64)])
        value = builder.node("Div", [centred, builder.constant(fitted["std"], np.float64)])
    else:
        value = numbers
    zero = builder.constant(0.0, np.float64)
    return builder.column(builder.node("Where", [builder.node("IsNaN", [numbers]), zero, value]))


def _without_nulls(builder: _Builder, encoder: Encoder, field: FieldSpec) -> str:
    """The numbers of a numeric or dense field, NaN where they mean "missing": float64 (B,)."""
    nulls = null_numbers(encoder.schema, field)
    numbers = field.name
    for null in sorted({*nulls, *as_float32(nulls).tolist()}):
        is_null = builder.node("Equal", [numbers, builder.constant(null, np.float64)])
        numbers = builder.node("Where", [is_null, builder.constant(np.nan, np.float64), numbers])
    return numbers


def _hashed(builder: _Builder, texts: str, field: FieldSpec) -> str:
    """Hashed ids of texts: int64."""
    number = builder.node("MurmurHash3", [texts], domain="com.microsoft", positive=1, seed=0)
    number = builder.node("Cast", [number], to=TensorProto.INT64)
    rest = builder.node("Mod", [number, builder.constant(field.hash_size)])
    return builder.node("Add", [rest, builder.constant(1)])


def _mapped(builder: _Builder, encoder: Encoder, field: FieldSpec, ids: str) -> str:
    """Hashed ids as the ids that the tables have."""
    id_map = encoder.hash_maps.get(field.table_name)
    return ids if id_map is None else builder.node("Gather", [builder.constant(id_map), ids])


def _compacted(builder: _Builder, field: FieldSpec, ids: str) -> str:
    """The first or last K ids of each row that are not PAD, in order, then PAD: int64 (B, K) of int64 (B, L)."""
    width = builder.constant(field.length)
    is_kept = builder.node("GreaterOrEqual", [ids, builder.constant(0)])
    kept = builder.node("Cast", [is_kept], to=TensorProto.INT64)
    place = builder.node("Sub", [builder.node("CumSum", [kept, builder.constant(1)]), builder.constant(1)])
    if field.keep == "last":
        length = builder.node("ReduceSum", [kept, builder.constant([1])], keepdims=1)
        surplus = builder.node("Max", [builder.node("Sub", [length, width]), builder.constant(0)])
        place = builder.node("Sub", [place, surplus])
    fits = builder.node(
        "And",
        [
            builder.node("GreaterOrEqual", [place, builder.constant(0)]),
            builder.node("And", [is_kept, builder.node("Less", [place, width])]),
        ],
    )
    # One column more takes what does not fit.
    place = builder.node("Where", [fits, place, width])
    rows = builder.node("Shape", [ids], start=0, end=1)
    shape = builder.node("Concat", [rows, builder.constant([field.length + 1])], axis=0)
    empty = builder.node("Expand", [builder.constant(PAD), shape])
    spread = builder.node("ScatterElements", [empty, place, ids], axis=1)
    return builder.node(
        "Slice", [spread, builder.constant([0]), builder.constant([field.length]), builder.constant([1])]
    )
