"""Readings of a trained model: curves and absences are what a changed copy of the model scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from embtrim.compaction.low_rank import mean_of
from embtrim.methods import readings as module
from embtrim.methods.readings import CODE_LEVELS, ROW_SHARES, Curve, Readings, _edges, code_errors, read, row_energies
from embtrim.tables.codes import as_coded, codes_of
from embtrim.tables.packing import fit_codes
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.row_scores import RowScores
from embtrim.tasks.sites import weights_by_table
from embtrim.tasks.task import Task
from embtrim.testing.toys import TASKS, foreign_task, zoo_task
from embtrim.training.evaluation import predict_logits

CURVES = ("rows", "widths", "bits")


def score_with(
    task: Task,
    change: Callable[[str, Tensor], Tensor],
    change_first: Callable[[str, Tensor], Tensor] = lambda _, first: first,
) -> float:
    """Validation score of a copy of the task's model whose tables, and first-order weights (V, 1), are changed."""
    copied = copy.copy(task)
    copied.model = copy.deepcopy(task.model)
    for name, weight in weights_by_table(copied.sites(copied.model)).items():
        weight.copy_(change(name, weight))
    first_order = copied.first_order()
    for name, first_V in ({} if first_order is None else first_order.weights).items():
        first_V.copy_(change_first(name, first_V[:, None])[:, 0])
    return copied.valid_score(copied.model)


@pytest.fixture(scope="module")
def planted_readings(planted: CTRTask) -> Readings:
    return read(planted)


class TestCurve:
    """Loss of the score against an error, between measured points."""

    CURVE = Curve((0.0, 1.0, 3.0), (0.0, 0.1, 0.4), (8.0, 4.0, 2.0))

    def test_losses_between_points_by_hand(self):
        assert [self.CURVE.loss(error) for error in (0.0, 0.5, 1.0, 2.0, 3.0)] == pytest.approx(
            [0, 0.05, 0.1, 0.25, 0.4]
        )
        assert self.CURVE.loss(99.0) == pytest.approx(0.4), "beyond the last point nothing is known"

    def test_rates_are_slopes_from_no_error_on(self):
        assert self.CURVE.rate(2.0) == pytest.approx(0.25 / 2)
        assert self.CURVE.rate(3.0) == pytest.approx(0.4 / 3)
        assert self.CURVE.rate(0.0) == self.CURVE.rate(0.2) == pytest.approx(0.1), "never below the first point"

    def test_a_curve_without_loss_still_prefers_less_error(self):
        flat = Curve((0.0, 2.0), (0.0, 0.0), (8.0, 4.0))
        assert flat.rate(2.0) == pytest.approx(module.LEAST_LOSS / 2)
        assert Curve((0.0,), (0.0,), (1.0,)).rate(0.0) > 0, "a model of one column has no widths to try"

    def test_points_are_put_in_order_and_made_to_rise(self):
        curve = module._rising((4.0, 2.0, 1.0), [2.0, 1.0, 3.0], [0.2, -0.1, 0.1], 8.0)
        assert curve == Curve((0.0, 1.0, 2.0, 3.0), (0.0, 0.0, 0.2, 0.2), (8.0, 2.0, 4.0, 1.0))


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_curves_start_at_nothing_and_never_fall(make: Callable[[], Task]):
    task = make()
    before, training = copy.deepcopy(task.model.state_dict()), task.model.training
    found = read(task)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    assert task.model.training == training
    for name in CURVES:
        curve = getattr(found, name)
        assert (curve.errors[0], curve.losses[0]) == (0.0, 0.0)
        assert (np.diff(curve.errors) >= 0).all()
        assert (np.diff(curve.losses) >= 0).all()
        assert len(curve.errors) == len(curve.losses) == len(curve.settings)
    assert found.rows.settings == (1.0, *ROW_SHARES)
    assert found.bits.settings == (32, *CODE_LEVELS)
    widest = max(table.width for table in task.full_plan().tables)
    assert found.widths.settings == tuple(float(widest >> step) for step in range(widest.bit_length()))
    assert found.score == task.valid_score(task.model)
    assert found.error > 0
    for table in task.full_plan().tables:
        reading = found.tables[table.name]
        assert reading.energies.scores.shape == (table.num_rows,)
        assert (reading.energies.scores >= 0).all()
        assert reading.lost_D.shape == (table.width + 1,)
        assert (np.diff(reading.lost_D) <= 0).all()
        assert reading.lost_D[-1] == 0
        assert reading.noise[4] >= reading.noise[8] >= 0
    summary = found.summary()
    assert [point["loss"] for point in summary["curves"]["rows"]] == list(found.rows.losses)


def test_every_point_is_what_a_changed_copy_scores(planted: CTRTask, planted_readings: Readings):
    found, weights = planted_readings, weights_by_table(planted.sites(planted.model))
    counts = planted.row_counts()
    full = planted.valid_score(planted.model)

    def loss_at(curve: Curve, setting: float) -> float:
        return curve.losses[curve.settings.index(setting)]

    needless = [name for name, table in found.tables.items() if table.absence is not None and table.absence <= 0]
    assert needless == ["noise"], "it reads its mean throughout"
    needed = {name: table.energies.scores for name, table in found.tables.items() if name not in needless}
    ranked = np.sort(np.concatenate(list(needed.values())))[::-1]
    losses, errors = [], []
    for share in ROW_SHARES:
        most = ranked[int(share * len(ranked))] if share else np.inf

        def without(name: str, weight: Tensor, most: float = most) -> Tensor:
            dropped = torch.from_numpy(found.tables[name].energies.scores <= (most if name in needed else np.inf))
            return torch.where(dropped[:, None], mean_of(weight, counts[name]), weight)

        losses.append(full - score_with(planted, without))
        errors.append(sum(energy_V[energy_V <= most].sum() for energy_V in needed.values()))
    assert np.maximum.accumulate(np.maximum(0, losses)) == pytest.approx([loss_at(found.rows, s) for s in ROW_SHARES])
    assert found.rows.errors[1:] == pytest.approx(errors)

    losses = []
    for width in (4, 2, 1):

        def narrow(name: str, weight: Tensor, width: int = width) -> Tensor:
            basis = found.bases[name]
            return weight @ basis.encode_DD[:, :width] @ basis.decode_DD[:width]

        losses.append(full - score_with(planted, narrow))
        error = found.widths.errors[found.widths.settings.index(width)]
        assert error == pytest.approx(sum(table.lost_D[width] for table in found.tables.values()))
    assert np.maximum.accumulate(np.maximum(0, losses)) == pytest.approx(
        [loss_at(found.widths, s) for s in (4, 2, 1)], abs=1e-6
    )

    def coded(name: str, weight: Tensor) -> Tensor:
        scale, offset = fit_codes(weight, 4, torch.from_numpy(counts[name]))
        return codes_of(weight, scale, offset, 4) * scale + offset

    losses = [full - score_with(planted, coded), loss_at(found.bits, 8)]
    assert loss_at(found.bits, 4) == pytest.approx(max(0.0, *losses))
    for name, table in found.tables.items():

        def gone(of: str, weight: Tensor, name: str = name) -> Tensor:
            return mean_of(weight, counts[of]).expand_as(weight) if of == name else weight

        alone = full - score_with(planted, gone)
        assert table.absence == pytest.approx(alone)
    assert set(weights) == set(found.tables)


def test_first_order_weights_count_as_what_rows_hold():
    """A table whose embeddings say nothing is still missed for its first-order weights."""
    task = zoo_task()
    model = task.model
    first_order = task.first_order()
    assert first_order is not None
    name = next(iter(first_order.weights))
    with torch.no_grad():
        weights_by_table(task.sites(model))[name].zero_()
    counts, before = task.row_counts(), first_order.weights[name].clone()
    first_order, found = task.first_order(), read(task)
    assert torch.equal(first_order.weights[name], before)

    def gone(of: str, weight: Tensor) -> Tensor:
        return mean_of(weight, counts[of]).expand_as(weight) if of == name else weight

    full = task.valid_score(model)
    absence = full - score_with(task, gone, gone)
    assert found.tables[name].absence == pytest.approx(absence)
    assert absence != pytest.approx(full - score_with(task, gone)), "the embeddings alone say nothing"
    labels = task.data.split("valid").labels
    residual = 1 / (1 + np.exp(-predict_logits(model, task.data, "valid").astype(float))) - labels
    assert first_order.sensitivity == pytest.approx(np.square(residual).mean(), rel=1e-4)
    mean = np.average(before.double(), weights=counts[name])
    by_hand = first_order.sensitivity * counts[name] * (before.double().numpy() - mean) ** 2
    assert found.tables[name].energies.scores == pytest.approx(by_hand / (2 * len(task.data.split("train"))), rel=1e-3)


class FakeReader:
    """Scores sets of absent tables by a rule."""

    def __init__(self, loss_of: Callable[[frozenset[str]], float]) -> None:
        self.loss_of, self.asked = loss_of, 0
        self.bases = dict.fromkeys("abcd")
        tables = [SimpleNamespace(name=name, num_rows=10, width=2) for name in "abcd"]
        self.task = SimpleNamespace(full_plan=lambda: SimpleNamespace(tables=tables))

    def absent(self, names: Sequence[str]) -> dict[str, None]:
        return dict.fromkeys(names)

    def losses(self, what: str, changes: list[dict[str, None]]) -> list[float]:
        self.asked += len(changes)
        return [self.loss_of(frozenset(change)) for change in changes]


def test_tables_that_carry_one_signal_are_needless_but_for_one():
    def loss_of(gone: frozenset[str]) -> float:
        return {"a": -0.02, "b": -0.01, "c": 0.0, "d": 0.3}[min(gone, key="acbd".index)] + 0.1 * ({"a", "b"} <= gone)

    losses, needless = module._absences(FakeReader(loss_of))
    assert needless == ["a", "c"]
    assert losses == pytest.approx({"a": -0.02, "b": 0.1, "c": 0.0, "d": 0.3})


def test_tables_that_are_needless_together_take_one_more_score():
    reader = FakeReader(lambda gone: 0.3 if "d" in gone else -0.01)
    losses, needless = module._absences(reader)
    assert sorted(needless) == ["a", "b", "c"]
    assert losses["b"] == -0.01
    assert reader.asked == 5


def test_errors_of_rows_and_codes_are_in_one_unit(planted: CTRTask, planted_readings: Readings):
    """phi n ||e - what it reads||^2 / 2N, added up by hand over the embedded training data."""
    weights, arrays = weights_by_table(planted.sites(planted.model)), planted.data.split("train")
    num_rows = len(arrays)
    for number, (name, weight) in enumerate(weights.items()):
        reading, basis = planted_readings.tables[name], planted_readings.bases[name]
        ids = torch.from_numpy(arrays.ids[:, number].astype(np.int64))
        embedded, phi = weight[ids].double(), basis.sensitivity
        assert basis.mean_D.double() == pytest.approx(embedded.mean(0), abs=1e-6)
        lost = phi * (embedded - basis.mean_D).square().sum(1) / (2 * num_rows)
        by_row = np.bincount(ids, lost, minlength=len(weight))
        assert reading.energies.scores == pytest.approx(by_row, rel=1e-4)
        count_V = torch.bincount(ids, minlength=len(weight))
        for bits in CODE_LEVELS:
            scale, offset = fit_codes(weight, bits, count_V)
            stored = (codes_of(weight, scale, offset, bits) * scale + offset)[ids]
            noise = phi * float((stored - embedded).square().sum()) / (2 * num_rows)
            assert reading.noise[bits] == pytest.approx(noise, rel=1e-3)
            own = weight @ basis.encode_DD
            scale, offset = fit_codes(own, bits, count_V)
            errors = (as_coded(own, scale, offset, bits) - own)[ids].double().square().sum(0).numpy()
            by_width = np.append(0.0, np.cumsum(basis.gain_D * errors)) / (2 * num_rows)
            assert reading.coordinate_noise[bits] == pytest.approx(by_width, rel=1e-3)
        segments = reading.segments
        order = np.argsort(-reading.energies.scores, kind="stable")
        uses = np.bincount(ids, minlength=len(weight))[order]
        ends = np.cumsum(segments.rows_S)
        assert ends[-1] == len(weight)
        assert segments.uses_S.tolist() == [part.sum() for part in np.split(uses, ends[:-1])]


def test_segments_end_where_the_energy_has_fallen_to_a_quarter():
    """And where they and what follows have rows enough to pay for scales of their own."""
    energies = np.array([64.0] * 40 + [15.0] * 2 + [3.0] * 50 + [0.5] * 40 + [0.0] * 10)
    assert [n for n, _ in _edges(RowScores(energies))] == [0, 40, 92, 142]
    assert [n for n, _ in _edges(RowScores(np.ones(5)))] == [0, 5]
    assert [n for n, _ in _edges(RowScores(np.zeros(80)))] == [0, 80]


def test_a_table_of_noise_is_not_missed(planted_readings: Readings):
    absences = {name: table.absence for name, table in planted_readings.tables.items()}
    assert absences["noise"] <= planted_readings.error / 2
    assert absences["strong"] > 10 * planted_readings.error
    assert absences["strong"] > absences["weak"] > absences["noise"]


def test_small_tables_are_not_read_alone():
    """Of 253 rows in all 200 are noise: below a fiftieth of the bytes no table is worth a pass of its own."""
    task = zoo_task()
    assert all(table.absence is not None for table in read(task).tables.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGE_PART", 0.5)
        found = read(task)
    assert [name for name, table in found.tables.items() if table.absence is not None] == ["noise"]
    assert set(found.summary()["absences"]) == {"noise"}


@pytest.mark.parametrize("make", [zoo_task, foreign_task])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(make: Callable[[], Task], monkeypatch):
    for num_scores in (0, 1, 5, 12):
        task, scored = make(), []
        score = task.valid_score
        before = copy.deepcopy(task.model.state_dict())

        def interrupted(model, score=score, scored=scored, num_scores=num_scores):
            if len(scored) == num_scores:
                raise KeyboardInterrupt
            scored.append(score(model))
            return scored[-1]

        monkeypatch.setattr(type(task), "valid_score", lambda _self, model, of=interrupted: of(model))
        with pytest.raises(KeyboardInterrupt):
            read(task)
        monkeypatch.undo()
        assert len(scored) == num_scores
        for name, value in task.model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was changed after {num_scores} scores"


def test_an_exception_in_the_backward_pass_leaves_no_gate(monkeypatch):
    task = zoo_task()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(task)
    assert (task.model.tables.slot_gate, task.model.tables.row_gate) == (None, None)


def test_the_sample_is_the_same_at_every_call(planted: CTRTask, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 100)
    monkeypatch.setattr(module, "MOST_ROWS", 300)
    asked, sampled = [], CTRTask.sampled

    def noted(task: CTRTask, max_rows: int) -> CTRTask:
        asked.append((max_rows, sampled(task, max_rows)))
        return asked[-1][1]

    monkeypatch.setattr(CTRTask, "sampled", noted)
    first = read(planted)
    np.random.seed(7)  # noqa: NPY002 (somebody else's code may draw from it)
    torch.manual_seed(7)
    second = read(planted)
    assert [rows for rows, _ in asked] == [300, 300]
    ids = [task.data.split("valid").ids for _, task in asked]
    assert len(ids[0]) == 300
    np.testing.assert_array_equal(*ids)
    for name in ("score", "error", *CURVES):
        assert getattr(first, name) == getattr(second, name)
    assert first.score != planted.valid_score(planted.model), "the sample is a part of the validation rows"
    asked.clear()
    monkeypatch.setattr(module, "MOST_ROWS", 10_000)
    read(planted)
    assert [rows for rows, _ in asked] == [6400 // 16], "a part of the training rows"


def test_a_sample_keeps_the_order_and_all_columns(wide_data):
    from embtrim.models import DeepFM

    task = CTRTask(DeepFM(wide_data.schema, embedding_dim=4, hidden_units=(4,)), wide_data)
    small, whole = task.sampled(50).data.split("valid"), wide_data.split("valid")
    assert len(small) == 50
    places = [int(np.flatnonzero((whole.dense == row).all(1))[0]) for row in small.dense]
    assert places == sorted(places)
    np.testing.assert_array_equal(small.ids, whole.ids[places])
    np.testing.assert_array_equal(small.labels, whole.labels[places])
    assert task.sampled(len(whole)) is task
    assert task.data.split("valid") is whole


def test_a_task_with_a_score_of_its_own_is_read_in_this_score():
    task = foreign_task()
    batches = list(task.batches("valid"))

    def accuracy(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(
                np.mean([float(((model(ids) > 0) == labels.bool()).float().mean()) for ids, labels in batches])
            )

    task.score = accuracy
    found = read(task)
    assert found.score == accuracy(task.model)
    assert found.error == 0.0, "a score says nothing of its error"
    means = {name: basis.mean_D for name, basis in found.bases.items()}
    worst = score_with(task, lambda name, weight: means[name].expand_as(weight))
    assert found.rows.losses[-1] >= max(0.0, found.score - worst) - 1e-9


def test_row_energies_and_code_errors_of_no_rows():
    assert row_energies(torch.zeros(0, 3), np.zeros(0, np.int64), torch.zeros(3)).shape == (0,)
    assert code_errors(torch.zeros(0, 3), np.zeros(0, np.int64), 4).tolist() == [0.0] * 3
    assert code_errors(torch.ones(2, 3) / 3, np.ones(2, np.int64), 32).tolist() == [0.0] * 3
    halves = torch.ones(2, 3) / 3
    lost = float((halves.half().float() - halves).double().square().sum())
    assert code_errors(halves, np.ones(2, np.int64), 16).sum() == pytest.approx(lost)
