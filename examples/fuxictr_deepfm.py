"""A DeepFM of FuxiCTR's layers and BaseModel (pip install fuxictr ray); the package does not contain its model zoo."""

from importlib.metadata import version

import torch
from flights import SIZES, WIDTH, trim
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel

FEATURES = FeatureMap("flights", ".")
FEATURES.labels = ["late"]
FEATURES.features.update({n: {"type": "categorical", "source": "", "vocab_size": v} for n, v in SIZES.items()})
FEATURES.num_fields = len(SIZES)


class DeepFM(BaseModel):
    """First-order weights, FM and MLP over the same embeddings."""

    def __init__(self) -> None:
        super().__init__(FEATURES, verbose=0, model_root=".", metrics=["AUC"])
        self.embedding = FeatureEmbedding(FEATURES, WIDTH)
        self.fm = FactorizationMachine(FEATURES)
        self.mlp = MLP_Block(len(SIZES) * WIDTH, hidden_units=[64, 64], output_dim=1)

    def forward(self, inputs: dict) -> dict:
        """Probabilities (B, 1) under "y_pred"."""
        features = self.get_inputs(inputs)
        emb_BFD = self.embedding(features)
        return {"y_pred": self.output_activation(self.fm(features, emb_BFD) + self.mlp(emb_BFD.flatten(1)))}


def make_model(seed: int) -> DeepFM:
    """A model with initial weights."""
    torch.manual_seed(seed)
    model = DeepFM()
    model.reset_parameters()
    return model


trim(
    f"fuxictr {version('fuxictr')}",
    make_model,
    probability=lambda model, ids_BF: model(dict(zip(SIZES, ids_BF.T, strict=True)))["y_pred"].squeeze(1),
)
