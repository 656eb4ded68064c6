"""Files of tensors are those of the library safetensors, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embtrim.system.tensor_file import write_tensors
from tests.resident import peak_resident

DTYPES = [
    torch.float32, torch.uint8, torch.int64, torch.bool, torch.float16, torch.int8, torch.float64, torch.bfloat16, torch.int32, torch.int16,
]  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"state": json.dumps({"a": 'x"\n\u00e4\x7f'})}])
def test_the_library_writes_the_same_file(tmp_path: Path, metadata: dict[str, str] | None):
    tensors = {f"{i % 3}.{i}\u00e4": torch.arange(3 * i).view(3, i).to(dtype) for i, dtype in enumerate(DTYPES * 2)}
    tensors |= {"scalar": torch.tensor(2.5), "a": torch.ones(7), "B": torch.ones(5), "empty": torch.ones(0, 4)}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    save_file(tensors, tmp_path / "theirs", metadata)
    write_tensors(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_of_no_tensors(tmp_path: Path):
    save_file({}, tmp_path / "theirs")
    write_tensors({}, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_that_share_memory_are_written_in_full(tmp_path: Path):
    whole = torch.arange(6.0)
    write_tensors({"whole": whole, "part": whole[2:4]}, tmp_path / "ours")
    assert {name: value.tolist() for name, value in load_file(tmp_path / "ours").items()} == {
        "whole": [0, 1, 2, 3, 4, 5],
        "part": [2, 3],
    }


def test_writing_takes_no_memory(tmp_path: Path):
    tensors = {str(i): torch.ones(1 << 20) for i in range(4)}
    assert peak_resident(lambda: write_tensors(tensors, tmp_path / "ours")) < 1 << 20


def test_the_library_writes_rare_types_and_refuses_what_it_cannot_write(tmp_path: Path):
    write_tensors({"x": torch.ones(2, dtype=torch.float8_e5m2)}, tmp_path / "ours", {"a": "b"})
    assert load_file(tmp_path / "ours")["x"].float().tolist() == [1, 1]
    with pytest.raises(ValueError, match="contiguous"):
        write_tensors({"x": torch.ones(2, 3).T}, tmp_path / "ours")
