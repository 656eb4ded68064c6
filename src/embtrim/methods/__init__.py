"""Search methods, one file each: search(task, config, budget, seed) -> SizePlan.

The settings classes and `search` are loaded on first use: the list of methods needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embtrim.methods.registry import METHODS, OWN, Method, method_named, method_of, register

if TYPE_CHECKING:
    from embtrim.methods.frequency import FrequencyConfig
    from embtrim.methods.guided import GuidedConfig
    from embtrim.methods.hard_mask import HardMaskConfig
    from embtrim.methods.magnitude import MagnitudeConfig
    from embtrim.methods.mde import MDEConfig
    from embtrim.methods.optembed import OptEmbedConfig
    from embtrim.methods.pme import PMEConfig
    from embtrim.methods.random import RandomConfig
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
    "register",
    "search",
]


def __getattr__(name: str) -> Any:
    if name == "search":
        from embtrim.methods.searching import search as value
    else:
        value = next((method.config for method in OWN.values() if method.config_name == name), None)
        if value is None:
            raise AttributeError(f"module 'embtrim.methods' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
