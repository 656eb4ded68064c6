"""The curve, the budget "auto", and `max_loss` by prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import embtrim
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, ConfigError, EmbtrimError
from embtrim.experiments import steps, tolerance
from embtrim.experiments.curve import size_curve
from embtrim.experiments.records import Trained
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig, starts_of
from embtrim.experiments.steps import find_plan, shrink, train_full
from embtrim.experiments.tolerance import corrected, smallest_within
from embtrim.methods import curves
from embtrim.methods.curves import ALL, ROWS_AND_WIDTHS, STARTS, WIDTHS, best_within, curve_of, least_within
from embtrim.methods.guided import RECOVERY, GuidedConfig, plan_within
from embtrim.methods.readings import read
from embtrim.plan.budget import AUTO, Budget, parse_or_auto
from embtrim.plan.budget_limits import ROUNDED, amount_of
from embtrim.tasks.ctr_task import CTRTask
from embtrim.testing.toys import foreign_task, planted_data
from embtrim.training.settings import TrainConfig

pytestmark = pytest.mark.slow

CONFIG = RunConfig(
    model="fnn",
    hparams={"embedding_dim": 8, "hidden_units": [16]},
    train=TrainConfig(epochs=3, batch_size=256, learning_rate=3e-3, precision="fp32", embedding_l2=0.0),
    controls=(),
    tolerance=0.005,
)
BUDGETS = ("20%", "5%", "1%", "0.3%")


@pytest.fixture(scope="module")
def logs() -> EncodedDataset:
    return planted_data(num_rows=3000, noise_vocab=100)


@pytest.fixture(scope="module")
def full(logs: EncodedDataset) -> Trained:
    return train_full(logs, CONFIG)


@pytest.fixture(scope="module")
def task(full: Trained, logs: EncodedDataset) -> CTRTask:
    """With readings, as the steps of a run leave it."""
    task = CTRTask(full.model, logs, CONFIG.train)
    task.readings = read(task)
    return task


@pytest.fixture
def trained_full(full: Trained) -> Trained:
    """The full model without readings and lessons: what a run has after training."""
    return Trained(full.model, full.record)


class TestCurve:
    """One reading serves every budget and kind of plan."""

    def test_points_are_the_plans_that_a_search_makes(self, task: CTRTask) -> None:
        curve = curve_of(task, budgets=tuple(map(Budget.parse, BUDGETS)), tolerance=0.005)
        assert list(curve.lines) == [WIDTHS, ROWS_AND_WIDTHS, ALL]
        full_bytes = task.full_plan().num_bytes()
        for kind, bits in ((ROWS_AND_WIDTHS, 32), (ALL, "mixed")):
            points = curve.lines[kind]
            assert [point.budget for point in points] == [*BUDGETS]
            for point in points:
                config = GuidedConfig(start=point.start)  # type: ignore[arg-type]
                found = plan_within(task, task.readings, config, Budget.parse(point.budget), bits)  # type: ignore[arg-type]
                assert point.digest == found.plan.digest
                assert point.num_bytes == found.plan.num_bytes()
                assert point.share == point.num_bytes / full_bytes
                at_once = [loss / eta for loss, eta in zip(found.losses, RECOVERY[point.start], strict=True)]
                assert list(point.losses.values()) == pytest.approx(at_once)
                assert point.loss == pytest.approx(sum(at_once))
                plan = embtrim.search(task, config, point.budget, bits=bits)  # type: ignore[arg-type]
                assert plan.digest == point.digest

    def test_each_point_has_the_better_start(self, task: CTRTask) -> None:
        widths = task.readings.widths  # as if narrow tables lost something, which differs by start
        losses = tuple(0.01 * number for number in range(len(widths.losses)))
        readings = dataclasses.replace(task.readings, widths=dataclasses.replace(widths, losses=losses))
        differ = False
        for budget in map(Budget.parse, ("50%", "5%", "1%")):
            alone = {start: best_within(task, readings, [start], budget)[1].loss for start in STARTS}
            start, found = best_within(task, readings, STARTS, budget)
            assert found.loss == min(alone.values()) == alone[start]
            differ |= alone["low_rank"] != alone["scratch"]
        assert differ

    def test_projections_may_take_all_of_a_budget(self) -> None:
        task = foreign_task()
        readings, tiny = read(task), Budget.parse("3%")
        with pytest.raises(BudgetError, match=r"keeps no row of any table within a budget of 3%"):
            best_within(task, readings, ["low_rank"], tiny)
        assert best_within(task, readings, STARTS, tiny)[0] == "scratch"

    def test_widths_alone_keep_all_rows(self, task: CTRTask) -> None:
        for start in STARTS:
            config = GuidedConfig(start=start)
            found = plan_within(task, task.readings, config, Budget.parse("20%"), keeps_rows=True)
            assert all(table.num_kept == table.num_rows for table in found.plan.tables)
            assert any(table.output_width < table.width for table in found.plan.tables)
            assert found.losses[0] == 0, "no row is lost"
            assert amount_of(found.plan, Budget.parse("20%"), None) <= 0.2 * ROUNDED
            free = plan_within(task, task.readings, config, Budget.parse("20%"))
            assert free.loss <= found.loss
        tight = plan_within(task, task.readings, GuidedConfig(), Budget.parse("1.5%"), keeps_rows=True).plan
        assert any(table.output_width == 0 for table in tight.tables), "a table may lose all its columns"

    def test_budgets_that_cannot_be_met_are_left_out(self, task: CTRTask) -> None:
        budgets = tuple(map(Budget.parse, ("0.0101%", "10%")))
        curve = curve_of(task, budgets=budgets, tolerance=0.4)
        assert [point.budget for point in curve.lines[WIDTHS]] == ["10%"]
        assert [point.budget for point in curve.lines[ROWS_AND_WIDTHS]] == ["10%"]

    def test_in_32_bits_two_lines_say_all(self, task: CTRTask) -> None:
        curve = curve_of(task, bits=32, budgets=(Budget.parse("5%"),))
        assert list(curve.lines) == [WIDTHS, ROWS_AND_WIDTHS]
        assert set(curve.knee.losses) == {"rows", "widths", "bits"}

    def test_the_interval_is_the_error_of_the_score(self, task: CTRTask) -> None:
        curve = curve_of(task, budgets=(Budget.parse("0.3%"),))
        (point,) = curve.lines[ALL]
        low, high = curve.interval(point)
        assert task.readings.error > 0
        assert low == pytest.approx(curve.score - point.loss - 1.96 * task.readings.error)
        assert high == pytest.approx(curve.score - point.loss + 1.96 * task.readings.error)
        values = json.loads(json.dumps(curve.to_dict()))
        assert values["lines"][ALL][0] == {
            "budget": "0.3%", "bytes": point.num_bytes, "share": point.share, "predicted_score": curve.predicted(point),
            "interval": [low, high], "predicted_loss": point.loss, "predicted_losses": dict(point.losses),
            "start": point.start, "digest": point.digest,
        }  # fmt: skip
        assert values["knee"]["predicted_loss"] <= values["tolerance"] == 0.001
        assert values["score"] == task.readings.score
        assert values["standard_error"] == task.readings.error

    def test_a_module_of_ones_own_has_a_curve(self) -> None:
        curve = curve_of(foreign_task(), budgets=(Budget.parse("50%"),), tolerance=0.05)
        assert curve.lines[ALL]
        assert curve.full_bytes == foreign_task().full_plan().num_bytes()

    def test_size_curve_reads_a_run_s_settings(
        self, full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = []
        monkeypatch.setattr(curves, "read", lambda task: reads.append(task) or read(task))
        settings = CONFIG.replace(search={"start": "scratch"}, bits=8, tolerance=0.02)
        curve = size_curve(full.model, logs, settings, budgets=["5%", Budget.parse("10%")])
        assert len(reads) == 1
        assert reads[0].config == CONFIG.train
        assert curve.tolerance == 0.02
        points = [*curve.lines[WIDTHS], *curve.lines[ALL], curve.knee]
        assert {point.start for point in points} == {"scratch"}
        assert [point.budget for point in curve.lines[ALL]] == ["10%", "5%"]
        with pytest.raises(BudgetError, match="'ten' is not understood"):
            size_curve(full.model, logs, settings, budgets=["ten"])

    def test_starts_are_those_that_a_run_tries(self) -> None:
        assert starts_of(CONFIG) == STARTS
        assert starts_of(CONFIG.replace(search={"start": "low_rank"})) == ("low_rank",)
        assert starts_of(CONFIG.replace(init="inherit")) == ("scratch",)


class TestKnee:
    """The least budget within a predicted loss."""

    def test_a_smaller_budget_loses_more(self, task: CTRTask) -> None:
        budget, start, found = least_within(task, task.readings, STARTS, 0.002, "mixed")
        assert found.loss <= 0.002
        assert found.plan.digest == best_within(task, task.readings, STARTS, budget, "mixed")[1].plan.digest
        smaller = Budget.parse(f"{budget.amount / 1.02:.4%}")
        with contextlib.suppress(BudgetError):
            assert best_within(task, task.readings, STARTS, smaller, "mixed")[1].loss > 0.002
        assert start in STARTS

    def test_more_loss_takes_fewer_bytes(self, task: CTRTask) -> None:
        amounts = [least_within(task, task.readings, STARTS, loss, "mixed")[0].amount for loss in (0.05, 0.005, 0.0005)]
        assert amounts == sorted(amounts)
        assert amounts[0] < amounts[-1]

    def test_a_loss_that_no_plan_is_within_is_refused(self, task: CTRTask) -> None:
        with pytest.raises(BudgetError, match=r"no plan is predicted to lose at most -1 of the validation score"):
            least_within(task, task.readings, STARTS, -1.0)


class TestAuto:
    """`budget = "auto"` takes the knee."""

    def test_a_run_and_its_controls_get_the_budget_that_was_found(
        self, task: CTRTask, logs: EncodedDataset, tmp_path: Any
    ) -> None:
        config = CONFIG.replace(budget="auto", controls=("uniform",), tolerance=0.0005)
        records = {record.variant: record for record in run(logs, config, tmp_path / "run")}
        budget, _, found = least_within(task, task.readings, STARTS, 0.0005, "mixed")
        assert records["guided"].budget == records["uniform"].budget == budget.text
        assert records["guided"].predicted_loss is not None
        assert records["guided"].table_bytes <= records["full"].table_bytes
        assert 'budget = "auto"' in (tmp_path / "run" / "config.toml").read_text()
        assert found.loss <= 0.0005
        again = {record.variant: record for record in run(logs, config, tmp_path / "run")}
        assert again == records, "a finished run is read"

    def test_a_search_takes_the_better_start_and_its_plan_says_so(self, full: Trained, logs: EncodedDataset) -> None:
        found = find_plan(full.model, logs, CONFIG.replace(budget="auto"))
        curve = size_curve(full.model, logs, CONFIG, budgets=[])
        assert found.plan.digest == curve.knee.digest
        assert found.plan.details["config"]["start"] == curve.knee.start
        assert found.plan.details["predicted_loss"] <= 0.005

    def test_the_model_is_read_once(
        self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = _count(monkeypatch, steps, "read")
        monkeypatch.setattr("embtrim.methods.guided.read", _never)
        small = shrink(trained_full, logs, CONFIG.replace(budget="auto"))
        assert len(reads) == 1
        assert small.record.search_seconds > 0
        assert small.record.init == "auto"

    def test_a_start_without_a_plan_is_passed_over(
        self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search = steps.search

        def scratch_only(task: Any, config: Any, *arguments: Any) -> Any:
            if config.start == "low_rank":
                raise BudgetError("no room for projections")
            return search(task, config, *arguments)

        monkeypatch.setattr(steps, "search", scratch_only)
        small = shrink(trained_full, logs, CONFIG.replace(budget="5%"))
        assert small.record.started == "scratch"
        monkeypatch.setattr(steps, "search", _too_small)
        with pytest.raises(BudgetError, match="no room at all"):
            shrink(trained_full, logs, CONFIG.replace(budget="5%"))

    def test_only_guided_predicts(self) -> None:
        with pytest.raises(ConfigError, match=r"budget 'auto' is .* method 'sseds' predicts none; use method 'guided'"):
            CONFIG.replace(method="sseds", budget="auto")
        assert CONFIG.replace(budget=" Auto ").budget == AUTO
        assert CONFIG.replace(budget="auto").limit is None
        assert CONFIG.replace(budget="auto").stored_bits == "mixed"
        assert CONFIG.replace(budget="auto").model_dump(mode="json")["budget"] == "auto"

    def test_errors_offer_auto_only_where_it_is_allowed(self) -> None:
        with pytest.raises(BudgetError, match=r"'20000 params', 'auto'$"):
            parse_or_auto("ten percent")
        with pytest.raises(BudgetError, match=r"'20000 params'$"):
            Budget.parse("auto")


class TestMaxLoss:
    """`max_loss` retrains at the predicted budget, corrects the prediction, and retrains once more."""

    @pytest.mark.parametrize("measured", [(0.004, 0.0099), (0.02, 0.008), (0.005, 0.02)])
    def test_it_takes_the_smallest_of_two_that_is_within(
        self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch, measured: tuple[float, ...]
    ) -> None:
        made = _fake_shrink(monkeypatch, trained_full, measured)
        best = smallest_within(trained_full, logs, CONFIG.replace(max_loss=0.01))
        assert len(made) == 2
        first, second = (budget.amount for budget, _ in made)
        assert (second > first) == (measured[0] > 0.01), "a budget that loses too much is followed by a larger one"
        within = [small for (_, small), loss in zip(made, measured, strict=True) if loss <= 0.01]
        assert best is min(within, key=lambda small: small.record.table_bytes)
        spent = sum(small.record.train_seconds for _, small in made)
        assert best.record.search_seconds + best.record.train_seconds >= spent

    def test_two_that_lose_too_much_are_named_with_a_budget_to_try(
        self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = _fake_shrink(monkeypatch, trained_full, (0.03, 0.02))
        with pytest.raises(
            EmbtrimError, match=r"the losses were 0.03000 at [\d.]+%, 0.02000 at [\d.]+%; try --budget"
        ) as error:
            smallest_within(trained_full, logs, CONFIG.replace(max_loss=0.01))
        assert len(made) == 2
        advised = Budget.parse(str(error.value).split("--budget ")[1].split(",")[0])
        assert advised.amount > max(budget.amount for budget, _ in made)

    def test_it_is_measured(self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        made = _count(monkeypatch, tolerance, "shrink")
        reads = _count(monkeypatch, steps, "read")
        monkeypatch.setattr("embtrim.methods.guided.read", _never)
        best = smallest_within(trained_full, logs, CONFIG.replace(max_loss=0.06))
        assert best.record.valid["auc"] >= trained_full.record.valid["auc"] - 0.06
        assert best.record.table_bytes < trained_full.record.table_bytes / 2
        assert len(made) <= 2
        assert len(reads) == 1
        assert best.record.search == GuidedConfig().model_dump(), "the settings as they were asked for"

    def test_equal_plans_are_not_trained_twice(
        self, trained_full: Trained, logs: EncodedDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tolerance, "corrected", lambda predicted, measured, allowed: allowed)
        made = _fake_shrink(monkeypatch, trained_full, (0.004,))
        smallest_within(trained_full, logs, CONFIG.replace(max_loss=0.01))
        assert len(made) == 1

    def test_the_correction_is_bounded(self) -> None:
        assert corrected(0.01, 0.02, 0.01) == pytest.approx(0.005)
        assert corrected(0.01, 0.005, 0.01) == pytest.approx(0.02)
        assert corrected(0.01, -0.3, 0.01) == pytest.approx(0.04), "a gain by chance says little"
        assert corrected(0.0, 0.02, 0.01) == pytest.approx(0.00005)


def _count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Count the calls of a module's function."""
    calls: list[Any] = []
    original = getattr(module, name)

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, counted)
    return calls


def _never(*_: Any) -> Any:
    raise AssertionError("the model was read again")


def _too_small(*_: Any) -> Any:
    raise BudgetError("no room at all")


def _fake_shrink(
    monkeypatch: pytest.MonkeyPatch, full: Trained, measured: tuple[float, ...]
) -> list[tuple[Budget, Trained]]:
    """Let `shrink` give models with measured losses, of as many bytes as their budget; the list collects them."""
    made: list[tuple[Budget, Trained]] = []

    def fake(_full: Trained, _data: Any, config: RunConfig, **_: Any) -> Trained:
        assert config.limit is not None
        auc = full.record.valid["auc"] - measured[len(made)]
        record = full.record.replace(
            valid={**full.record.valid, "auc": auc},
            table_bytes=int(np.ceil(1e6 * config.limit.amount)),
            search_seconds=1.0,
        )
        made.append((config.limit, Trained(full.model, record)))
        return made[-1][1]

    monkeypatch.setattr(tolerance, "shrink", fake)
    return made
