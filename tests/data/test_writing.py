"""Array files, row by row."""

import numpy as np
import pytest

from embtrim.data.array_file import ArrayFile


@pytest.mark.parametrize("num_columns", [None, 3])
def test_an_array_file_has_the_bytes_that_numpy_saves(tmp_path, num_columns):
    shape = (50,) if num_columns is None else (50, num_columns)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.save(tmp_path / "whole.npy", array)
    first = ArrayFile(tmp_path / "parts.npy", "<f4", num_columns, 0)
    first.append(array[:20])
    assert first.flush() == (tmp_path / "parts.npy").stat().st_size
    first.file.close()
    second = ArrayFile(tmp_path / "parts.npy", "<f4", num_columns, 20)
    second.append(array[20:])
    second.complete()
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
