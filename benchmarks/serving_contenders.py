"""A server of one contender of benchmarks/serving_load.py, with the HTTP side of examples/serve_http.py.

    python serving_contenders.py raw EXPORT          onnxruntime, model.onnx: raw values in
    python serving_contenders.py ids EXPORT          onnxruntime, model_ids.onnx: ids in
    python serving_contenders.py fuxictr SIZES.json  FuxiCTR's DeepFM in eager torch: ids in, random weights

It prints its port, and its resident bytes with all imports but without a model.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

SERVER = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "serve_http.py"))
Score = Callable[[dict[str, list[int]]], list[float]]


def ids_graph(export: Path) -> tuple[list[str], Score]:
    """Columns of ids, and what makes scores of them with an export's model_ids.onnx."""
    import onnxruntime

    names = [f"f{i}" for i in range(json.loads((export / "manifest.json").read_text())["inputs"]["ids"]["shape"][1])]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(export / "model_ids.onnx"), options)

    def score(columns: dict[str, list[int]]) -> list[float]:
        ids_BF = np.array([columns[name] for name in names], np.int32).T
        logits_B = np.asarray(session.run(["logits"], {"ids": ids_BF})[0])
        return (1 / (1 + np.exp(-logits_B))).tolist()

    return names, score


def fuxictr_model(path: Path) -> tuple[list[str], Score]:
    """The same with FuxiCTR's layers and its way to call a model."""
    import tempfile

    import torch
    from fuxictr.features import FeatureMap

    import peers

    settings = json.loads(path.read_text())
    sizes = settings.pop("sizes")
    names = [f"f{i}" for i in range(len(sizes))]
    feature_map = FeatureMap("load", tempfile.gettempdir())
    feature_map.labels, feature_map.num_fields = ["label"], len(sizes)
    for name, size in zip(names, sizes, strict=True):
        feature_map.features[name] = {"source": "", "type": "categorical", "vocab_size": size, "padding_idx": 0}
    model = peers.fuxictr_deepfm(feature_map, learning_rate=1e-3, model_root=tempfile.gettempdir(), **settings)
    model.optimizer = None
    model.eval()

    @torch.no_grad()
    def score(columns: dict[str, list[int]]) -> list[float]:
        inputs = {name: torch.tensor(column) for name, column in columns.items()}
        return model(inputs)["y_pred"].flatten().tolist()

    return names, score


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    kind, path = sys.argv[1], Path(sys.argv[2])
    if kind == "fuxictr":
        import fuxictr.pytorch.models  # noqa: F401

        import peers  # noqa: F401
    else:
        import onnxruntime  # noqa: F401
    before = resident_bytes()
    names, score = {"raw": SERVER["open_export"], "ids": ids_graph, "fuxictr": fuxictr_model}[kind](path)
    with SERVER["make_server"](names, score, 0) as server:
        print(json.dumps([server.server_port, before]), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
