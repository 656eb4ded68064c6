"""Device, kernels and matmul precision of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from embtrim.errors import ConfigError
from embtrim.system import torch_private
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.kernels import kernels_name
from embtrim.training.settings import TrainConfig


def kernels_used(
    tables: EmbeddingTables, config: TrainConfig, name_of: Callable[[torch.Tensor], str] = kernels_name
) -> str | None:
    """Kernels of a training, "torch" or "fused"; None if it uses torch's own dense gradients.

    Args:
        tables: Tables of the model.
        config: Settings of the training.
        name_of: `kernels_name`, or `kernels_expected` where nothing may ever be trained.
    """
    if config.tables == "dense" and not tables.layout.mixed_fields:
        return None
    return name_of(torch.empty(0, device=device_of(config)))


def device_of(config: TrainConfig) -> torch.device:
    """The device of the settings; never another one instead.

    Raises:
        ConfigError: The device does not exist, or torch does not see it.
    """
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"[train] unknown device {config.device!r}; allowed: 'cpu', 'cuda', 'cuda:1'")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise ConfigError(
            f"[train] device {config.device!r} is not there, torch {torch.__version__} sees {found}; use 'cpu'"
        )
    return device


@contextmanager
def fast_matmul(precision: str, device: torch.device) -> Iterator[tuple[Callable[[], Any], str]]:
    """Choose the matmul precision inside a `with` block, and restore torch's global flag after it.

    torch's "medium" sends fp32 matmuls to oneDNN on CPUs. Without AMX tiles oneDNN computes them in exact fp32. With AMX
    tiles it may use bf16, so `precision` "fp32" then keeps torch's default.

    Yields:
        A factory of autocast contexts for the forward pass, and the chosen precision in words.
    """
    before = torch.get_float32_matmul_precision()
    onednn, bf16 = _matmul_choice(precision, device)
    try:
        torch.set_float32_matmul_precision("medium" if onednn else "highest")
        yield (
            (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext,
            computes_in(precision, device),
        )
    finally:
        torch.set_float32_matmul_precision(before)


def computes_in(precision: str, device: torch.device) -> str:
    """Precision of a forward pass, in words."""
    onednn, bf16 = _matmul_choice(precision, device)
    return ("bf16 autocast" if bf16 else "fp32") + (", oneDNN matmul" if onednn else "")


def _matmul_choice(precision: str, device: torch.device) -> tuple[bool, bool]:
    """Whether fp32 matmuls go to oneDNN, and whether autocast to bf16 is on."""
    has_amx = device.type == "cpu" and torch_private.has_amx()
    onednn = device.type == "cpu" and (precision != "fp32" or not has_amx)
    if device.type == "cpu":
        has_bf16 = torch_private.has_bf16()
    else:
        has_bf16 = torch.cuda.is_bf16_supported()
    return onednn, precision == "bf16" or (precision == "auto" and has_bf16)
