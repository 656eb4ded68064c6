"""Fused kernels against their definition in plain torch."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embtrim.errors import DataError
from embtrim.models import DeepFM
from embtrim.tables import kernels
from embtrim.tables.kernels import torch as plain
from embtrim.tables.kernels.torch import Expansion
from embtrim.tables.row_optimizers import RowAdagrad, RowAdam, RowSGD
from embtrim.training.fitting import fit
from tests.tables.test_row_optimizers import mixed_tables

pytest.importorskip("numba")
from embtrim.tables.kernels import fused


@pytest.fixture(autouse=True)
def _nothing_is_turned_off(monkeypatch):
    monkeypatch.delenv("EMBTRIM_KERNELS", raising=False)


# ---- kernels one by one --------------------------------------------------------------------------------------------


@st.composite
def batches(draw) -> tuple[Expansion, Tensor, int, Tensor | None, torch.Generator]:
    """Groups of columns in any order and of widths from 0, last columns that may belong to no group; storage rows (B, C)."""
    widths = draw(st.lists(st.sampled_from([0, 1, 3, 4]), min_size=1, max_size=3))
    counts = draw(st.lists(st.integers(1, 3), min_size=len(widths), max_size=len(widths)))
    pooled = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    num_samples, num_columns = draw(st.integers(1, 5)), sum(counts)
    order = torch.randperm(num_columns, generator=generator) if len(widths) > 1 else torch.arange(num_columns)
    columns = order.split(counts)
    # Up to 700 million: rows of one, two and three digits of the radix sort, with some in one digit and not in another.
    rows_of_group = draw(st.sampled_from([1, 2, 70, 500, 9_000, 70_000_000, 700_000_000]))
    rows_BC = torch.empty(num_samples, num_columns, dtype=torch.int32)
    for number, own in enumerate(columns):
        drawn = torch.randint(rows_of_group, (num_samples, len(own)), generator=generator)
        rows_BC[:, own] = (drawn + number * rows_of_group).int()
    grouped = len(widths) - (draw(st.booleans()) and len(widths) > 1)
    outputs, num_outputs = [], 0
    for width, count in zip(widths[:grouped], counts, strict=False):
        # One block of output columns an id column; or one that all share, which needs factors.
        starts = [num_outputs + (0 if pooled else i * width) for i in range(count)]
        outputs.append(torch.tensor([s + w for s in starts for w in range(width)], dtype=torch.int64))
        num_outputs += width * count
    identity = len(columns) == 1 and not pooled
    expansion = Expansion(num_samples, num_outputs, columns, outputs, identity)
    pool_N = torch.rand(rows_BC.numel(), generator=generator) if pooled else None
    return expansion, rows_BC, len(columns) * rows_of_group, pool_N, generator


@settings(max_examples=60, deadline=None)
@given(batches())
def test_lookups_are_as_in_plain_torch(batch):
    expansion, rows_BC, num_rows, pool_N, generator = batch
    expected = plain.distinct_rows(expansion, rows_BC, num_rows)
    found = fused.distinct_rows(expansion, rows_BC, num_rows)
    assert torch.equal(expected.rows_U, torch.unique(rows_BC))
    for name in ("rows_U", "inverse_N", "order_N", "starts_U"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name

    num_groups = len(expansion.outputs)
    edges = [int((expected.rows_U < i * (num_rows // len(expansion.columns))).sum()) for i in range(num_groups + 1)]
    lows = edges[:-1]
    widths = [len(o) // len(c) for o, c in zip(expansion.outputs, expansion.columns, strict=False)]
    sources = [
        torch.randn(high - low, width, generator=generator)
        for low, high, width in zip(lows, edges[1:], widths, strict=True)
    ]
    first_U = torch.randn(len(expected.rows_U), generator=generator)
    for first_order_U in (first_U, None):
        expected_BS, expected_B = plain.expand(expansion, expected, lows, pool_N, sources, first_order_U)
        found_BS, found_B = fused.expand(expansion, found, lows, pool_N, sources, first_order_U)
        torch.testing.assert_close(found_BS, expected_BS)
        assert (found_B is None) == (first_order_U is None)
        if found_B is not None:
            torch.testing.assert_close(found_B, expected_B)


@pytest.mark.parametrize("weights", [None, "rows", "values"])
@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_errors_of_codes_are_as_in_plain_torch(num_rows, weights, monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_ROWS", 64)
    generator = torch.Generator().manual_seed(0)
    values_NW = torch.randn(num_rows, 6, generator=generator)
    scale_KW, offset_KW = torch.rand(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    scale_KW[0, 0] = 0  # a column of one number
    counts = None if weights is None else torch.rand(num_rows, 6 if weights == "values" else 1, generator=generator)
    for bits in (2, 8):
        given = (values_NW, scale_KW, offset_KW, bits, counts)
        found_KW, expected_KW = fused.code_errors(*given), plain.code_errors(*given)
        assert found_KW.dtype == expected_KW.dtype == torch.float64
        torch.testing.assert_close(found_KW, expected_KW, rtol=1e-5, atol=1e-9)
        assert bool((found_KW > 0).any()) == (num_rows > 0)


@pytest.mark.parametrize(
    "num_rows, distinct, width", [(1, 1, 4), (50, 0, 4), (50, 20, 1), (300, 300, 3), (300, 40, 16)]
)
@pytest.mark.parametrize("l2, decay", [(0.0, 1.0), (0.1, 1.0), (0.0, 0.9)])
def test_updates_are_as_in_plain_torch(num_rows, distinct, width, l2, decay):
    generator = torch.Generator().manual_seed(0)
    weight, mean = torch.randn(2, num_rows, width, generator=generator)
    square, square_R = torch.rand(num_rows, width, generator=generator), torch.rand(num_rows, generator=generator)
    rows_U = torch.randperm(num_rows, generator=generator)[:distinct].sort().values
    grad_UW = torch.randn(distinct, width, generator=generator)
    adam = {"step": 3, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "l2": l2, "decay": decay}
    adagrad = {"lr": 0.1, "eps": 1e-8, "l2": l2, "decay": decay}
    for name, state, more in (
        ("adam_rows_", (weight, mean, square), adam),
        ("adagrad_rows_", (weight, square_R), adagrad),
        ("sgd_rows_", (weight,), {"lr": 0.1, "decay": decay}),
    ):
        expected, found = ([x.clone() for x in state] for _ in range(2))
        getattr(plain, name)(*expected, rows_U, grad_UW, **more)
        getattr(fused, name)(*found, rows_U, grad_UW, **more)
        torch.testing.assert_close(found, expected)
        assert distinct == 0 or not torch.equal(found[0], weight)


# ---- whole trainings -----------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "adam": lambda tables: RowAdam(tables, l2=1e-3),
    "adamw": lambda tables: RowAdam(tables, l2=1e-3, decoupled=True),
    "adagrad": lambda tables: RowAdagrad(tables, l2=1e-3),
    "sgd": lambda tables: RowSGD(tables, l2=1e-2),
}


def trained(name: str) -> Tensor:
    """All weights after steps on random batches; some steps take two passes, one has no first-order gradients."""
    tables = mixed_tables(multi_valued=True)
    optimizer = OPTIMIZERS[name](tables)
    generator = torch.Generator().manual_seed(1)
    sizes = [40, 7, 40, 25, 9, 50, 50, 50, 40, 40]
    for step in range(12):
        for _ in range(1 + step % 2):
            ids = torch.stack([torch.randint(-1, n, (17,), generator=generator) for n in sizes], 1).int()
            views = tables(ids)
            slope = torch.randn(views.concat.shape, generator=generator)
            loss = (views.concat * slope).sum() + views.concat.square().sum()
            (loss if step == 5 else loss + (views.first_order * slope[:, 0]).sum()).backward()
        optimizer.step()
    tables.settle()
    return torch.cat([tables.weight.detach(), tables.first_order.detach()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_as_in_plain_torch_and_the_same_each_time(name, monkeypatch):
    found = trained(name)
    assert torch.equal(found, trained(name))
    monkeypatch.setenv("EMBTRIM_KERNELS", "torch")
    torch.testing.assert_close(found, trained(name), rtol=1e-3, atol=1e-5)


def test_the_number_of_threads_changes_nothing(restored_threads):
    torch.set_num_threads(1)
    alone = trained("adam")
    torch.set_num_threads(2)
    assert torch.equal(trained("adam"), alone)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_training_does_not_go_on_with_other_kernels(data, tmp_path, monkeypatch):
    """Kernels round differently, so the training would end elsewhere."""
    model = DeepFM(data.schema, embedding_dim=2, hidden_units=(4,))
    initial = copy.deepcopy(model)
    fit(model, data, epochs=1, checkpoint=tmp_path / "state.safetensors")
    monkeypatch.setenv("EMBTRIM_KERNELS", "torch")
    with pytest.raises(DataError, match='kernels = "fused", now it is "torch"'):
        fit(initial, data, epochs=1, checkpoint=tmp_path / "state.safetensors")


# ---- which are used ------------------------------------------------------------------------------------------------


def test_fused_kernels_serve_fp32_on_cpu_unless_turned_off(monkeypatch):
    assert kernels.kernels_for(torch.zeros(1)) is fused
    assert kernels.kernels_for(torch.zeros(1, dtype=torch.float64)) is plain
    assert kernels.kernels_for(torch.zeros(1, device="meta")) is plain
    monkeypatch.setenv("EMBTRIM_KERNELS", "torch")
    assert kernels.kernels_for(torch.zeros(1)) is plain


def test_plain_torch_serves_where_numba_is_missing(monkeypatch):
    kernels._fused.cache_clear()
    monkeypatch.setitem(sys.modules, "embtrim.tables.kernels.fused", None)
    monkeypatch.delattr(kernels, "fused")
    try:
        assert kernels.kernels_for(torch.zeros(1)) is plain
    finally:
        kernels._fused.cache_clear()


@pytest.mark.slow
def test_numba_is_imported_by_training_alone_and_leaves_torch_its_threads():
    code = (
        "import sys, torch, embtrim\n"
        "from embtrim.tables.row_optimizers import RowSGD\n"
        "from embtrim.tables.embedding_tables import full_tables\n"
        "tables = full_tables(embtrim.Schema.from_sizes([5]), 2).eval()\n"
        "tables(torch.zeros(1, 1, dtype=torch.int32))\n"
        "assert 'numba' not in sys.modules\n"
        "torch.set_num_threads(1)\n"
        "optimizer = RowSGD(tables)\n"
        "assert 'numba' in sys.modules\n"
        "tables.train()(torch.zeros(1, 1, dtype=torch.int32)).concat.sum().backward()\n"
        "optimizer.step()\n"
        "assert torch.get_num_threads() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_kernels_compile_where_no_folder_can_be_written_to():
    code = (
        "import tempfile\n"
        "def refuse(**settings):\n"
        "    raise PermissionError('read-only')\n"
        "tempfile.TemporaryFile = refuse\n"  # what numba tries a folder with
        "import torch\n"
        "from embtrim.tables import kernels\n"
        "fused = kernels.kernels_for(torch.zeros(1))\n"
        "assert fused.__name__ == 'embtrim.tables.kernels.fused'\n"
        "weight = torch.zeros(3, 2)\n"
        "fused.sgd_rows_(weight, torch.tensor([1]), torch.ones(1, 2), lr=1.0, decay=1.0)\n"
        "assert weight.tolist() == [[0, 0], [-1, -1], [0, 0]]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.count("no locator available") == 1
