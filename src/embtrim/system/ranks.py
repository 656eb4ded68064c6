"""Refusal to do the same work in several processes of one job, called ranks."""

from __future__ import annotations

import os
import sys

from embtrim.errors import EmbtrimError


def group_size() -> int | None:
    """Number of processes of the default group of torch.distributed; None without a group."""
    distributed = sys.modules.get("torch.distributed")  # without the import there is no group
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return None


def num_ranks() -> int:
    """Number of processes of the job that this one belongs to: of its process group, or as torchrun says; 1 for one alone."""
    if (size := group_size()) is not None:
        return size
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if "RANK" in os.environ and number.isdecimal() else 1


def refuse_ranks(what: str) -> None:
    """Raise EmbtrimError where several ranks would each do all of the work, and write one folder.

    Args:
        what: The function or command, for the message.
    """
    if (number := num_ranks()) > 1:
        raise EmbtrimError(
            f"{what} works in one process, but this one is one of {number} ranks, each of which would do all of the work; "
            "start it without torchrun, or search and compact a model that torchrec shards with embtrim.torchrec"
        )
