"""Base models of click-through-rate prediction, one file each."""

from __future__ import annotations

import inspect
from typing import Any

from embtrim.errors import ConfigError, hint
from embtrim.models.ctr_model import CTRModel
from embtrim.models.dcn import DCN
from embtrim.models.dcnv2 import DCNv2
from embtrim.models.deepfm import DeepFM
from embtrim.models.dlrm import DLRM
from embtrim.models.fm import FM
from embtrim.models.fnn import FNN
from embtrim.models.ipnn import IPNN
from embtrim.models.lr import LR
from embtrim.models.widedeep import WideDeep
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema

MODELS: dict[str, type[CTRModel]] = {
    model.name: model for model in (LR, FM, FNN, IPNN, WideDeep, DeepFM, DCN, DCNv2, DLRM)
}

__all__ = [
    "DCN",
    "DLRM",
    "FM",
    "FNN",
    "IPNN",
    "LR",
    "MODELS",
    "CTRModel",
    "DCNv2",
    "DeepFM",
    "WideDeep",
    "arguments",
    "build",
]


def build(name: str, schema: Schema, **hparams: Any) -> CTRModel:
    """Build a base model by name.

    Args:
        name: Name of the model, such as "deepfm"; a key of MODELS.
        schema: Fields and vocabulary sizes of the data.
        hparams: Constructor arguments of the model. `plan` may be among them.

    Raises:
        ConfigError: The name or an argument is unknown, or a value is out of range.

    Example:
        >>> build("fm", Schema.from_sizes([100, 10]), embedding_dim=4).hparams["embedding_dim"]
        4
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; {hint(str(name), MODELS)}")
    allowed = list(inspect.signature(MODELS[name]).parameters)[1:]  # the first is schema
    if not isinstance(hparams.get("plan"), PlanShape | None):
        raise ConfigError(f"[model {name}] 'plan' takes a SizePlan, given {hparams['plan']!r}; it is not a setting")
    for key in hparams:
        if key not in allowed:
            raise ConfigError(f"[model {name}] unknown argument {key!r}; {hint(key, allowed)}")
    return MODELS[name](schema, **hparams)


def arguments(name: str) -> dict[str, Any]:
    """Names and defaults of a model's settings: its constructor arguments without `schema` and `plan`.

    Example:
        >>> arguments("lr")["init_std"]
        0.0001
    """
    parameters = inspect.signature(MODELS[name]).parameters
    return {key: p.default for key, p in parameters.items() if key not in ("schema", "plan")}
