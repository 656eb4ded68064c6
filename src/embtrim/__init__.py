"""embtrim: right-sized embedding tables for recommender and CTR models.

The names below are the public face; they are loaded on first use, so that `import embtrim` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embtrim._version import __version__ as __version__

if TYPE_CHECKING:
    from embtrim import engines, methods, models, trackers
    from embtrim.compaction.compacting import compact, quantize_
    from embtrim.compaction.verification import Verification, verify
    from embtrim.data.catalog import load
    from embtrim.data.dataset import EncodedDataset
    from embtrim.data.encoder import Encoder
    from embtrim.data.encoding import encode
    from embtrim.data.log_profile import profile
    from embtrim.data.profile import LogProfile
    from embtrim.data.read_options import ReadOptions
    from embtrim.data.splitting import Split
    from embtrim.errors import EmbtrimError
    from embtrim.experiments.comparison import Comparison, compare
    from embtrim.experiments.curve import size_curve
    from embtrim.experiments.grid import CompareConfig
    from embtrim.experiments.records import RunRecord
    from embtrim.experiments.run import run
    from embtrim.experiments.settings import RunConfig
    from embtrim.methods.curves import SizeCurve
    from embtrim.methods.searching import search
    from embtrim.plan.budget import Budget
    from embtrim.plan.plan import SizePlan
    from embtrim.schema import FieldSpec, Schema
    from embtrim.serving.bundle import Bundle, load_bundle, save
    from embtrim.serving.exporting import export
    from embtrim.serving.manifest import Manifest
    from embtrim.serving.updating import UpdateConfig, UpdateReport, update
    from embtrim.tables.logits import table_logits
    from embtrim.tasks.ctr_task import CTRTask
    from embtrim.tasks.survey import Finding
    from embtrim.tasks.task import Task
    from embtrim.training.callbacks import Epoch
    from embtrim.training.evaluation import evaluate
    from embtrim.training.fitting import fit
    from embtrim.training.metrics import Metrics
    from embtrim.training.settings import FitResult, TrainConfig

# Where each public name is defined.
_HOMES = {
    "Budget": "plan.budget",
    "Bundle": "serving.bundle",
    "CTRTask": "tasks.ctr_task",
    "CompareConfig": "experiments.grid",
    "Comparison": "experiments.comparison",
    "EmbtrimError": "errors",
    "Epoch": "training.callbacks",
    "EncodedDataset": "data.dataset",
    "Encoder": "data.encoder",
    "FieldSpec": "schema",
    "Finding": "tasks.survey",
    "FitResult": "training.settings",
    "LogProfile": "data.profile",
    "Manifest": "serving.manifest",
    "Metrics": "training.metrics",
    "ReadOptions": "data.read_options",
    "RunConfig": "experiments.settings",
    "RunRecord": "experiments.records",
    "Schema": "schema",
    "SizeCurve": "methods.curves",
    "SizePlan": "plan.plan",
    "Split": "data.splitting",
    "Task": "tasks.task",
    "TrainConfig": "training.settings",
    "UpdateConfig": "serving.updating",
    "UpdateReport": "serving.updating",
    "Verification": "compaction.verification",
    "compact": "compaction.compacting",
    "compare": "experiments.comparison",
    "encode": "data.encoding",
    "engines": "engines",
    "evaluate": "training.evaluation",
    "export": "serving.exporting",
    "fit": "training.fitting",
    "load": "data.catalog",
    "load_bundle": "serving.bundle",
    "methods": "methods",
    "models": "models",
    "profile": "data.log_profile",
    "quantize_": "compaction.compacting",
    "run": "experiments.run",
    "save": "serving.bundle",
    "search": "methods.searching",
    "size_curve": "experiments.curve",
    "table_logits": "tables.logits",
    "torchrec": "torchrec",
    "trackers": "trackers",
    "update": "serving.updating",
    "verify": "compaction.verification",
}

__all__ = [  # noqa: RUF022 (in the order of the way through the house)
    "encode", "engines", "profile", "load", "models", "fit", "evaluate", "methods", "search", "verify", "compact", "quantize_", "save",
    "load_bundle", "export", "update", "run", "size_curve", "compare", "trackers", "table_logits",
    "Schema", "FieldSpec", "Split", "ReadOptions", "LogProfile", "EncodedDataset", "Encoder", "TrainConfig", "FitResult", "Epoch", "Metrics",
    "Task", "CTRTask", "Finding", "Budget", "SizePlan", "Verification", "Bundle", "Manifest", "UpdateConfig", "UpdateReport",
    "RunConfig", "RunRecord", "SizeCurve", "CompareConfig", "Comparison", "EmbtrimError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embtrim' has no attribute {name!r}")
    home = import_module(f"embtrim.{_HOMES[name]}")
    value = home if _HOMES[name] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
