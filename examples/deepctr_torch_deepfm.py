"""DeepFM of deepctr-torch (pip install deepctr-torch requests; its package does not declare requests)."""

from importlib.metadata import version

from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM
from flights import SIZES, WIDTH, trim

COLUMNS = [SparseFeat(name, rows, embedding_dim=WIDTH) for name, rows in SIZES.items()]


def make_model(seed: int) -> DeepFM:
    """A model with initial weights."""
    return DeepFM(COLUMNS, COLUMNS, dnn_hidden_units=(64, 64), seed=seed)


trim(
    f"deepctr-torch {version('deepctr-torch')}",
    make_model,
    probability=lambda model, ids_BF: model(ids_BF.float()).squeeze(1),
)
