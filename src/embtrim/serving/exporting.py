"""export: a trained model leaves embtrim, in a folder that a server reads without it.

model.pt2 | model.onnx (and model.onnx.data) | tables.json and weights (torchrec, see write_torchrec)
encoder/         schema.json, vocab.parquet, transforms.json: from raw values to ids, if a bundle was exported
README.md        how to call it, made for this model
manifest.json    inputs and outputs, size and SHA-256 of every file, bytes of tables and model beside those of the full one

pt2 and onnx hold the whole model. torchrec holds the tables as TorchRec describes tables, and the network's weights by
name: the network itself is code, which the reader brings.

Axes: B batch, C id columns, E dense fields.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from embtrim._version import __version__
from embtrim.data.encoder import Encoder
from embtrim.errors import ConfigError, DataError, EmbtrimError, PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Target, padded_width
from embtrim.schema import PAD, Schema
from embtrim.serving.bundle import Bundle
from embtrim.system.folders import file_digest, folder_bytes, write_folder
from embtrim.system.torch_private import ONNX_LOGGER, tree_leaves, tree_leaves_with_names, tree_map
from embtrim.tables.replacements import CompactEmbedding, Replacement

log = logging.getLogger(__name__)

EXPORT_VERSION = 1
# Values that constant folding may add to an ONNX graph for each constant: what it folds is stored beside the tables.
FOLDED_VALUES = 64
# Above this many bytes of weights they get a file of their own: protobuf ends at 2 GiB, graph included.
ONNX_FILE_BYTES = 3 * 2**29
TARGETS: dict[str, Target] = {"pt2": "torch", "onnx": "onnx", "torchrec": "fbgemm"}
DATA_TYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


def export(
    model: nn.Module | Bundle,
    format: str,
    out: str | Path,
    *,
    example: Any = None,
    external_data: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as a folder for serving; under a temporary name, then renamed. The model is not changed.

    Args:
        model: a bundle, whose encoder goes along; or a full or compact model alone, of the zoo or any module.
        format: "pt2" (torch.export), "onnx", or "torchrec" (tables and weights, no network).
        out: folder to write.
        example: inputs of a model that is not one of embtrim.models, which says by itself what it reads: a batch as a tensor,
            a tuple of what `forward` takes, or a dict by name. Of at least two rows, the first dimension of every tensor:
            the export takes any number.
        external_data: onnx: weights in a file of their own, as is always done where one file cannot hold them (2 GB).
        overwrite: replace an earlier export.

    Returns:
        What manifest.json holds; among it, in bytes: `table_bytes` as `SizePlan.num_bytes` counts them for the format's
        target, `model_bytes` of the files that hold the model, both with `full_` for the full model (its files are computed:
        from these and the sizes of its tables and network, of any module from its graph and the sizes of its tables), and `vocabulary_bytes` of the encoder.

    Raises:
        ConfigError: the format is unknown, knows no external data, or describes no such model; the example is missing,
            has one row, holds what is not a tensor, list or dict, or is for a model that needs none.
        DataError: `out` exists.
        EmbtrimError: the model is masked by a gate, or has a row optimiser attached; its plan says fewer than 32 bits and
            its tables are fp32; or the packages of the format are not installed.
        PlanError: torchrec: what the plan lays out cannot be said in TorchRec's configs.

    Example:
        >>> schema = Schema.from_sizes([100, 10])
        >>> manifest = export(embtrim.models.FM(schema, embedding_dim=4), "pt2", "served")  # doctest: +SKIP
        >>> torch.export.load("served/model.pt2").module()(ids=torch.zeros(7, 2, dtype=torch.int32))  # doctest: +SKIP
    """
    out = Path(out)
    check_format(format)
    if external_data and format != "onnx":
        raise ConfigError(f"external_data is for format 'onnx', given {format!r}; leave it out")
    check_out(out, overwrite)
    encoder, metrics = None, {}
    manifest: dict[str, Any] = {"export_version": EXPORT_VERSION, "embtrim": __version__, "format": format}
    if isinstance(model, Bundle):
        model, encoder, metrics = model.model, model.encoder, model.info["metrics"]
    if isinstance(model, CTRModel):
        if example is not None:
            raise ConfigError(f"{model.name} says itself what it reads; leave out example")
        served = serve_model(model)
        manifest |= {"model": model.name, "method": model.tables.plan.method, "schema": model.schema.fingerprint}
        manifest["inputs"] = describe_inputs(model.schema)
        manifest["metrics"] = metrics
    else:
        if format == "torchrec":
            raise ConfigError(f"format 'torchrec' describes models of embtrim.models, not a {type(model).__name__}")
        served = serve_module(model, example)
        manifest |= {"model": type(model).__name__, "inputs": describe_example(served)}
    write = partial(write_onnx, external_data=True) if external_data else FORMATS[format]
    with write_folder(out, what="export") as folder:
        write(served, folder)
        model_bytes = folder_bytes(folder)
        if isinstance(model, CTRModel):
            sizes = table_sizes(model, format)
            more_bytes = network_bytes(full_network(model)) - network_bytes(model)
            more_bytes += sizes["full_table_bytes"] - sizes["table_bytes"]
        else:
            sizes = module_sizes(model)
            more_bytes = full_module_bytes(served, write, folder) - model_bytes
        manifest |= {**sizes, "model_bytes": model_bytes, "full_model_bytes": model_bytes + more_bytes}
        if encoder is not None:
            encoder.save(folder / "encoder")
            manifest["vocabulary_bytes"] = folder_bytes(folder / "encoder")
        (folder / "README.md").write_text(readme(manifest, served, encoder), "utf-8")
        manifest["files"] = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    return manifest


def check_format(format: str) -> None:
    """Raise ConfigError for a format that there is not."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise DataError if `out` exists and may not be replaced: only an earlier export may, and only if asked."""
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out} exists; choose another name or pass overwrite=True (--overwrite)")
    try:
        json.loads((out / "manifest.json").read_text("utf-8"))["export_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out} is not an earlier export, so it is not overwritten; choose another name") from None


# --- sizes ----------------------------------------------------------------------------------------------------------


def table_sizes(model: CTRModel, format: str) -> dict[str, int]:
    """Bytes of the model's tables as a format stores them, and of the full model's as fp32."""
    plan, target = model.tables.plan, TARGETS[format]
    full = SizePlan.full(model.schema, plan.width, plan.first_order)
    return {"table_bytes": plan.num_bytes(target), "full_table_bytes": full.num_bytes(target)}


def module_sizes(model: nn.Module) -> dict[str, int]:
    """The same of a model that is not one of embtrim.models: of its compact tables, and of those that were left as they are."""
    stored = full = 0
    weights: dict[int, int] = {}  # tables may share one
    for module in model.modules():
        if isinstance(module, CompactEmbedding):
            stored += sum(value.nbytes for value in module.state_dict().values())
            full += module.num_full_bytes
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            weights[id(module.weight)] = module.weight.nbytes
    return {"table_bytes": stored + sum(weights.values()), "full_table_bytes": full + sum(weights.values())}


def full_module_bytes(served: Served, write: Callable[[Served, Path], None], folder: Path) -> int:
    """Bytes of the files of the full model that a model is the compact one of, where that is not one of embtrim.models.

    Compact tables are more than fewer numbers: a graph also says how they are read. So the full model's is exported, with
    tables of a few rows, and the rows that these lack are added. Where it has none (torch exports some bags as replacements
    only) the graph of the compact model stands for it.

    Args:
        served: the compact model.
        write: writes one into a folder.
        folder: of the compact model's files; what is written there beside them is removed.
    """
    if not any(isinstance(module, Replacement) for module in served.module.modules()):
        return folder_bytes(folder)
    module, missing = full_module(served.module)
    with tempfile.TemporaryDirectory(dir=folder) as full:
        try:
            write(dataclasses.replace(served, module=module), Path(full))
            return folder_bytes(Path(full)) + missing
        except Exception as error:  # exporters raise what they like
            log.warning("the full %s cannot be exported (%s); its bytes are estimated", type(module).__name__, error)
    before, after = (sum(p.nbytes for p in m.state_dict().values()) for m in (served.module, module))
    return folder_bytes(folder) + after - before + missing


def full_module(compact: nn.Module) -> tuple[nn.Module, int]:
    """The full model that a compact one stands for, with tables of a few rows, and how many bytes these lack."""
    memo: dict[int, Any] = {id(value): value for value in (*compact.parameters(), *compact.buffers())}
    inside: set[int] = set()
    missing = 0
    generator = torch.Generator().manual_seed(0)  # equal tables would be stored once
    for module in compact.modules():
        if isinstance(module, Replacement) and id(module) not in inside:
            inside.update(map(id, module.modules()))
            memo[id(module)] = table = module.full_table(generator)
            missing += (table.num_embeddings - len(table.weight)) * table.weight[0].nbytes
    full = copy.deepcopy(compact, memo)
    for linear in full.modules():
        if isinstance(linear, nn.Linear) and getattr(linear, "full_in_features", 0) > linear.in_features:
            linear.in_features = linear.full_in_features  # type: ignore[assignment]
            shape = (linear.out_features, linear.in_features)
            linear.weight = nn.Parameter(torch.rand(shape, generator=generator).to(linear.weight))
    return full.eval().requires_grad_(False), missing


def full_network(model: CTRModel) -> CTRModel:
    """A full model with the network that belongs to this one's, and tables of one row."""
    fields = tuple(f if f.vocab_size is None else f.replace(vocab_size=1) for f in model.schema.fields)
    return type(model)(model.schema.replace(fields=fields), **model.hparams)


def network_bytes(model: CTRModel) -> int:
    """Bytes of all parameters but those of the tables."""
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("tables."))


# --- inputs ---------------------------------------------------------------------------------------------------------


def describe_inputs(schema: Schema) -> dict[str, Any]:
    """Name, type, shape and columns of each input; a field of several values fills as many columns of ids."""
    ids = [field.name for field in schema.id_fields for _ in range(field.length)]
    dense = [field.name for field in schema.dense_fields]
    inputs = {"ids": {"dtype": "int32", "shape": ["batch", len(ids)], "columns": ids}}
    if dense:
        inputs["dense"] = {"dtype": "float32", "shape": ["batch", len(dense)], "columns": dense}
    return inputs


@dataclass(frozen=True)
class Served:
    """What a trace needs.

    Attributes:
        module: in eval mode, on the CPU.
        args, kwargs: an example of its inputs.
        shapes: for each of them the dimensions that may vary, as torch.export wants them.
        outputs: names of the outputs, or None for the exporter's own.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: Any = None
    outputs: tuple[str, ...] | None = None


class ServedModel(nn.Module):
    """A model whose inputs have the names they are served under."""

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, dense: Tensor | None = None) -> Tensor:
        """(B,) logits of int32 ids (B, C) and float32 dense values (B, E)."""
        return self.model(ids, dense)


def serve_model(model: CTRModel) -> Served:
    """A zoo model with its tables split by width, and two rows of inputs.

    Raises:
        EmbtrimError: see `export`.
    """
    model.tables.check_free()
    model.tables.check_quantized()
    served = copy_for_export(model)
    served.tables.split_by_width()
    # Two rows stand for any number: sizes 0 and 1 would be taken for constants.
    inputs = {"ids": torch.zeros(2, model.schema.num_id_columns, dtype=torch.int32)}
    if model.schema.dense_fields:
        inputs["dense"] = torch.zeros(2, len(model.schema.dense_fields))
    batch = torch.export.Dim("batch", min=1)
    return Served(ServedModel(served), (), inputs, {name: {0: batch} for name in inputs}, ("logits",))


def serve_module(module: nn.Module, example: Any) -> Served:
    """A module of somebody else's, with an example of its inputs.

    Raises:
        ConfigError, EmbtrimError: see `export`.
    """
    for table in module.modules():
        if isinstance(table, CompactEmbedding) and table.bits < 32 and table.stores_columns and table.packed is None:
            raise EmbtrimError(
                f"the plan says {table.bits} bits for the table of {table.path!r}, which is fp32 still; call "
                "embtrim.quantize(model) once it is trained, or compact with plan.with_bits(32)"
            )
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    args = args if isinstance(args, tuple) else (args,)
    sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes or min(sizes) < 2:
        given = "none" if example is None else f"one of {min(sizes, default=0)}"
        raise ConfigError(
            f"a {type(module).__name__} does not say what it reads: give export an example=batch of at least two rows, as "
            f"its forward takes it; given {given}"
        )
    batch = torch.export.Dim("batch", min=1)

    def free(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return None
        return {0: batch if leaf.shape[0] == sizes[0] else torch.export.Dim.AUTO}

    args, kwargs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        shapes = tree_map(free, kwargs or args)
    except Exception as error:  # a container of somebody's own, such as a KeyedJaggedTensor, may want tensors inside
        kinds = ", ".join(sorted({type(value).__name__ for value in (*args, *kwargs.values())}))
        raise ConfigError(
            f"torch.export cannot be told which dimensions of these inputs may vary ({kinds}: {error}); export a module whose "
            "forward takes tensors, or lists or dicts of them, and makes the rest of them"
        ) from error
    return Served(copy_for_export(module), args, kwargs, shapes)


def copy_for_export(model: Any) -> Any:
    """A copy in eval mode on the CPU; weights on the CPU are shared, not copied."""
    shared = {id(p): nn.Parameter(p.detach().cpu(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval().cpu()


def argument_names(served: Served) -> list[str]:
    """Names of the arguments of `forward` that the example gives."""
    return list(inspect.signature(served.module.forward).bind(*served.args, **served.kwargs).arguments)


def named_tensors(served: Served) -> dict[str, Tensor]:
    """The tensors of the example by argument, in order, with the keys of what is nested after a dot."""
    arguments = zip(argument_names(served), (*served.args, *served.kwargs.values()), strict=False)
    leaves = [(name + keys, leaf) for name, tree in arguments for keys, leaf in tree_leaves_with_names(tree)]
    return {re.sub(r"\W+", ".", path).strip("."): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def describe_example(served: Served) -> dict[str, Any]:
    """Name, type and shape of each input of a foreign module."""
    tensors = named_tensors(served)
    rows = next(len(tensor) for tensor in tensors.values() if tensor.ndim)
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [("batch" if n == rows else "any") if axis == 0 else n for axis, n in enumerate(tensor.shape)],
        }
        for name, tensor in tensors.items()
    }


# --- README.md ------------------------------------------------------------------------------------------------------

README = """# $title as $format

Written by embtrim $version. Tables: $table_bytes bytes of $full_table_bytes in the full model; files of the model:
$model_bytes bytes of $full_model_bytes. `manifest.json` lists the inputs with their columns, and size and SHA-256 of every
file.

## Ids

$ids

## Calling it

```python
$code
```
"""

A_PROBABILITY = """

A probability is 1 / (1 + exp(-logit))."""

IDS_OF_ENCODER = """`encoder/` turns raw values into ids; embtrim has the code for it:

    from embtrim.data.encoder import Encoder
    encoded = Encoder.load("encoder").encode_chunk(frame)  # a polars frame of raw rows -> encoded.ids, encoded.dense

Without embtrim: `schema.json` lists the fields in the order of the columns. `vocab.parquet` (table, value, id, count)
holds the id of each value of a table as text, null for a missing one; a value that is not there reads the table's
`unseen_ids` entry in `transforms.json`, 0 if there is none. A hashed table has no vocabulary: its id is
1 + blake2b-64(UTF-8 text, key "embtrim", little-endian) mod hash_size, through `hash_maps.npz` where there is one; a
missing value is the text "\\0missing". Numbers become buckets or dense values as `transforms.json` and the transforms of
`schema.json` say. Unused columns of a field with several values hold $pad."""

IDS_OF_MODULE = (
    """They are those of the full model: where rows were dropped, the map to those that are left is inside."""
)

IDS_OF_MODEL = """This was made from a model, not from a bundle, so no encoder is beside it. Ids are those of the data the model was
trained on: of `data.recode(plan)` if the plan drops or re-sizes rows. Unused columns of a field with several values hold
$pad."""

PT2_CODE = """import torch

model = torch.export.load("model.pt2").module()
$outputs = model($arguments)  # $shapes; any batch of at least one row"""

ONNX_CODE = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
$unpacked = session.run($names, {$feeds})  # $shapes; any batch of at least one row"""

# Read by a person and by the test, which runs it.
TORCHREC_CODE = """import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchrec import (
    EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor, PoolingType
)
from torchrec.modules.embedding_configs import DataType


def load_collection(folder, kind="tables"):
    \"\"\"EmbeddingBagCollection with the trained weights; kind="first_order" for the first-order weights.\"\"\"
    configs = [
        EmbeddingBagConfig(**{**c, "pooling": PoolingType(c["pooling"]), "data_type": DataType(c["data_type"])})
        for c in json.loads((Path(folder) / "tables.json").read_text())[kind]
    ]
    weights = load_file(Path(folder) / f"{kind}.safetensors")
    collection = EmbeddingBagCollection(tables=configs)
    collection.load_state_dict({f"embedding_bags.{name}.weight": weight for name, weight in weights.items()})
    return collection


def load_unpooled(folder):
    \"\"\"An EmbeddingCollection for each embedding_dim, of the tables that only fields of one value read.\"\"\"
    weights, by_dim = load_file(Path(folder) / "tables.safetensors"), {}
    for c in json.loads((Path(folder) / "tables.json").read_text())["unpooled"]:
        config = EmbeddingConfig(**{**c, "data_type": DataType(c["data_type"])})
        by_dim.setdefault(config.embedding_dim, []).append(config)
    collections = {dim: EmbeddingCollection(tables=configs) for dim, configs in by_dim.items()}
    for dim, collection in collections.items():
        collection.load_state_dict({f"embeddings.{c.name}.weight": weights[c.name] for c in by_dim[dim]})
    return collections


def to_features(ids, columns):
    \"\"\"ids (B, C) and their columns as in manifest.json -> KeyedJaggedTensor; $pad fills unused columns.\"\"\"
    names = list(dict.fromkeys(columns))
    parts = [ids[:, [i for i, name in enumerate(columns) if name == field]] for field in names]
    values = torch.cat([part[part >= 0] for part in parts])
    lengths = torch.cat([(part >= 0).sum(1) for part in parts])
    return KeyedJaggedTensor(keys=names, values=values.long(), lengths=lengths)"""

TORCHREC_NOTE = """
`tables.json` holds the arguments of each EmbeddingBagConfig, whose weights are in `tables.safetensors` and, for the
first-order weights, in `first_order.safetensors`. Tables that only fields of one value read are listed a second time under
`unpooled`, as arguments of EmbeddingConfig: one row an id, of the same weights. FBGEMM takes rows of a multiple of four
columns, so narrower ones end in zeros: of a table the first columns count, as many as its `kept_columns`, and of the
first-order weights the first one. `kept_columns` are the columns of the
full width that a table's own stand for, `removed_tables` those that the plan left without any. The network is not code here:
`network.safetensors` holds its weights under embtrim's names, and among them `tables.projection`, the rows that bring
projected tables to the full width, in the order of the tables.
"""


def readme(manifest: dict[str, Any], served: Served, encoder: Encoder | None) -> str:
    """README.md of an export."""
    inputs, foreign = manifest["inputs"], served.outputs is None
    counts = ("table_bytes", "full_table_bytes", "model_bytes", "full_model_bytes")
    values = {
        **{name: f"{manifest[name]:,}" for name in counts},
        "title": manifest["model"] if foreign else f"{manifest['model']} ({manifest['method']})",
        "format": manifest["format"],
        "version": manifest["embtrim"],
        "pad": PAD,
        "outputs": "outputs" if foreign else "logits",
        "unpacked": "outputs" if foreign else "(logits,)",
        "names": "None" if foreign else '["logits"]',
        "arguments": ", ".join([*argument_names(served)[: len(served.args)], *(f"{n}={n}" for n in served.kwargs)]),
        "feeds": ", ".join(f'"{name}": {name}' for name in inputs),
        "shapes": ", ".join(f"{n}: {i['dtype']} ({', '.join(map(str, i['shape']))})" for n, i in inputs.items()),
    }
    code = {"pt2": PT2_CODE, "onnx": ONNX_CODE, "torchrec": TORCHREC_CODE}[manifest["format"]]
    ids = IDS_OF_MODULE if foreign else (IDS_OF_MODEL if encoder is None else IDS_OF_ENCODER) + A_PROBABILITY
    parts = {name: Template(text).substitute(values) for name, text in (("code", code), ("ids", ids))}
    return Template(README).substitute(values, **parts) + (TORCHREC_NOTE if manifest["format"] == "torchrec" else "")


# --- formats --------------------------------------------------------------------------------------------------------


def traced(served: Served) -> torch.export.ExportedProgram:
    """One graph for any batch of at least one row."""
    program = torch.export.export(served.module, served.args, served.kwargs, dynamic_shapes=served.shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, in a file that leaves it
    drop_unread(program)
    return program


def drop_unread(program: torch.export.ExportedProgram) -> None:
    """Take what the graph does not read, such as the layout that training needs, out of a program, in place."""
    specs = program.graph_signature.input_specs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for spec, node in list(zip(specs, placeholders, strict=True)):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None and not node.users:
            specs.remove(spec)
            program.graph.erase_node(node)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()


def write_pt2(served: Served, folder: Path) -> None:
    """model.pt2: torch.export.load(..).module()(ids=ids, dense=dense) -> logits, without embtrim."""
    written = io.BytesIO()  # torch's own writer takes the whole process down where the disk is full
    with quiet_exporter():
        program = traced(served)
        # torch keeps the example: somebody's rows, and all of the tensor that they are a slice of. Its shapes are enough.
        program._example_inputs = tree_map(
            lambda x: x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x, program.example_inputs
        )
        torch.export.save(program, written)
    (folder / "model.pt2").write_bytes(written.getbuffer())


def write_onnx(served: Served, folder: Path, external_data: bool = False) -> None:
    """model.onnx: inputs ids and dense, output logits; of a foreign module those of its forward.

    Raises:
        EmbtrimError: onnx or onnxscript is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EmbtrimError(f"format 'onnx' needs {' and '.join(missing)}; pip install embtrim[export]")
    from onnxscript.optimizer import optimize_ir

    with quiet_exporter():
        program = torch.onnx.export(
            traced(served),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(named_tensors(served)),
            output_names=served.outputs,
        )
        assert program is not None
        optimize_ir(program.model, output_size_limit=FOLDED_VALUES)
    weights = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    program.save(folder / "model.onnx", external_data=external_data or weights > ONNX_FILE_BYTES)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what torch's exporter says about its own insides and about a torchvision it does not need."""
    level = ONNX_LOGGER.level
    ONNX_LOGGER.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        ONNX_LOGGER.setLevel(level)


def write_torchrec(served: Served, folder: Path) -> None:
    """tables.json; tables.safetensors and first_order.safetensors by the names in it; network.safetensors, the rest.

    Rows are filled up to a multiple of four columns with zeros, as `SizePlan.num_bytes("fbgemm")` counts them: what runs
    TorchRec's tables when it is served, FBGEMM, takes no others.

    Raises:
        PlanError: see `torchrec_configs`.
    """
    assert isinstance(served.module, ServedModel)
    model = served.module.model
    configs = torchrec_configs(model)
    plans = model.tables.plan.tables
    kept = {torchrec_name(table.name): list(table.columns) for table in plans if table.output_width}
    removed = [table.name for table in plans if not table.output_width]
    layout = {"full_width": model.tables.width, "kept_columns": kept, "removed_tables": removed}
    (folder / "tables.json").write_text(json.dumps({**configs, **layout}, indent=1), "utf-8")
    for name, weights in torchrec_weights(model).items():
        save_file(weights, folder / f"{name}.safetensors")
    network = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("tables.weight_by_width.") and name != "tables.first_order"
    }
    save_file(network, folder / "network.safetensors")


def torchrec_configs(model: CTRModel) -> dict[str, list[dict[str, Any]]]:
    """Arguments of TorchRec's configs.

    Returns:
        Of the EmbeddingBagConfig of every table, and of every table's first-order weights, which are its first column;
        "unpooled": of the EmbeddingConfig of the tables that only fields of one value read.

    Raises:
        PlanError: a table stores rows of several widths or is quantised, or fields pool it differently.
        EmbtrimError: TorchRec has no such data type.
    """
    tables, schema = model.tables, model.schema
    if tables.packed is not None:
        raise PlanError(
            "these tables are quantised by column, which TorchRec's configs cannot say; export as pt2 or onnx, or retrain "
            "with plan.with_bits(32)"
        )
    weight = tables.group_view(tables.groups[0])
    if weight.dtype not in DATA_TYPES:
        raise EmbtrimError(f"TorchRec has no tables of {weight.dtype}; call model.float() before export")
    configs: dict[str, list[dict[str, Any]]] = {"tables": [], "first_order": [], "unpooled": []}
    for table in tables.plan.tables:
        if table.mixed:
            raise PlanError(
                f"table {table.name!r} stores rows of several widths, a TorchRec table has one embedding_dim; "
                "export as pt2 or onnx"
            )
        fields = [field for field in schema.id_fields if field.table_name == table.name]
        pooled = {field.pooling: field.name for field in fields if field.length > 1}
        if len(pooled) > 1:
            raise PlanError(
                f"fields {pooled['sum']!r} and {pooled['mean']!r} share table {table.name!r} and pool it by sum and by "
                "mean, a TorchRec table has one pooling; export as pt2 or onnx"
            )
        config = {
            "name": torchrec_name(table.name),
            "embedding_dim": padded_width(table.output_width),
            "num_embeddings": table.num_compact_rows,
            "feature_names": [field.name for field in fields],
            "data_type": DATA_TYPES[weight.dtype],
        }
        bag = {**config, "pooling": next(iter(pooled), "sum").upper()}
        if table.output_width:
            configs["tables"].append(bag)
        if table.output_width and not any(field.type == "multi" for field in fields):
            configs["unpooled"].append(config)
        if tables.first_order is not None:
            configs["first_order"].append({**bag, "embedding_dim": padded_width(1)})
    return configs


def torchrec_name(table: str) -> str:
    """Name of a table in its config: TorchRec makes it an attribute, which has no dot and is not `type` or `items`."""
    return "table_" + table.replace("%", "%25").replace(".", "%2E")


def torchrec_weights(model: CTRModel) -> dict[str, dict[str, Tensor]]:
    """By file, (rows, padded width) weights by the names in the configs."""
    tables = model.tables
    weights: dict[str, dict[str, Tensor]] = {"tables": {}, "first_order": {}}
    for table in tables.plan.tables:
        name, start = torchrec_name(table.name), tables.segment_starts[table.name][0]
        stop = start + table.num_compact_rows
        group = next(g for g in tables.groups if g.width == table.output_width)
        if group.width:
            own = tables.group_view(group)[start - group.start : stop - group.start]
            weights["tables"][name] = fill_up(own)
        if tables.first_order is not None:
            weights["first_order"][name] = fill_up(tables.first_order[start:stop, None])
    return weights


def fill_up(rows_NW: Tensor) -> Tensor:
    """A copy of rows with zeros up to the padded width."""
    width = rows_NW.shape[1]
    return nn.functional.pad(rows_NW.detach(), (0, padded_width(width) - width))


FORMATS: dict[str, Callable[[Served, Path], None]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
    "torchrec": write_torchrec,
}
