"""export: write a trained model as a folder that a server reads without embtrim.

model.pt2 | model.onnx | tables.json and weights (torchrec, see write_torchrec)
model_ids.onnx   for models of embtrim.models, the graph that takes ids; model.onnx then takes raw values, and is there only if a
                 bundle was exported, whose hashed fields have a hash that ONNX knows
encoder/         schema.json, vocab.parquet, transforms.json: from raw values to ids, if a bundle was exported
encode.py        from raw values to ids without embtrim, likewise
triton/          a model repository of Triton around model.onnx, if asked for; see triton.py
golden.json      rows with their ids and scores, see golden.py; for models of embtrim.models
check.py         replays them
README.md        how to call the model, with code made for it
manifest.json    see Manifest: inputs, bytes of tables and model beside those of the full one, digest of every file

pt2 and onnx hold the whole model. torchrec holds the tables as TorchRec describes tables, and the network's weights by
name; the network's code is the reader's own.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

from torch import nn

from embtrim._version import __version__
from embtrim.data.encoder import Encoder
from embtrim.errors import ConfigError, DataError, ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.serving.bundle import Bundle
from embtrim.serving.export_readme import readme
from embtrim.serving.export_sizes import export_sizes
from embtrim.serving.golden import golden_ids, golden_rows
from embtrim.serving.graphs import write_onnx, write_pt2
from embtrim.serving.manifest import EXPORT_VERSION, Format, Manifest, is_export
from embtrim.serving.raw_inputs import keys_bytes, raw_inputs
from embtrim.serving.served import (
    IDS_GRAPH,
    RAW_GRAPH,
    Served,
    call_of,
    describe_example,
    describe_inputs,
    serve_model,
    serve_module,
)
from embtrim.serving.torchrec import write_torchrec
from embtrim.serving.triton import check_name, write_repository
from embtrim.system.folders import check_replaceable, file_digest, folder_bytes, write_folder

logger = logging.getLogger(__name__)

# Programs that an export holds as they are.
STANDALONE = Path(__file__).parent / "standalone"

FORMATS: dict[Format, Callable[[Served, Path], None]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
    "torchrec": write_torchrec,
}


@overload
def export(
    model: Bundle | CTRModel,
    format: Format,
    out: str | Path,
    *,
    external_data: bool = False,
    triton: str | None = None,
    overwrite: bool = False,
) -> Manifest: ...


@overload
def export(
    model: nn.Module,
    format: Literal["pt2", "onnx"],
    out: str | Path,
    *,
    example: object,
    external_data: bool = False,
    triton: str | None = None,
    overwrite: bool = False,
) -> Manifest: ...


def export(
    model: nn.Module | Bundle,
    format: Format,
    out: str | Path,
    *,
    example: object = None,
    external_data: bool = False,
    triton: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a model as a folder for serving, under a temporary name that is then renamed. The model is not changed.

    Args:
        model: A bundle, whose encoder is exported too; or a full or compact model alone, of embtrim.models or any module.
        format: "pt2" (torch.export), "onnx", or "torchrec" (tables and weights, no network).
        out: Folder to write.
        example: Inputs of a module that is not one of embtrim.models: a tensor, a tuple of the arguments of `forward`, or a
            dict by argument. The first dimension of every tensor counts rows, at least two; the export takes any number.
        external_data: For "onnx": store the weights in a file of their own. Weights that one file cannot hold (2 GB) always
            get one.
        triton: For "onnx": also write a model repository of NVIDIA's Triton server, with a model of this name.
        overwrite: Replace an earlier export.

    Returns:
        The contents of manifest.json, among them the bytes of tables and model beside those of the full model.

    Raises:
        ConfigError: The format is unknown, has no external data or Triton repository, or cannot describe a module of one's own; the example is
            missing, has one row, does not fit `forward`, holds something other than tensors, lists and dicts, or is not needed.
        DataError: `out` exists.
        ModelError: The model is masked by a gate or has a row optimiser attached; its plan says fewer than 32 bits and its
            tables are fp32; or TorchRec has no tables of their type.
        EmbtrimError: The packages of the format are not installed.
        PlanError: For "torchrec": TorchRec's configs cannot describe the plan.

    Example:
        >>> schema = Schema.from_sizes([100, 10])
        >>> manifest = export(embtrim.models.FM(schema, embedding_dim=4), "pt2", "served")  # doctest: +SKIP
        >>> torch.export.load("served/model.pt2").module()(ids=torch.zeros(7, 2, dtype=torch.int32))  # doctest: +SKIP
    """
    out = Path(out)
    check_format(format)
    if external_data and format != "onnx":
        raise ConfigError(f"external_data is for format 'onnx', given {format!r}; leave it out")
    if triton is not None and format != "onnx":
        raise ConfigError(f"a Triton repository is for format 'onnx', given {format!r}; leave triton out")
    if triton is not None:
        check_name(triton)
    check_replaceable(out, overwrite, "an earlier export", is_export, DataError)
    bundle, model = (model, model.model) if isinstance(model, Bundle) else (None, model)
    served, origin = _describe(model, format, example, {} if bundle is None else bundle.info["metrics"])
    write = FORMATS[format]
    if format == "onnx":
        write = partial(
            write_onnx, external_data=external_data, other_bytes=keys_bytes(bundle.encoder) if bundle else 0
        )
    with write_folder(out, what="export") as folder:
        write(served, folder)
        sizes = export_sizes(model, served, format, write, folder)
        arguments, ids_graph = call_of(served), served.onnx_name
        del served  # it holds tables of its own, and graphs of torch.export that lie in circles hold them too
        gc.collect()
        # The files are listed last, once all of them are written.
        manifest = cast(
            Manifest,
            {"export_version": EXPORT_VERSION, "embtrim": __version__, "format": format, **origin, **sizes},
        )
        if bundle is not None:
            _write_encoder(bundle.encoder, folder, manifest)
            _write_golden(golden_rows(bundle), folder)
        elif isinstance(model, CTRModel):
            _write_golden(golden_ids(model), folder)
        encoder, has_raw_graph = (None, False) if bundle is None else (bundle.encoder, (folder / RAW_GRAPH).exists())
        if triton is not None:
            write_repository(folder / (RAW_GRAPH if has_raw_graph else ids_graph), triton)
        (folder / "README.md").write_text(readme(manifest, arguments, encoder, has_raw_graph, triton), "utf-8")
        manifest["files"] = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    return manifest


def _write_encoder(encoder: Encoder, folder: Path, manifest: Manifest) -> None:
    """Write the files that turn raw values into ids, and for ONNX the graph that does; the manifest tells of them."""
    encoder.save(folder / "encoder")
    manifest["vocabulary_bytes"] = folder_bytes(folder / "encoder")
    shutil.copy(STANDALONE / "encode.py", folder)
    if manifest["format"] == "onnx":
        _write_raw_graph(encoder, folder)
    manifest["raw_inputs"] = raw_inputs(encoder)  # after the graph, which looks at all keys


def _write_raw_graph(encoder: Encoder, folder: Path) -> None:
    """Write model.onnx, from raw values to scores; a warning says why if ONNX cannot encode them."""
    from embtrim.serving.raw_graph import write_raw_graph  # onnx is not installed everywhere

    try:
        write_raw_graph(folder / IDS_GRAPH, encoder, folder / RAW_GRAPH)
    except ModelError as error:
        logger.warning("%s", error)


def _write_golden(golden: dict[str, Any], folder: Path) -> None:
    (folder / "golden.json").write_text(json.dumps(golden, indent=1), "utf-8")
    shutil.copy(STANDALONE / "check.py", folder)


def check_format(format: str) -> Format:
    """The format.

    Raises:
        ConfigError: There is no such format.
    """
    for allowed in FORMATS:
        if format == allowed:
            return allowed
    raise ConfigError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")


def _describe(model: nn.Module, format: Format, example: object, metrics: Any) -> tuple[Served, dict[str, Any]]:
    """A model as its exporter takes it, and the entries of the manifest that say which model it is and what it reads."""
    if isinstance(model, CTRModel):
        if example is not None:
            raise ConfigError(f"{model.name} says itself what it reads; leave out example")
        origin = {"model": model.name, "method": model.tables.plan.method, "schema": model.schema.fingerprint}
        return serve_model(model), {**origin, "inputs": describe_inputs(model.schema), "metrics": metrics}
    if format == "torchrec":
        raise ConfigError(f"format 'torchrec' describes models of embtrim.models, not a {type(model).__name__}")
    served = serve_module(model, example)
    return served, {"model": type(model).__name__, "inputs": describe_example(served)}
