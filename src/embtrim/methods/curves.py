"""The curve: what `guided` predicts for every budget, from one set of readings, and the least budget within a loss.

The losses of a curve are those at once: they do not count on what training from scratch makes up for. It may do much
better. Where the full model is not easily reached again by training, it does worse, and no reading tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from embtrim.errors import BudgetError
from embtrim.methods.allotting import Allotment
from embtrim.methods.guided import RECOVERY, GuidedConfig, Start, levels_of, plan_within
from embtrim.methods.readings import Readings, read
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import ROUNDED, amount_of
from embtrim.plan.table import Bits, Target
from embtrim.system.progress import tracked
from embtrim.tasks.task import Task

STARTS: tuple[Start, ...] = get_args(Start)
BUDGETS = tuple(map(Budget.parse, ("50%", "30%", "20%", "15%", "10%", "7%", "5%", "3%", "2%", "1.5%", "1%")))
# Kinds of plans, each a line of the curve. Plans of the last one may also have fewer than 32 bits.
WIDTHS, ROWS_AND_WIDTHS, ALL = "widths", "rows and widths", "rows, widths and bits"
# Bisection for the least budget within a loss: the smallest share tried, and the number of steps. The budget found is
# at most 1% above the least one.
SMALLEST_SHARE, STEPS = 1e-4, 10
# Standard errors to each side of a 95% interval.
INTERVAL_ERRORS = 1.96


@dataclass(frozen=True)
class CurvePoint:
    """The best plan for one budget, as the readings predict it.

    Attributes:
        budget: The budget as text.
        num_bytes: Bytes of the plan's tables, first-order weights included.
        share: These bytes as a share of the full tables' bytes.
        losses: Predicted loss of the validation score by lever: "rows", "widths", "bits".
        start: How the compact model of the plan starts: "low_rank" or "scratch"; see GuidedConfig.
        digest: Digest of the plan; see `SizePlan.digest`.
    """

    budget: str
    num_bytes: int
    share: float
    losses: Mapping[str, float]
    start: str
    digest: str

    @property
    def loss(self) -> float:
        """Predicted loss of the validation score."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class SizeCurve:
    """Predicted validation score against bytes.

    Attributes:
        score: Score of the full model on the validation rows that were read.
        error: Standard error of this score: another sample of as many rows would differ by so much. It is not the error
            of the predictions, whose quality only a trained model shows. 0 where the task cannot tell.
        full_bytes: Bytes of the full tables, first-order weights included.
        lines: Points by kind of plan: "widths" keeps all rows in fp32, "rows and widths" is in fp32, "rows, widths and
            bits" chooses everything. Each has its large budgets first. Budgets that cannot be met are left out.
        tolerance: Loss that is accepted at the knee.
        knee: The least bytes whose predicted loss is within the tolerance, with all levers.
    """

    score: float
    error: float
    full_bytes: int
    lines: Mapping[str, tuple[CurvePoint, ...]]
    tolerance: float
    knee: CurvePoint

    def predicted(self, point: CurvePoint) -> float:
        """Predicted validation score at a point."""
        return self.score - point.loss

    def interval(self, point: CurvePoint) -> tuple[float, float]:
        """The predicted score minus and plus 1.96 standard errors of the score; see `error`."""
        predicted = self.predicted(point)
        return predicted - INTERVAL_ERRORS * self.error, predicted + INTERVAL_ERRORS * self.error

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON-able values."""
        return {
            "score": self.score,
            "standard_error": self.error,
            "full_bytes": self.full_bytes,
            "lines": {kind: [self._values(point) for point in points] for kind, points in self.lines.items()},
            "tolerance": self.tolerance,
            "knee": self._values(self.knee),
        }

    def _values(self, point: CurvePoint) -> dict[str, Any]:
        low, high = self.interval(point)
        return {
            "budget": point.budget,
            "bytes": point.num_bytes,
            "share": point.share,
            "predicted_score": self.predicted(point),
            "interval": [low, high],
            "predicted_loss": point.loss,
            "predicted_losses": dict(point.losses),
            "start": point.start,
            "digest": point.digest,
        }


def curve_of(
    task: Task,
    *,
    bits: Bits = "mixed",
    target: Target | None = None,
    budgets: Sequence[Budget] = BUDGETS,
    starts: Sequence[Start] = STARTS,
    tolerance: float = 0.001,
) -> SizeCurve:
    """The curve of a trained model: it is read once, and nothing is trained.

    Args:
        task: Task of the trained full model. Its `readings` are used if there are any.
        bits: Bits of the plans with all levers. With 32 the lines are "widths" and "rows and widths" alone.
        target: Where the tables will be served; see `search`.
        budgets: Budgets in percent or bytes. A number of bytes holds the tables alone.
        starts: Ways in which the compact model may start; each point has the better one.
        tolerance: Loss of the validation score that is accepted at the knee.

    Raises:
        BudgetError: No plan is predicted to be within the tolerance.
    """
    readings: Readings = task.readings or read(task)
    full_bytes = task.full_plan().num_bytes(target)
    kinds: dict[str, tuple[Bits, bool]] = {WIDTHS: (32, True), ROWS_AND_WIDTHS: (32, False)}
    if tuple(levels_of(bits)) != (32,):
        kinds[ALL] = (bits, False)
    lines: dict[str, list[CurvePoint]] = {kind: [] for kind in kinds}
    ordered = sorted(budgets, key=lambda budget: -budget.amount)
    planned = [(kind, budget) for kind in kinds for budget in ordered]
    for kind, budget in tracked(planned, "planning", len(planned), task.progress, "plans"):
        of_kind, keeps_rows = kinds[kind]
        try:
            start, found = best_within(task, readings, starts, budget, of_kind, target, keeps_rows=keeps_rows)
        except BudgetError:
            continue
        lines[kind].append(_point(budget, start, found, target, full_bytes))
    budget, start, found = least_within(task, readings, starts, tolerance, bits, target)
    return SizeCurve(
        readings.score,
        readings.error,
        full_bytes,
        {kind: tuple(points) for kind, points in lines.items()},
        tolerance,
        _point(budget, start, found, target, full_bytes),
    )


def _point(budget: Budget, start: Start, found: Allotment, target: Target | None, full_bytes: int) -> CurvePoint:
    num_bytes = found.plan.num_bytes(target)
    return CurvePoint(budget.text, num_bytes, num_bytes / full_bytes, found.by_lever(), start, found.plan.digest)


def best_within(
    task: Task,
    readings: Readings,
    starts: Sequence[Start],
    budget: Budget,
    bits: Bits = 32,
    target: Target | None = None,
    *,
    keeps_rows: bool = False,
) -> tuple[Start, Allotment]:
    """The start of least loss at once within a budget, and its plan; see `plan_within` for the arguments.

    Raises:
        BudgetError: No start has a plan that keeps something within the budget.
    """
    found: list[tuple[Start, Allotment]] = []
    for start in starts:
        config = GuidedConfig(start=start)
        allotment = plan_within(task, readings, config, budget, bits, target, keeps_rows=keeps_rows)
        plan = allotment.plan
        at_once = zip(allotment.losses, RECOVERY[start], strict=True)
        allotment = allotment._replace(losses=tuple(loss / eta for loss, eta in at_once))
        if not plan.keeps_nothing and amount_of(plan, budget, target) <= budget.amount * ROUNDED:
            found.append((start, allotment))
    if not found:
        raise BudgetError(f"method 'guided' keeps no row of any table within a budget of {budget}; give more")
    return min(found, key=lambda pair: pair[1].loss)


def least_within(
    task: Task,
    readings: Readings,
    starts: Sequence[Start],
    loss: float,
    bits: Bits = 32,
    target: Target | None = None,
) -> tuple[Budget, Start, Allotment]:
    """The least budget, in percent, whose predicted loss is at most `loss`; with the better start and its plan.

    Bisects the share of the full tables on a log scale. No model is trained.

    Raises:
        BudgetError: Not even a budget of 100% is predicted to lose so little.
    """

    def within(share: float) -> tuple[Budget, Start, Allotment] | None:
        budget = Budget.parse(f"{share:.4%}")
        try:
            start, found = best_within(task, readings, starts, budget, bits, target)
        except BudgetError:
            return None
        return (budget, start, found) if found.loss <= loss else None

    best, low, high = within(1.0), SMALLEST_SHARE, 1.0
    if best is None:
        raise BudgetError(f"no plan is predicted to lose at most {loss:g} of the validation score; accept more loss")
    for _ in tracked(range(STEPS), "looking for the knee", STEPS, task.progress):
        share = (low * high) ** 0.5
        found = within(share)
        if found is None:
            low = share
        else:
            best, high = found, share
    return best
