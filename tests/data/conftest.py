from pathlib import Path

import pytest

from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoding import encode
from tests.data.small_logs import ALL_TRAIN


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def run(tmp_path):
    """encode() into a fresh folder, without a bar."""
    count = [0]

    def run_encode(source, schema=None, **options) -> EncodedDataset:
        count[0] += 1
        options.setdefault("split", ALL_TRAIN)
        return encode(source, schema, **{"out": tmp_path / f"out{count[0]}", "progress": False, **options})

    return run_encode
