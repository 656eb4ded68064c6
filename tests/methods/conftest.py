"""Tasks that several tests of methods share."""

from __future__ import annotations

import pytest

from embtrim.tasks.ctr_task import CTRTask
from embtrim.testing.toys import (
    planted_task,
)


@pytest.fixture(scope="session")
def planted() -> CTRTask:
    return planted_task()
