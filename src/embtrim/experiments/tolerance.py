"""smallest_within: the smallest plan whose measured loss of validation AUC is within `max_loss`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, EmbtrimError
from embtrim.experiments.records import Trained
from embtrim.experiments.settings import RunConfig, method_config
from embtrim.experiments.steps import (
    Predicted,
    readings_of,
    search_task,
    shrink,
    with_predicted_budget,
    with_search_seconds,
)
from embtrim.system.progress import stage
from embtrim.training.callbacks import Callback

logger = logging.getLogger(__name__)

# Bisection over budgets: the smallest budget tried, and how many budgets are tried at most.
SMALLEST_SHARE = 0.01
BISECTIONS = 6
# `guided` retrains at most so often: at the budget that it predicts, and at the budget that it predicts once the
# prediction was corrected by what was measured.
MOST_TRAININGS = 2
# A corrected prediction is trusted within this factor of the first one.
MOST_CORRECTION = 4.0
# After a first training that lost too much the second one is to hold: it is allowed this part of the loss.
SAFE_PART = 0.8
# The budget that is named if both lose too much is at least so many times the larger one.
MORE_TO_TRY = 1.5
# A prediction of less than this part of `max_loss` says nothing about the factor between measured and predicted losses.
LEAST_PART = 0.01


def smallest_within(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    *,
    progress: bool = False,
    unfinished: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """The smallest plan whose validation AUC is at most `config.max_loss` below the full model's.

    `guided` retrains at the budget whose predicted loss is `max_loss`. It corrects the prediction by the loss that was
    measured, and retrains once more, at the budget that follows. Other methods bisect the share of the full tables on a
    log scale, on the assumption that a larger budget does no harm. The result is measured, whether or not the assumption
    holds.

    Args:
        full, data, config, progress, unfinished, callbacks: Arguments of `shrink`; the budget is not read.

    Raises:
        EmbtrimError: No budget tried is within the tolerance.
    """
    within = _smallest_predicted if config.method == "guided" else _smallest_bisected
    return within(full, data, config, progress, unfinished, callbacks)


def _smallest_predicted(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    progress: bool,
    unfinished: Path | None,
    callbacks: Sequence[Callback],
) -> Trained:
    """The smaller of two retrained models that is within the tolerance.

    The start of each is the one that is predicted to lose less.
    """
    allowed = config.max_loss
    assert allowed is not None
    started = time.perf_counter()
    task, readings = search_task(full.model, data, config, progress), readings_of(full, data, config, progress)
    seconds = time.perf_counter() - started
    tried: list[tuple[Trained, Predicted, float]] = []
    shares: list[float] = []
    wanted = allowed
    for _ in range(MOST_TRAININGS):
        predicted = with_predicted_budget(task, readings, config, wanted)
        if tried and predicted.num_bytes == tried[0][1].num_bytes:
            if tried[0][2] <= allowed:
                break
            # No plan between them is predicted to lose anything else: a larger budget is a guess.
            more = min(1.0, MORE_TO_TRY * shares[0])
            predicted = predicted._replace(config=predicted.config.replace(budget=f"{more:.4%}"))
        budget = predicted.config.limit
        assert budget is not None
        work = None if unfinished is None else unfinished / str(budget)
        with stage(f"budget {budget}", False):
            trained = shrink(full, data, predicted.config, progress=progress, unfinished=work, callbacks=callbacks)
        loss = full.record.valid["auc"] - trained.record.valid["auc"]
        logger.info(
            "budget %s: predicted loss %.5f, measured %.5f, allowed %.5f", budget, predicted.loss, loss, allowed
        )
        tried.append((trained, predicted, loss))
        shares.append(budget.amount)
        wanted = corrected(predicted.loss, loss, allowed)
        if loss > allowed and len(tried) == 1:
            wanted *= SAFE_PART
    within = [trained for trained, _, loss in tried if loss <= allowed]
    if not within:
        losses = ", ".join(f"{loss:.5f} at {predicted.config.budget}" for _, predicted, loss in tried)
        advice = with_predicted_budget(task, readings, config, wanted).config.limit
        assert advice is not None
        enough = max(advice.amount, MORE_TO_TRY * max(shares))
        raise EmbtrimError(
            f"no plan that was trained is within {allowed} of the full model's validation AUC "
            f"{full.record.valid['auc']:.4f}: the losses were {losses}; try --budget {min(1.0, enough):.2%}, or allow more loss"
        )
    best = min(within, key=lambda trained: trained.record.table_bytes)
    best.record = best.record.replace(search=method_config(config).model_dump(mode="json"))
    return with_search_seconds(best, seconds + sum(t.record.search_seconds + t.record.train_seconds for t, *_ in tried))


def corrected(predicted: float, measured: float, allowed: float) -> float:
    """The predicted loss at which the measured loss should be `allowed`, as their factor is about the same everywhere.

    Args:
        predicted: Predicted loss of a model.
        measured: Its measured loss, which may be negative.
        allowed: Loss to aim at.

    Example:
        >>> corrected(predicted=0.002, measured=0.004, allowed=0.002)
        0.001
    """
    predicted = max(predicted, LEAST_PART * allowed)
    factor = max(measured, 0.0) / predicted
    return allowed / max(factor, allowed / predicted / MOST_CORRECTION)


def _smallest_bisected(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    progress: bool,
    unfinished: Path | None,
    callbacks: Sequence[Callback],
) -> Trained:
    """The smallest model within the tolerance that a bisection over budgets finds."""
    assert config.max_loss is not None
    seconds = 0.0
    wanted = full.record.valid["auc"] - config.max_loss
    low, high = SMALLEST_SHARE, 1.0
    best: Trained | None = None
    for _ in range(BISECTIONS):
        share = (low * high) ** 0.5
        budget = f"{share:.4%}"
        work = None if unfinished is None else unfinished / budget
        try:
            with stage(f"budget {budget}", False):
                settings = config.replace(budget=budget)
                trained = shrink(full, data, settings, progress=progress, unfinished=work, callbacks=callbacks)
        except BudgetError as error:  # so small that the method keeps nothing
            logger.info("budget %.2f%%: %s", share * 100, error)
            low = share
            continue
        seconds += trained.record.search_seconds + trained.record.train_seconds
        logger.info("budget %.2f%%: validation AUC %.4f, wanted %.4f", share * 100, trained.record.valid["auc"], wanted)
        if trained.record.valid["auc"] >= wanted:
            best, high = trained, share
        else:
            low = share
    if best is None:
        raise EmbtrimError(
            f"no plan of method {config.method!r} up to {low:.0%} of the tables is within {config.max_loss} of the full "
            f"model's validation AUC {full.record.valid['auc']:.4f}; allow more loss, or name a budget"
        )
    return with_search_seconds(best, seconds)
