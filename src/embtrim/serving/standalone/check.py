"""Replay the golden rows: python check.py. It needs numpy and, for onnx, onnxruntime; it ends with 1 if a score differs.

model.onnx and model_ids.onnx run in onnxruntime. model.pt2 runs if torch is installed, encode.py if polars or pyarrow is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
TOLERANCE = 1e-5


def graph_inputs(rows: list[dict[str, Any]], inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of model.onnx for rows that hold values as the inputs take them, None where they are missing."""
    feeds = {}
    for name, entry in inputs.items():
        cells = [row[entry["column"]] for row in rows]
        if len(entry["shape"]) == 2:
            parts = [[entry["missing"] if part is None else as_text(part) for part in cell or ()] for cell in cells]
            width = max([1, *map(len, parts)])
            feeds[name] = np.array([row + [entry["missing"]] * (width - len(row)) for row in parts], object)
        elif entry["dtype"] == "string":
            feeds[name] = np.array([entry["missing"] if cell is None else as_text(cell) for cell in cells], object)
        else:
            missing = math.nan if entry["dtype"] == "float64" else entry["missing"]
            feeds[name] = np.array([missing if cell is None else cell for cell in cells], entry["dtype"])
    return feeds


def as_text(cell: str | float) -> str:
    """A text as it is, and a number as its text."""
    return cell if isinstance(cell, str) else str(int(cell)) if cell == math.floor(cell) else repr(cell)


def id_inputs(golden: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of a model that takes ids."""
    feeds = {"ids": np.array(golden["ids"], np.int32)}
    return feeds if golden["dense"] is None else {**feeds, "dense": np.array(golden["dense"], np.float32)}


def main() -> int:
    """Print the largest difference of each file; 1 if one is too large."""
    golden = json.loads((FOLDER / "golden.json").read_text("utf-8"))
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    scores = np.array(golden["scores"])
    found: dict[str, np.ndarray] = {}
    if (FOLDER / "model_ids.onnx").exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(str(FOLDER / "model_ids.onnx"))
        logits = np.asarray(session.run(["logits"], id_inputs(golden))[0], float)
        found["model_ids.onnx"] = (1 + np.tanh(logits / 2)) / 2
        if (FOLDER / "model.onnx").exists():
            session = onnxruntime.InferenceSession(str(FOLDER / "model.onnx"))
            feeds = graph_inputs(golden["rows"], manifest["raw_inputs"])
            found["model.onnx"] = np.asarray(session.run(["score"], feeds)[0])
    if (FOLDER / "model.pt2").exists() and importlib.util.find_spec("torch"):
        import torch

        inputs = {name: torch.from_numpy(value) for name, value in id_inputs(golden).items()}
        found["model.pt2"] = torch.export.load(FOLDER / "model.pt2").module()(**inputs).sigmoid().detach().numpy()
    errors = {name: float(np.abs(value - scores).max()) for name, value in found.items()}
    if golden["rows"] is not None and any(map(importlib.util.find_spec, ("polars", "pyarrow"))):
        sys.path.insert(0, str(FOLDER))
        from encode import Encoder  # type: ignore[import-not-found]

        names = golden["rows"][0]
        ids, dense = Encoder(FOLDER).encode({name: [row[name] for row in golden["rows"]] for name in names})
        expected = id_inputs(golden)
        errors["encode.py, ids"] = float(np.abs(ids - expected["ids"]).max())
        if dense is not None:
            errors["encode.py, dense"] = float(np.abs(dense - expected["dense"]).max())
    for name, error in errors.items():
        print(f"{name}: {len(scores)} rows, largest difference {error:.2g}")
    if not errors:
        print("nothing was checked: install onnxruntime or torch, and polars or pyarrow")
    return int(not errors or any(not error <= TOLERANCE for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
