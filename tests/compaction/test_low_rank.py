"""Low-rank starts: the compact model predicts what the full one predicts with approximated tables."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embtrim.compaction import low_rank
from embtrim.compaction.compacting import compact
from embtrim.compaction.low_rank import (
    Basis,
    _basis,
    _moments,
    _own_basis,
    bases,
    coordinates_of,
    stored_coordinates,
    trained_rows,
)
from embtrim.errors import EmbtrimError
from embtrim.models import DCN, DLRM, FM, FNN, IPNN, DCNv2, DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Block
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.sharing import ALONE
from embtrim.tasks.sites import weights_by_table
from embtrim.tasks.task import Task
from embtrim.testing.toys import TASKS, foreign_task, odd_task, pooled_task
from embtrim.training.evaluation import predict_logits
from embtrim.training.settings import TrainConfig

WIDTH = 6


# ---- the basis ---------------------------------------------------------------------------------------------------------


def own_basis(sensitivity_DD: Tensor, weight_VD: Tensor, count_V: np.ndarray, num_rows: int) -> Basis:
    return _own_basis(sensitivity_DD, *_moments(weight_VD, count_V, num_rows, ALONE), weight_VD)


def made_basis(seed: int = 0, num_rows: int = 100) -> tuple[Basis, Tensor, Tensor, np.ndarray]:
    """A basis with the sensitivity, the table and the counts that it was made from."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64) * torch.arange(1, WIDTH + 1)
    root = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    count_V = np.random.default_rng(seed).integers(0, 9, 20)
    sensitivity_DD = root @ root.T
    return own_basis(sensitivity_DD, weight_VD, count_V, num_rows), sensitivity_DD, weight_VD, count_V


def second_order_loss(sensitivity_DD: Tensor, error_VD: Tensor, count_V: np.ndarray, num_rows: int) -> float:
    """sum_r n_r d_r^T G d_r / 2N, row by row."""
    return sum(
        float(n * d @ sensitivity_DD @ d) / (2 * num_rows) for n, d in zip(count_V.tolist(), error_VD, strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
def test_all_coordinates_lose_nothing(seed: int):
    basis, *_ = made_basis(seed)
    torch.testing.assert_close(basis.encode_DD @ basis.decode_DD, torch.eye(WIDTH).double())
    identity = own_basis(torch.eye(WIDTH).double(), torch.randn(20, WIDTH), np.ones(20, np.int64), 20)
    torch.testing.assert_close(identity.encode_DD @ identity.decode_DD, torch.eye(WIDTH))
    assert basis.lost_D[-1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_w_coordinates_leave_the_loss_that_is_said(seed: int):
    basis, sensitivity_DD, weight_VD, count_V = made_basis(seed)
    losses = []
    for width in range(WIDTH + 1):
        narrow = weight_VD @ basis.encode_DD[:, :width] @ basis.decode_DD[:width]
        losses.append(second_order_loss(sensitivity_DD, narrow - weight_VD, count_V, 100))
    assert basis.lost_D == pytest.approx(losses, rel=1e-6, abs=1e-9)
    assert (np.diff(basis.lost_D) <= 0).all()
    mean = np.average(weight_VD, axis=0, weights=count_V)
    assert basis.mean_D == pytest.approx(mean)
    assert basis.sensitivity == pytest.approx(float(sensitivity_DD.trace()) / WIDTH)


@pytest.mark.parametrize("seed", range(3))
def test_coordinates_of_a_rotation_leave_the_loss_that_is_said(seed: int):
    """Also of noise: an error of a coordinate costs half its gain, times the mean square."""
    _, sensitivity_DD, weight_VD, count_V = made_basis(seed)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)).double())[0]
    basis = _basis(rotation, sensitivity_DD, *_moments(weight_VD, count_V, 100, ALONE), weight_VD, columns=None)
    for width in range(WIDTH + 1):
        narrow = weight_VD @ basis.encode_DD[:, :width] @ basis.decode_DD[:width]
        loss = second_order_loss(sensitivity_DD, narrow - weight_VD, count_V, 100)
        assert basis.lost_D[width] == pytest.approx(loss, rel=1e-6, abs=1e-9)
    for column in range(WIDTH):
        error = torch.zeros_like(weight_VD)
        error[:, column] = torch.randn(20, generator=torch.Generator().manual_seed(column)).double()
        loss = second_order_loss(sensitivity_DD, error @ basis.decode_DD, count_V, 100)
        mean_square = float((torch.from_numpy(count_V) * error[:, column].square()).sum()) / 100
        assert basis.gain_D[column] * mean_square / 2 == pytest.approx(loss)


def test_no_other_projection_leaves_less():
    basis, sensitivity_DD, weight_VD, count_V = made_basis()
    generator = torch.Generator().manual_seed(9)
    for width in (1, 3, 5):
        for scale in (1e-3, 0.1, 1.0):
            encode = basis.encode_DD[:, :width] + scale * torch.randn(WIDTH, width, generator=generator).double()
            decode = basis.decode_DD[:width] + scale * torch.randn(width, WIDTH, generator=generator).double()
            other = second_order_loss(sensitivity_DD, weight_VD @ encode @ decode - weight_VD, count_V, 100)
            assert other >= basis.lost_D[width] - 1e-9


def test_directions_that_the_loss_does_not_feel_are_kept_finite():
    weight_VD, count_V = torch.randn(20, WIDTH), np.ones(20, np.int64)
    for sensitivity_DD in (torch.zeros(WIDTH, WIDTH).double(), torch.diag(torch.tensor([1.0, *[0.0] * 5])).double()):
        basis = own_basis(sensitivity_DD, weight_VD, count_V, 20)
        torch.testing.assert_close(basis.encode_DD @ basis.decode_DD, torch.eye(WIDTH))
        assert np.isfinite(basis.lost_D).all()
    assert basis.encode_DD[:, 0].abs().argmax() == 0, "the one direction that is felt comes first"


def test_large_tables_are_read_in_parts(monkeypatch):
    whole, *_ = made_basis()
    monkeypatch.setattr(low_rank, "CHUNK_ROWS", 3)
    in_parts, *_ = made_basis()
    assert in_parts.lost_D == pytest.approx(whole.lost_D)
    torch.testing.assert_close(in_parts.mean_D, whole.mean_D)


# ---- zoo models --------------------------------------------------------------------------------------------------------

ZOO = {
    "deepfm": (DeepFM, "project", {"hidden_units": (8,)}),
    "deepfm, shared": (DeepFM, "scatter", {"hidden_units": (8,)}),
    "ipnn, shared": (IPNN, "scatter", {"hidden_units": (8,)}),
    "fm, shared": (FM, "scatter", {}),
    "dlrm, columns": (DLRM, "scatter", {"bottom_units": (8,), "hidden_units": (8,)}),
    "dlrm": (DLRM, "project", {"bottom_units": (8,), "hidden_units": (8,)}),
    "ipnn": (IPNN, "project", {"hidden_units": (8,)}),
    "fm": (FM, "project", {}),
    "fnn": (FNN, "concat", {"hidden_units": (8,)}),
    "dcn": (DCN, "concat", {"hidden_units": (8,)}),
    "dcnv2": (DCNv2, "concat", {"hidden_units": (8,)}),
}


def zoo_task_of(name: str, data: Any) -> CTRTask:
    model_class, _, settings = ZOO[name]
    model = model_class(data.schema, embedding_dim=WIDTH, init_std=0.4, seed=3, **settings)
    generator = torch.Generator().manual_seed(1)
    if model.tables.first_order is not None:
        with torch.no_grad():
            model.tables.first_order.normal_(0, 0.3, generator=generator)
    return CTRTask(model, data, TrainConfig(batch_size=256, precision="fp32"))


def mixed_plan(full: SizePlan, alignment: Alignment, widths: tuple[int, ...]) -> SizePlan:
    """Tables of several widths; every other one loses a third of its rows, among them the first."""
    tables = []
    for number, (table, width) in enumerate(zip(full.tables, widths, strict=True)):
        width = min(width, table.width)
        rows = None if number % 2 else np.arange(table.num_rows // 3, table.num_rows, dtype=np.int32)
        count = table.num_rows if rows is None else len(rows)
        block = Block(count, tuple(range(width)), alignment, rows)
        tables.append(dataclasses.replace(table, blocks=(block,)))
    return dataclasses.replace(full, tables=tuple(tables))


def approximated(task: Task, plan: SizePlan) -> Any:
    """A copy of the full model whose tables are what the compact model should read."""
    model = copy.deepcopy(task.model)  # before max_norm shortens rows that are read
    weights = weights_by_table(task.sites(model))
    trained, counts = trained_rows(task)
    found = bases(task, trained, counts, coordinates_of(task.model, plan))
    read, stored = weights_by_table(task.sites(task.model)), stored_coordinates(task.model, plan)
    for table in plan.tables:
        weight, basis = weights[table.name], found[table.name]
        dropped = torch.ones(table.num_rows, dtype=torch.bool)
        rows = table.blocks[0].rows
        dropped[slice(None) if rows is None else torch.from_numpy(rows).long()] = False
        uses = torch.from_numpy(counts[table.name])[:, None] * dropped[:, None]
        mean_D = (trained[table.name] * uses).sum(0) / uses.sum()
        new = torch.where(dropped[:, None], mean_D, weight)
        if table.name in stored:
            new = torch.where(dropped[:, None], mean_D, read[table.name])
            new = new @ basis.encode_DD[:, stored[table.name]] @ basis.decode_DD[stored[table.name]]
        else:
            new = new * torch.isin(torch.arange(table.width), torch.tensor(table.columns))
        weight.copy_(new)
        if isinstance(task, CTRTask) and model.tables.first_order is not None:
            places = torch.from_numpy(model.tables.storage_rows(table.name, np.flatnonzero(dropped)))
            with torch.no_grad():
                first_order = model.tables.first_order[places]
                model.tables.first_order[places] = (first_order * uses[dropped, 0]).sum() / uses.sum()
    return model


@pytest.mark.parametrize("name", ZOO)
def test_a_compact_model_predicts_with_approximated_tables(name: str, wide_data):
    task = zoo_task_of(name, wide_data)
    before, full = copy.deepcopy(task.model.state_dict()), task.full_plan()
    plan = mixed_plan(full, ZOO[name][1], (2, 3, 1, WIDTH))
    small = compact(task.model, plan, init="low_rank", task=task)
    expected = predict_logits(approximated(task, plan), wide_data, "valid")
    found = predict_logits(small, wide_data.recode(plan), "valid")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
    inherited = predict_logits(compact(task.model, plan, init="inherit"), wide_data.recode(plan), "valid")
    assert np.abs(inherited - expected).max() > 1e-2, "selected columns would predict something else"
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    narrow = {table.name for table in plan.tables if table.output_width < WIDTH}
    stored = set(stored_coordinates(task.model, plan))
    if name in ("dcn", "dcnv2", "dlrm, columns"):
        assert not stored
    else:
        assert stored == ({table.name for table in plan.tables} if "shared" in name else narrow)


@pytest.mark.parametrize("name", ["dcn", "dcnv2"])
def test_a_model_that_reads_single_columns_keeps_selected_ones(name: str, wide_data):
    task = zoo_task_of(name, wide_data)
    plan = task.full_plan().with_columns({table.name: (1, 4) for table in task.full_plan().tables})
    small, kept = (compact(task.model, plan, init=init, task=task) for init in ("low_rank", "inherit"))
    for one, other in zip(small.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_that_keeps_everything_gives_the_model_back(name: str, wide_data):
    task = zoo_task_of(name, wide_data)
    small = compact(task.model, task.full_plan(), init="low_rank", task=task)
    np.testing.assert_array_equal(
        predict_logits(small, wide_data, "valid"), predict_logits(task.model, wide_data, "valid")
    )


def test_a_shared_rotation_reaches_the_columns_of_a_plan(wide_data):
    """Coordinates stand where the plan keeps columns, so that products of two tables meet the same coordinates."""
    task = zoo_task_of("deepfm", wide_data)
    names = [table.name for table in task.full_plan().tables]
    plan = task.full_plan().with_columns({name: (0, 2) if n % 2 else (2, 4) for n, name in enumerate(names)}, "scatter")
    assert stored_coordinates(task.model, plan)[names[0]] == [2, 4]
    expected = predict_logits(approximated(task, plan), wide_data, "valid")
    small = compact(task.model, plan, init="low_rank", task=task)
    np.testing.assert_allclose(predict_logits(small, wide_data.recode(plan), "valid"), expected, rtol=1e-3, atol=1e-4)


def test_shared_coordinates_are_one_rotation(wide_data):
    task = zoo_task_of("deepfm", wide_data)
    weights, counts = trained_rows(task)
    found = list(bases(task, weights, counts, "shared").values())
    for basis in found:
        torch.testing.assert_close(basis.encode_DD, found[0].encode_DD)
        torch.testing.assert_close(basis.encode_DD.T, basis.decode_DD)
        torch.testing.assert_close(basis.encode_DD @ basis.decode_DD, torch.eye(WIDTH), atol=1e-5, rtol=0)
        assert basis.columns is None


@pytest.mark.parametrize(("name", "alike"), [("dcn", False), ("dlrm, columns", True)])
def test_columns_come_in_the_order_of_their_loss(name: str, alike: bool, wide_data):
    task = zoo_task_of(name, wide_data)
    weights, counts = trained_rows(task)
    assert coordinates_of(task.model) == "columns"
    found = bases(task, weights, counts, "columns")
    own = bases(task, weights, counts, "own")
    for table, basis in found.items():
        assert basis.columns is not None
        assert sorted(basis.columns) == list(range(WIDTH))
        assert torch.equal(basis.encode_DD, torch.eye(WIDTH)[:, list(basis.columns)])
        assert basis.lost_D[0] == pytest.approx(own[table].lost_D[0], rel=1e-3)
    assert (len({basis.columns for basis in found.values()}) == 1) == alike


def test_low_rank_tables_may_have_few_bits(wide_data):
    task = zoo_task_of("deepfm", wide_data)
    plan = mixed_plan(task.full_plan(), "project", (2, 3, 3, WIDTH)).with_bits(16)
    small = compact(task.model, plan, init="low_rank", task=task)
    small.tables.quantize_()
    expected = predict_logits(approximated(task, plan), wide_data, "valid")
    np.testing.assert_allclose(predict_logits(small, wide_data.recode(plan), "valid"), expected, rtol=2e-2, atol=5e-3)


# ---- foreign modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [foreign_task, pooled_task, odd_task])
@pytest.mark.parametrize("alignment", ["project", "scatter"])
def test_a_foreign_module_predicts_with_approximated_tables(make, alignment: Alignment):
    task = make()
    before, training = copy.deepcopy(task.model.state_dict()), task.model.training
    plan = mixed_plan(task.full_plan(), alignment, (2, 3, 3)[: len(task.full_plan().tables)])
    small = compact(task.model, plan, init="low_rank", task=task)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert task.model.training == training
    model = approximated(task, plan)
    with torch.no_grad():
        for batch in task.batches("valid"):
            torch.testing.assert_close(small.eval()(batch[0]), model.eval()(batch[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_more_coordinates_are_nearer(name: str):
    task = TASKS[name]()
    full = task.full_plan()
    errors = []
    batch = next(iter(task.batches("valid")))
    with torch.no_grad():
        whole = task.loss(task.model.eval(), batch)
        for width in (1, 2, 3, 4):
            small = compact(task.model, mixed_widths(full, width), init="low_rank", task=task)
            errors.append(abs(float(task.loss(small.eval(), batch) - whole)))
    assert errors[-1] <= errors[0] + 1e-6


def mixed_widths(full: SizePlan, width: int) -> SizePlan:
    """All rows at one width, projected."""
    tables = tuple(
        dataclasses.replace(t, blocks=(Block(t.num_rows, tuple(range(min(width, t.width))), "project"),))
        for t in full.tables
    )
    return dataclasses.replace(full, tables=tables)


# ---- errors ------------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    task, other = foreign_task(), foreign_task()
    plan = task.full_plan()
    for settings in ({}, {"task": other}, {"task": task, "reads": {"head.0": ["user", "item", "item"]}}):
        with pytest.raises(EmbtrimError, match="init = 'low_rank' reads batches: give `task=`, the Task of this model"):
            compact(task.model, plan, init="low_rank", **settings)
    with pytest.raises(EmbtrimError, match="'scratch', 'initial', 'inherit' or 'low_rank', given 'warm'"):
        compact(task.model, plan, init="warm")
