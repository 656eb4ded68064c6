"""The files of a bundle, checked before anything is made of them: what bundle.json holds, which files lie there, their sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field

from embtrim.config import Config, Entry
from embtrim.data.dataset import SplitNote
from embtrim.errors import BundleError, ConfigError, shown
from embtrim.models.ctr_model import CTRModel
from embtrim.system.arrays import tensor_shapes
from embtrim.system.folders import file_digest
from embtrim.system.holding import undo_replacement
from embtrim.system.modules import is_finite
from embtrim.untrusted import read_json

# Version 1 has no digest of bundle.json itself and says less about the origin of a model; it still opens.
BUNDLE_VERSION = 2
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What building a model of a description that contradicts itself raises.
BUILD_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError, RecursionError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class DataNote(Entry):
    """The data that trained a model.

    Attributes:
        num_rows: Rows by split.
        split: How they were divided.
        split_seed: Seed of the random split.
    """

    num_rows: dict[str, int] = Field(default_factory=dict)
    split: SplitNote | None = None
    split_seed: int | None = None


class UpdateNote(Entry):
    """What an update changed, see `embtrim.update`; what is read of it is typed."""

    model_config = ConfigDict(extra="allow")

    number: int = Field(default=0, strict=True, ge=0)
    of: str = ""
    schema_before: str = ""
    plan_before: str = ""
    renumbered: bool = False


class Contents(Config):
    """What bundle.json holds.

    Attributes:
        bundle_version: Version of the bundle's format.
        embtrim: Version of embtrim that wrote the bundle.
        model: Name of the base model.
        hparams: Arguments of the base model.
        fingerprint: Fingerprint of the schema; stored as "schema".
        version: Version of plan and schema: 1 as first trained, one more with each update.
        data: Encoded data that trained the model: rows by split, the split, and the seed of the split.
        seed: Seed of training; None if it is not known.
        metrics: Metrics by split.
        spread: For a run of several seeds: "seeds", and "mean" and "std" (sample standard deviation) by split and metric.
        update: For an updated model: what the update changed, see `embtrim.update`.
        files: SHA-256 of every other file.
        digest: SHA-256 of all other entries, see `contents_digest`.
    """

    bundle_version: int = Field(strict=True, ge=1)
    embtrim: str
    model: str
    hparams: dict[str, Any]
    fingerprint: str = Field(alias="schema")
    version: int = Field(default=1, strict=True, ge=1)
    data: DataNote = Field(default_factory=DataNote)
    seed: int | None = None
    metrics: dict[str, dict[str, Any]]
    spread: dict[str, Any] | None = None
    update: UpdateNote | None = None
    files: dict[str, str]
    digest: str | None = None


def read_contents(folder: Path) -> dict[str, Any]:
    """Contents of bundle.json.

    Raises:
        BundleError: The file is missing, damaged, or of a newer version.
    """
    path = folder / "bundle.json"
    undo_replacement(folder)
    try:
        info = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{folder} is not a bundle: it has no bundle.json; write one with `embtrim run` or embtrim.save"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is damaged ({error}); save the bundle again") from None
    if not isinstance(info, dict):
        raise BundleError(f"{path} is damaged (it does not hold an object); save the bundle again")
    version = info.get("bundle_version")
    if isinstance(version, int) and version > BUNDLE_VERSION:
        raise BundleError(
            f"{folder} has bundle version {version}, this release reads {BUNDLE_VERSION}; upgrade embtrim"
        )
    try:
        contents = Contents.parse(info)
    except ConfigError as error:
        raise BundleError(f"{path} is damaged ({error}); save the bundle again") from None
    if contents.digest != contents_digest(info) and contents.bundle_version > 1:
        raise BundleError(f"{path} was changed or truncated (its digest differs); copy or save the bundle again")
    held = contents.model_dump(by_alias=True)
    if contents.update is not None:
        held["update"] = info["update"]
        if contents.bundle_version == 1:
            held["version"] = 1 + contents.update.number
    return held


def contents_digest(info: Mapping[str, Any]) -> str:
    """SHA-256 of bundle.json without its digest, as JSON with sorted keys and no indentation."""
    held = {key: value for key, value in info.items() if key != "digest"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def with_digest(info: Mapping[str, Any]) -> str:
    """Text of bundle.json."""
    return json.dumps({**info, "digest": contents_digest(info)}, indent=1)


def files_of(folder: Path) -> list[str]:
    """Paths of all files in a bundle's folder, except bundle.json, relative to it."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in found if name != "bundle.json"]


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Check that a folder holds the listed files, all regular, and no others.

    Raises:
        BundleError: A file is missing, changed, not listed, not regular, or a link out of the folder.
    """
    place, found = folder.resolve(), files_of(folder)
    for name in found:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(place):
            raise BundleError(
                f"{path} is a link out of the folder; a bundle holds its own files: copy it with its links followed (cp -rL)"
            )
        if not path.is_file():
            raise BundleError(f"{path} is not a regular file; copy or save the bundle again")
    for name, digest in digests.items():
        if name not in found:
            raise BundleError(f"{folder} is incomplete: {shown(name)[1:-1]} is missing; copy or save the bundle again")
        if file_digest(folder / name) != digest:
            raise BundleError(
                f"{folder / name} was changed or truncated (its digest differs); copy or save the bundle again"
            )
    added = [name for name in found if name not in digests]
    if added:
        raise BundleError(f"{folder} holds {added[0]}, which its bundle.json does not list; move it elsewhere")


def check_weights(path: Path, make: Callable[[], CTRModel]) -> None:
    """Check that a safetensors file holds the weights of a model, by its header alone.

    Args:
        path: The file.
        make: Makes the model. Here it makes a model without memory for its weights.

    Raises:
        BundleError: The file lacks a weight, or holds one of another shape or type.
        ValueError: The file is damaged.
    """
    found = tensor_shapes(path)
    with torch.device("meta"):
        outline = make()
        unknown = [name for name, tensor in found.items() if tensor.dtype not in _TYPES]
        if unknown:
            raise BundleError(f"{path}: weight {shown(unknown[0])} has type {shown(found[unknown[0]].dtype)}")
        outline.load_state_dict({name: torch.empty(t.shape, dtype=_TYPES[t.dtype]) for name, t in found.items()})
    if outline.tables.plan.is_quantized and outline.tables.packed is None:
        raise BundleError(f"plan.json says fewer than 32 bits, but {path.name} holds fp32 tables")
    for name, value in outline.state_dict().items():
        if _TYPES[found[name].dtype] != value.dtype:
            raise BundleError(f"{path}: weight {name!r} has type {found[name].dtype}, the model needs {value.dtype}")


def check_values(model: CTRModel) -> None:
    """Raise BundleError for a weight, scale or running statistic that is NaN or infinite; the message names it."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not is_finite(value):
            raise BundleError(f"weight {name!r} holds nan or infinity, and so would the scores; train the model again")
