"""embtrim: right-sized embedding tables for recommender and CTR models.

The names below are the public face; they are loaded on first use, so that `import embtrim` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embtrim._version import __version__ as __version__

if TYPE_CHECKING:
    from embtrim import models
    from embtrim.compaction.compacting import compact, quantize, verify
    from embtrim.data.catalog import load
    from embtrim.data.encoding import encode
    from embtrim.errors import EmbtrimError
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
    from embtrim.plan.budget import Budget
    from embtrim.plan.plan import SizePlan
    from embtrim.schema import FieldSpec, Schema
    from embtrim.serving.bundle import load_bundle, save
    from embtrim.serving.exporting import export
    from embtrim.serving.updating import update
    from embtrim.tasks.sites import CTRTask, Task
    from embtrim.training.fitting import TrainConfig, evaluate, fit

_HOMES = {
    "Budget": "plan.budget",
    "CTRTask": "tasks.sites",
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
    "SizePlan": "plan.plan",
    "Task": "tasks.sites",
    "TrainConfig": "training.fitting",
    "UniformConfig": "methods",
    "compact": "compaction.compacting",
    "encode": "data.encoding",
    "evaluate": "training.fitting",
    "export": "serving.exporting",
    "fit": "training.fitting",
    "load": "data.catalog",
    "load_bundle": "serving.bundle",
    "models": "models",
    "quantize": "compaction.compacting",
    "save": "serving.bundle",
    "search": "methods",
    "update": "serving.updating",
    "verify": "compaction.compacting",
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
