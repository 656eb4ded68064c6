"""CodeGate: tables train as their codes read them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from embtrim.compaction.compacting import compact
from embtrim.models import DeepFM
from embtrim.models.ctr_model import CTRModel
from embtrim.tables.code_training import CodeGate
from embtrim.testing.toys import planted_data
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks, TrainConfig
from tests.training.interruptions import same_weights, told

TRAIN = TrainConfig(epochs=2, batch_size=256, learning_rate=0.02, precision="fp32", checkpoint_seconds=0)


@pytest.fixture(scope="module")
def wide():
    return planted_data(num_rows=1500, noise_vocab=60, multi=True)


def small_model(wide, bits) -> CTRModel:
    """A compact DeepFM whose tables differ in bits and widths; one is projected, one has lost rows."""
    full = DeepFM(wide.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5, seed=2)
    plan = full.tables.plan.with_columns(
        {table.name: range(4 - n % 2) for n, table in enumerate(full.tables.plan.tables)}
    )
    return compact(full, plan.with_bits(bits), init="inherit")


MIXED = {"strong": 8, "weak": 4, "noise": 4, "tags": 16}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("bits", [8, 4, MIXED])
def test_outputs_are_those_of_quantised_tables(wide, bits, counted):
    model = small_model(wide, bits)
    stored, ids = copy.deepcopy(model), next(iter(wide.batches("valid", 100))).ids_BC
    counts = {name: np.arange(len(count)) ** 2 for name, count in wide.value_counts().items()} if counted else None
    stored.tables.quantize_(counts)
    for training in (True, False):
        model.train(training)
        with model.tables.gated(row_gate=CodeGate(model.tables, 1, counts)):
            found = model.tables(ids).concat
        codes = torch.tensor([b <= 8 for b in ([bits] * 4 if isinstance(bits, int) else bits.values())])
        coded = codes[torch.arange(4).repeat_interleave(torch.tensor([4, 3, 4, 3]))]
        torch.testing.assert_close(found[:, coded], stored.eval().tables(ids).concat[:, coded], rtol=1e-5, atol=1e-5)
    plain = model.tables(ids).concat
    assert (found[:, coded] - plain[:, coded]).abs().max() > 1e-3
    assert torch.equal(found[:, ~coded], plain[:, ~coded]), "tables of 16 bits are read as they are"


def test_gradients_are_those_of_the_rows(wide):
    """A loss that is linear in the embeddings has the same gradient with and without codes."""
    model, ids = small_model(wide, 4), next(iter(wide.batches("train", 64))).ids_BC
    gradients = []
    for gate in (None, CodeGate(model.tables, 1)):
        with model.tables.gated(row_gate=gate):
            concat = model.tables(ids).concat
            loss = (concat * torch.linspace(-1, 1, concat.shape[1])).sum()
        gradients.append(torch.autograd.grad(loss, model.tables.weight)[0])
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_scales_follow_the_tables_when_it_is_time(wide):
    model = small_model(wide, MIXED)
    gate = CodeGate(model.tables, 3)
    before = copy.deepcopy(gate.state_dict())
    with torch.no_grad():
        model.tables.weight.mul_(2.0)
    for step in (1, 2):
        gate.on_step(step)
    for start, stretches in gate.state_dict().items():
        assert all(map(torch.equal, stretches, before[start]))
    gate.on_step(3)
    for start, (start_T, bits_T, scale_TW, offset_TW) in gate.state_dict().items():
        assert torch.equal(start_T, before[start][0])
        assert torch.equal(bits_T, before[start][1])
        torch.testing.assert_close(scale_TW, 2 * before[start][2], rtol=3e-3, atol=1e-6)
        torch.testing.assert_close(offset_TW, 2 * before[start][3], rtol=3e-3, atol=1e-6)
    again = CodeGate(model.tables, 3)
    again.load_state_dict(before)
    assert again.state_dict().keys() == before.keys()
    for start, stretches in again.state_dict().items():
        assert all(map(torch.equal, stretches, before[start]))


def test_a_plan_of_16_bits_has_no_codes(wide):
    assert CodeGate(small_model(wide, 16).tables, 1).coded == []
    assert len(CodeGate(small_model(wide, MIXED).tables, 1).coded) == 3


def hooks_of(gate: CodeGate, stop: int = 0) -> Hooks:
    def on_step(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt
        gate.on_step(step)

    return Hooks(on_step=on_step, state=gate, keeps_start=True)


@pytest.mark.slow
def test_a_resumed_finishing_ends_as_an_uninterrupted_one(wide, tmp_path):
    """Scales are fitted every third step: a training that goes on in between needs those of the checkpoint."""
    plain, whole = small_model(wide, MIXED), small_model(wide, MIXED)
    results = []
    for model in (whole, plain):
        gate = CodeGate(model.tables, 3)
        with model.tables.gated(row_gate=gate if model is whole else None):
            results.append(fit(model, wide, TRAIN, hooks=hooks_of(gate)))
    assert not same_weights(whole, plain), "codes are seen in training"
    path = tmp_path / "state.safetensors"
    for stop in (3, 6, 9):  # each once more: an epoch has five steps
        model = small_model(wide, MIXED)
        gate = CodeGate(model.tables, 3)
        with model.tables.gated(row_gate=gate), pytest.raises(KeyboardInterrupt):
            fit(model, wide, TRAIN, hooks=hooks_of(gate, stop), checkpoint=path)
    model = small_model(wide, MIXED)
    gate = CodeGate(model.tables, 3)
    with model.tables.gated(row_gate=gate):
        result = fit(model, wide, TRAIN, hooks=hooks_of(gate), checkpoint=path)
    assert told(result) == told(results[0])
    assert (result.best_epoch, result.best_score) == (results[0].best_epoch, results[0].best_score)
    assert same_weights(model, whole)
    assert np.isfinite(result.best_score)
