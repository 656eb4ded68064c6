"""README.md of an export: how a server calls the model, with code to copy."""

from __future__ import annotations

from embtrim.data.encoder import Encoder
from embtrim.schema import PAD
from embtrim.serving.manifest import Manifest
from embtrim.system.templates import render


def readme(
    manifest: Manifest, arguments: str, encoder: Encoder | None, has_raw_graph: bool, triton: str | None = None
) -> str:
    """The README as text.

    Args:
        manifest: What manifest.json will hold; its files are not read.
        arguments: Arguments of the exported module's forward, see `call_of`.
        encoder: Encoder of the bundle, if one was exported.
        has_raw_graph: Whether the export holds a graph that takes raw values.
        triton: Name of the model in the export's Triton repository, if it has one.
    """
    inputs = manifest["inputs"]
    method = manifest.get("method")
    if method is None:
        ids = "module"
    else:
        ids = "model" if encoder is None else "encoder"
    return render(
        "embtrim.serving",
        "export_readme.md.j2",
        title=manifest["model"] if method is None else f"{manifest['model']} ({method})",
        format=manifest["format"],
        version=manifest["embtrim"],
        table_bytes=manifest["table_bytes"],
        full_table_bytes=manifest["full_table_bytes"],
        model_bytes=manifest["model_bytes"],
        full_model_bytes=manifest["full_model_bytes"],
        ids=ids,
        has_raw_graph=has_raw_graph,
        triton=triton,
        raw_inputs=manifest.get("raw_inputs", {}),
        hashes=encoder is not None and any(field.hash_size for field in encoder.schema.fields),
        pad=PAD,
        arguments=arguments,
        feeds="{" + ", ".join(f'"{name}": {name}' for name in inputs) + "}",
        shapes=", ".join(f"{n}: {i['dtype']} ({', '.join(map(str, i['shape']))})" for n, i in inputs.items()),
    )
