"""DeepFM of torch-rechub (pip install torch-rechub)."""

from importlib.metadata import version

import torch
from flights import SIZES, WIDTH, trim
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DeepFM

FEATURES = [SparseFeature(name, rows, embed_dim=WIDTH) for name, rows in SIZES.items()]


def make_model(seed: int) -> DeepFM:
    """A model with initial weights."""
    torch.manual_seed(seed)
    return DeepFM(FEATURES, FEATURES, mlp_params={"dims": [64, 64], "dropout": 0.0, "activation": "relu"})


trim(
    f"torch-rechub {version('torch-rechub')}",
    make_model,
    probability=lambda model, ids_BF: model(dict(zip(SIZES, ids_BF.T, strict=True))),
)
