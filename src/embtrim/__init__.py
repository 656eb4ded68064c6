"""embtrim: right-sized embedding tables for recommender and CTR models.

The names below are the public face; they are loaded on first use, so that `import embtrim` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embtrim import models
    from embtrim.budget import Budget
    from embtrim.bundle import load_bundle, save
    from embtrim.catalog import load
    from embtrim.compaction import compact, quantize, verify
    from embtrim.encoding import encode
    from embtrim.errors import EmbtrimError
    from embtrim.exporting import export
    from embtrim.methods import (
        FrequencyConfig,
        GuidedConfig,
        HardMaskConfig,
        MagnitudeConfig,
        MDEConfig,
        OptEmbedConfig,
        PMEConfig,
        RandomConfig,
        SSEDSConfig,
        UniformConfig,
        search,
    )
    from embtrim.plan import SizePlan
    from embtrim.schema import FieldSpec, Schema
    from embtrim.sites import CTRTask, Task
    from embtrim.train import TrainConfig, evaluate, fit
    from embtrim.updating import update

_HOMES = {
    "Budget": "budget",
    "CTRTask": "sites",
    "EmbtrimError": "errors",
    "FieldSpec": "schema",
    "FrequencyConfig": "methods",
    "GuidedConfig": "methods",
    "HardMaskConfig": "methods",
    "MDEConfig": "methods",
    "MagnitudeConfig": "methods",
    "OptEmbedConfig": "methods",
    "PMEConfig": "methods",
    "RandomConfig": "methods",
    "SSEDSConfig": "methods",
    "Schema": "schema",
    "SizePlan": "plan",
    "Task": "sites",
    "TrainConfig": "train",
    "UniformConfig": "methods",
    "compact": "compaction",
    "encode": "encoding",
    "evaluate": "train",
    "export": "exporting",
    "fit": "train",
    "load": "catalog",
    "load_bundle": "bundle",
    "models": "models",
    "quantize": "compaction",
    "save": "bundle",
    "search": "methods",
    "update": "updating",
    "verify": "compaction",
}

__all__ = [  # noqa: RUF022 (in the order of the way through the house)
    "encode", "load", "models", "fit", "evaluate", "search", "verify", "compact", "quantize", "save", "load_bundle", "export",
    "update",
    "Task", "CTRTask", "Budget", "SizePlan", "Schema", "FieldSpec", "TrainConfig",
    "GuidedConfig", "SSEDSConfig", "HardMaskConfig", "OptEmbedConfig", "PMEConfig",
    "UniformConfig", "RandomConfig", "MagnitudeConfig", "MDEConfig", "FrequencyConfig", "EmbtrimError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embtrim' has no attribute {name!r}")
    home = import_module(f"embtrim.{_HOMES[name]}")
    value = home if _HOMES[name] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
