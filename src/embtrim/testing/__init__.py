"""What every search method promises, as checks that anyone can run on a method of their own: see checks.py."""

from embtrim.testing.checks import (
    CHECKS,
    ForeignModel,
    PooledModel,
    check_planted,
    foreign_batches,
    foreign_task,
    odd_task,
    planted_data,
    planted_task,
    pooled_task,
    zoo_task,
)

__all__ = [
    "CHECKS",
    "ForeignModel",
    "PooledModel",
    "check_planted",
    "foreign_batches",
    "foreign_task",
    "odd_task",
    "planted_data",
    "planted_task",
    "pooled_task",
    "zoo_task",
]
