"""DLRM of torchrec on its EmbeddingBagCollection (pip install torchrec fbgemm-gpu-cpu)."""

from importlib.metadata import version

import torch
from flights import SIZES, WIDTH, trim
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

TABLES = [
    EmbeddingBagConfig(name=f"t_{name}", embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
    for name, rows in SIZES.items()
]


def make_model(seed: int) -> DLRM:
    """A model with initial weights. The flights data have no dense features, so the dense input is a column of ones."""
    torch.manual_seed(seed)
    return DLRM(
        EmbeddingBagCollection(TABLES), 1, dense_arch_layer_sizes=[16, WIDTH], over_arch_layer_sizes=[64, 64, 1]
    )


def probability(model: DLRM, ids_BF: Tensor) -> Tensor:
    """Probabilities (B,) for ids, each of which is a bag of its own."""
    lengths = torch.ones(ids_BF.numel(), dtype=torch.int64)
    features = KeyedJaggedTensor.from_lengths_sync(list(SIZES), ids_BF.T.flatten(), lengths)
    return model(torch.ones(len(ids_BF), 1), features).squeeze(1).sigmoid()


trim(f"torchrec {version('torchrec')}", make_model, probability)
