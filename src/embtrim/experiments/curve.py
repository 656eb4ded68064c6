"""size_curve: the validation score that `guided` predicts for every size of a trained model's tables."""

from __future__ import annotations

from collections.abc import Sequence

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.settings import RunConfig, starts_of
from embtrim.experiments.steps import search_task
from embtrim.methods.curves import BUDGETS, SizeCurve, curve_of
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget


def size_curve(
    model: CTRModel,
    data: EncodedDataset,
    config: RunConfig | None = None,
    *,
    budgets: Sequence[str | Budget] | None = None,
    progress: bool = False,
) -> SizeCurve:
    """Predicted validation score against bytes, for three kinds of plans: what a budget would cost, before any training.

    The model is read once, in about twenty forward passes over a sample of the validation rows; see `guided`. The points
    are predictions. Their interval is the error of the validation score, not of the prediction.

    Args:
        model: The trained full model.
        data: Encoded data that the model was trained on.
        config: Settings of the run that the curve is for; search, init, bits, target, tolerance, train and seed are read.
            None takes the defaults.
        budgets: Budgets in percent or bytes, such as "10%"; None takes eleven from 50% to 1%. A budget that cannot be
            met is left out.
        progress: Show progress bars on stderr.

    Raises:
        BudgetError: A budget cannot be parsed, or no plan is predicted to be within the tolerance.
    """
    config = config or RunConfig()
    return curve_of(
        search_task(model, data, config, progress),
        bits=config.stored_bits,
        target=config.target,
        budgets=BUDGETS if budgets is None else tuple(map(Budget.parse, budgets)),
        starts=starts_of(config),
        tolerance=config.tolerance,
    )
