"""What every search method promises, as checks that anyone can run on a method of their own: see checks.py."""

from embtrim.testing.checks import CHECKS, check_method, check_planted
from embtrim.testing.matrix import conformance_matrix
from embtrim.testing.toys import (
    TASKS,
    ForeignModel,
    PooledModel,
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
    "TASKS",
    "ForeignModel",
    "PooledModel",
    "check_method",
    "check_planted",
    "conformance_matrix",
    "foreign_batches",
    "foreign_task",
    "odd_task",
    "planted_data",
    "planted_task",
    "pooled_task",
    "zoo_task",
]
