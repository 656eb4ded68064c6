"""Search methods, one file each: search(task, config, budget, seed) -> SizePlan."""

from __future__ import annotations

from embtrim.methods.frequency import FrequencyConfig
from embtrim.methods.guided import GuidedConfig
from embtrim.methods.hard_mask import HardMaskConfig
from embtrim.methods.magnitude import MagnitudeConfig
from embtrim.methods.mde import MDEConfig
from embtrim.methods.optembed import OptEmbedConfig
from embtrim.methods.pme import PMEConfig
from embtrim.methods.random import RandomConfig
from embtrim.methods.registry import METHODS, Method, method_named, method_of
from embtrim.methods.searching import search
from embtrim.methods.sseds import SSEDSConfig
from embtrim.methods.uniform import UniformConfig

__all__ = [
    "METHODS",
    "FrequencyConfig",
    "GuidedConfig",
    "HardMaskConfig",
    "MDEConfig",
    "MagnitudeConfig",
    "Method",
    "OptEmbedConfig",
    "PMEConfig",
    "RandomConfig",
    "SSEDSConfig",
    "UniformConfig",
    "method_named",
    "method_of",
    "search",
]
