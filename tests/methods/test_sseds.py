"""SSEDS: its gradient by hand, its score on a model that has learned noise by heart."""

from __future__ import annotations

import numpy as np
import pytest

from embtrim.errors import BudgetError, ConfigError
from embtrim.methods import (
    SSEDSConfig,
    search,
)
from embtrim.methods.sseds import slot_gradients
from embtrim.models import FNN, DeepFM
from embtrim.schema import Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.testing.toys import (
    planted_data,
)
from embtrim.training.settings import TrainConfig


def test_sseds_gradient_equals_autograd_of_an_explicit_mask():
    """g = dL/dalpha on a 2-field, 3-column toy: sum over the batch of dL/de~ * e."""
    data = planted_data(num_rows=400, noise_vocab=50)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    task = CTRTask(model, data, TrainConfig(batch_size=64))
    found = slot_gradients(task, model, SSEDSConfig(data="train", batches=1), seed=0)
    batch = next(iter(task.batches("train", 0)))
    model.eval()
    emb = model.tables(batch.ids_BC).concat.detach().requires_grad_()
    with model.tables.gated(slot_gate=lambda _: emb):
        task.loss(model, batch).backward()
    expected = (emb.grad * emb).sum(0).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert np.abs(found).max() > 0


def test_sseds_counts_a_small_last_batch_by_its_rows():
    """The gradient of all batches is that of one batch that holds all rows."""
    data = planted_data(num_rows=400, noise_vocab=50)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    num_rows = data.num_rows("valid")
    assert num_rows % 32
    in_parts, at_once = (
        slot_gradients(task, model, SSEDSConfig(), seed=0)
        for task in (CTRTask(model, data, TrainConfig(batch_size=size)) for size in (32, num_rows))
    )
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-4, atol=1e-9)


def test_sseds_refuses_to_rank_by_signs_that_it_does_not_have():
    with pytest.raises(ConfigError, match="average = 'abs' leaves no signs"):
        SSEDSConfig.parse({"average": "abs"}, where="search")


def test_shared_table_is_one_slot_for_both_fields():
    from embtrim.data.dataset import EncodedDataset, SplitArrays
    from embtrim.schema import FieldSpec

    schema = Schema(
        label="y", fields=(FieldSpec(name="a", vocab_size=9, table="t"), FieldSpec(name="b", vocab_size=9, table="t"))
    )
    rng = np.random.default_rng(0)
    arrays = SplitArrays(rng.integers(0, 9, (64, 2)).astype(np.int32), rng.integers(0, 2, 64).astype(np.float32))
    data = EncodedDataset(schema, {"train": arrays, "valid": arrays})
    model = FNN(schema, embedding_dim=4, hidden_units=(4,), init_std=0.5)
    plan = search(CTRTask(model, data), SSEDSConfig(), "50%")
    assert len(plan.details["scores"]) == 4
    assert plan.num_params == 18


def test_sseds_keeps_a_column_of_every_table_where_the_budget_has_room_for_it(planted: CTRTask):
    full = planted.full_plan()
    rows = sum(table.num_rows for table in full.tables)

    def least_width(config: SSEDSConfig, budget: int) -> int:
        return min(table.output_width for table in search(planted, config, f"{budget} params").tables)

    assert least_width(SSEDSConfig(), rows) == 1
    assert least_width(SSEDSConfig(min_dim=0), rows) == 0
    assert least_width(SSEDSConfig(), rows - 1) == 0
    with pytest.raises(BudgetError, match="set min_dim = 0"):
        search(planted, SSEDSConfig(min_dim=1), f"{rows - 1} params")


@pytest.mark.slow
@pytest.mark.parametrize("more_epochs", [2, 6])
def test_faithful_sseds_overrates_memorised_noise(more_epochs: int):
    """Past its best epoch a model has learned the noise by heart, and |g| on training data calls it important.

    The signed score on validation data of a fresh model, trained for one epoch, ranks the fields as they were planted.
    """
    data = planted_data(num_rows=8000, noise_vocab=3000, seed=1)
    config = TrainConfig(
        epochs=2, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32", tables="dense"
    )
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(32,))
    task = CTRTask(model, data, config)
    task.fit(model, epochs=2 + more_epochs, seed=0)

    def by_field(settings: SSEDSConfig) -> np.ndarray:
        return np.array(search(task, settings, "20%").details["scores"]).reshape(3, 8).sum(1)

    mended = by_field(SSEDSConfig(pretrain="epochs:1"))
    assert mended[0] > mended[1] > mended[2]
    faithful = by_field(SSEDSConfig(**SSEDSConfig.faithful))
    assert faithful[2] > faithful[1]
