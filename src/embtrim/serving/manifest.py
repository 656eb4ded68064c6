"""What manifest.json of an export holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

from embtrim.untrusted import read_json

Format = Literal["pt2", "onnx", "torchrec"]

EXPORT_VERSION = 1


class _Input(TypedDict):
    dtype: str
    shape: list[str | int]


class Input(_Input, total=False):
    """One input of an exported model.

    Attributes:
        dtype: Name of the type, such as "int32".
        shape: Size of each dimension; "batch" or "any" for one that may vary.
        columns: Field of each column, for models of embtrim.models. A field of several values fills as many columns of ids.
        column: Raw column, for an input of raw values.
        missing: What stands for a missing raw value; "NaN" is the number.
    """

    columns: list[str]
    column: str
    missing: str | int


class File(TypedDict):
    """One file of an export.

    Attributes:
        bytes: Size of the file.
        sha256: Digest of the file, hex.
    """

    bytes: int
    sha256: str


class TableSizes(TypedDict):
    """Bytes of a model's tables beside those of the full model.

    Attributes:
        table_bytes: Tables as the format stores them.
        full_table_bytes: Tables of the full model as fp32.
    """

    table_bytes: int
    full_table_bytes: int


class Sizes(TableSizes):
    """Bytes of an export beside those of the full model.

    Attributes:
        model_bytes: Files that hold the model.
        full_model_bytes: Files that would hold the full model; computed, not written.
    """

    model_bytes: int
    full_model_bytes: int


class _Manifest(Sizes):
    export_version: int
    embtrim: str
    format: Format
    model: str
    inputs: dict[str, Input]
    files: dict[str, File]


class Manifest(_Manifest, total=False):
    """Contents of manifest.json.

    Attributes:
        export_version: Version of the layout of the folder.
        embtrim: Version of embtrim that wrote the export.
        format: "pt2", "onnx" or "torchrec".
        model: Name of the base model, or the class of a module of one's own.
        method: Search method that made the plan, for models of embtrim.models.
        schema: Fingerprint of the schema, for models of embtrim.models.
        inputs: Inputs by name.
        metrics: Metrics by split, as the bundle notes them; empty if a model alone was exported.
        table_bytes, full_table_bytes, model_bytes, full_model_bytes: See Sizes.
        vocabulary_bytes: Files of the encoder, if a bundle was exported.
        raw_inputs: Inputs of raw values by field, if a bundle was exported.
        files: Every other file by its path in the folder.
    """

    method: str
    schema: str
    metrics: dict[str, dict[str, Any]]
    vocabulary_bytes: int
    raw_inputs: dict[str, Input]


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export."""
    try:
        read_json(folder / "manifest.json")["export_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True
