"""Files from strangers: what is broken or made to harm is refused with an error of embtrim's, or opened."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embtrim.errors import EmbtrimError
from tests.broken_files import KINDS, clear, make_all, mutated
from tests.hostile_files import HOSTILE, Hostile

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BY_NAME = {kind.name: kind for kind in KINDS}
EXAMPLES = {"encoded": 25, "bundle": 25, "plan": 20, "run": 8, "settings": 20, "checkpoint": 8, "log": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_all(folder)
    return folder


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_mutated_file_is_refused_or_opened(root: Path, name: str) -> None:
    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        with mutated(BY_NAME[name], root, random.Random(seed)) as (folder, _):
            with contextlib.suppress(EmbtrimError):
                BY_NAME[name].open(folder)
        clear(root)

    check()


@pytest.mark.parametrize("hostile", [h for h in HOSTILE if not h.large], ids=lambda hostile: hostile.name)
def test_a_hostile_file_is_refused(root: Path, hostile: Hostile, caplog: pytest.LogCaptureFixture) -> None:
    kind = BY_NAME[hostile.kind]
    folder, before = root / kind.name, root / "before"
    shutil.copytree(folder, before)
    try:
        hostile.harm(folder)
        if hostile.sealed:
            kind.seal(folder)
        if hostile.words:
            with pytest.raises(EmbtrimError) as raised:
                kind.open(folder)
            assert hostile.words in str(raised.value)
            assert len(str(raised.value)) < 2_000
        else:
            kind.open(folder)
    finally:
        shutil.rmtree(folder)
        before.rename(folder)
        clear(root)
