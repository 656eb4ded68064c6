"""Tables in fewer bits: codes against their definition, lookups against decoding by hand, whole runs and exports."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import embtrim
from embtrim.compaction.compacting import compact, quantize_
from embtrim.errors import EmbtrimError, ModelError, PlanError
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import shrink, train_full
from embtrim.methods.readings import code_errors, errors_of_each
from embtrim.models import DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import BITS, CODE_BITS, Block, TablePlan
from embtrim.schema import Schema
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.tables.codes import as_coded
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.packing import CLIPS, MOST_VALUE, BandedRows, PackedRows, fit_codes, fit_each, together
from embtrim.tables.row_optimizers import RowSGD
from embtrim.training.evaluation import evaluate
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig
from tests.tables.test_tables import cases, naive, naive_fm

SCHEMA = Schema.from_sizes([10, 6, 3])


# ---- codes -------------------------------------------------------------------------------------------------------


def packed(values_NW: Tensor, bits: int) -> PackedRows:
    store = PackedRows(len(values_NW), values_NW.shape[1], bits, num_stretches=1)
    store.store(0, torch.arange(len(values_NW)), values_NW)
    return store


def read_all(store: PackedRows) -> Tensor:
    return store(torch.arange(len(store.values))[:, None], torch.tensor([0]))[:, 0]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 999), st.sampled_from([1e-6, 1.0, 1e3]))
def test_codes_round_to_nearest_inside_their_range_and_clip_outside(bits, num_rows, width, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = (spread * torch.randn(num_rows, width, generator=generator) ** 3).clamp(-MOST_VALUE, MOST_VALUE)
    store = packed(values, bits)
    low, step = store.offset[0].double(), store.scale[0].double()
    high = low + step * (2**bits - 1)
    error = (read_all(store).double() - values.double()).abs()
    slack = 1e-5 * values.abs().amax(0)
    rounded = 2**-10 * values.abs().amax(0) + 2**-23  # the range begins at a number of fp16, and so does a step
    nearest = torch.clamp(values.double(), low, high)
    assert (error <= (values.double() - nearest).abs() + step / 2 + slack).all()
    # No worse than codes from the smallest to the largest value.
    span = (values.amax(0) - values.amin(0)).double()
    assert (error.square().mean(0).sqrt() <= (1 + 2**-9) * span / (2**bits - 1) / 2 + rounded).all()
    assert store.scale.dtype == store.offset.dtype == torch.float16
    if num_rows == 1:
        assert (error <= rounded).all()


def test_an_outlier_is_clipped_where_that_loses_less():
    values = torch.linspace(-1, 1, 1001)[:, None].repeat(1, 2)
    values[0, 1] = -4.0
    plain, outlier = packed(values, 4).scale[0] * 15
    assert 1.79 < plain <= 2.0
    assert outlier < 0.95 * 5.0
    assert CLIPS[0] == 1.0, "a range that needs no clipping is tried"


def test_two_codes_a_byte_by_hand():
    # Columns 0..2 span 0..15, so that codes are the values; the third stands in the low bits of the second byte.
    store = packed(torch.tensor([[0.0, 15.0, 3.0], [15.0, 0.0, 0.0], [1.0, 2.0, 15.0]]), 4)
    assert store.values.tolist() == [[0 + 3 * 16, 15], [15, 0], [1 + 15 * 16, 2]]


@pytest.mark.parametrize(("bits", "stored"), [(2, [0 + 1 * 4 + 3 * 16, 3 + 2 * 4]), (3, [52, 11, 2 + 8 + 16])])
def test_codes_of_two_and_three_bits_by_hand(bits, stored):
    # Columns span 0 .. 2^b - 1, so that codes are the values: 0 3 1 2 3 at 2 bits; 0 7 1 6 7 at 3, with the same low bits.
    high = 2.0**bits - 1
    values = torch.tensor([[0.0, high, 1.0, high - 1, high], [0.0] * 5, [high] * 5])
    store = packed(values, bits)
    assert store.values[0].tolist() == stored
    assert torch.equal(read_all(store), values)


def test_values_beyond_fp16_are_refused():
    with pytest.raises(
        EmbtrimError, match=r"values from -1 to 66000; codes of 4 bits have fp16 scales.*give the table"
    ):
        packed(torch.tensor([[66e3], [-1.0]]), 4)


def test_scales_of_earlier_releases_stay_as_they_are():
    store = packed(torch.randn(7, 3), 8)
    old = {**store.state_dict(), "scale": store.scale.float() * 1.0001, "offset": store.offset.float() + 1e-5}
    again = PackedRows(7, 3, 8, num_stretches=1)
    again.load_state_dict(old)
    assert torch.equal(again.scale, old["scale"])
    assert torch.equal(again.offset, old["offset"])


def test_projections_of_earlier_releases_stay_as_they_are():
    full = SizePlan.full(SCHEMA, 4)
    plan = full.with_columns(dict.fromkeys(("f0", "f1"), (0, 2)), "project").with_bits({"f0": 8, "f1": 4})
    tables = EmbeddingTables(SCHEMA, plan, 1.0).eval()
    whole = tables.projection.detach().clone()
    tables.quantize_()
    assert tables.half_projection is not None
    old = {**tables.state_dict(), "projection": whole}
    del old["half_projection"]
    again = EmbeddingTables(SCHEMA, plan, 1.0).eval()
    again.load_state_dict(old)
    assert torch.equal(again.projections(), whole)
    ids = torch.zeros(2, 3, dtype=torch.int32)
    torch.testing.assert_close(again(ids).aligned, tables(ids).aligned, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bands_read_as_rows_of_their_own_precision(draw):
    """Two tables in one group, each with bands that it may lack; every band has scales of its own."""
    width = draw.draw(st.integers(1, 5))
    bands_T = [
        [(draw.draw(st.integers(1, 6)), bits) for bits in (8, 4, 3, 2) if draw.draw(st.booleans())] or [(3, 4)]
        for _ in range(2)
    ]
    sizes = [sum(rows for rows, _ in bands) for bands in bands_T]
    values = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(draw.draw(st.integers(0, 99))))
    store = BandedRows(width, bands_T)
    expected, start = [], 0
    for number, bands in enumerate(bands_T):
        rows = torch.arange(start, start + sizes[number])
        store.store(number, rows, values[rows])
        for size, bits in bands:
            expected.append(read_all(packed(values[start : start + size], bits)))
            start += size
    expected = torch.cat(expected)
    for row, number in enumerate([0] * sizes[0] + [1] * sizes[1]):
        found = store(torch.tensor([[row]]), torch.tensor([number]))[0, 0]
        torch.testing.assert_close(found, expected[row])


def test_half_precision_is_rounded_once():
    values = torch.randn(7, 3)
    assert torch.equal(read_all(packed(values, 16)), values.half().float())


# ---- tables ------------------------------------------------------------------------------------------------------


def codes_by_hand(stored: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Codes of the bytes of one row, bit by bit."""
    codes, start, unit = np.zeros(width, int), 0, 1
    for plane in (2, 1) if bits == 3 else (bits,):
        num_bytes = -(-width * plane // 8)
        for j in range(width):
            codes[j] += unit * ((int(stored[start + j % num_bytes]) >> (plane * (j // num_bytes))) & (2**plane - 1))
        start, unit = start + num_bytes, unit << plane
    return codes


def decoded(tables: EmbeddingTables, table: TablePlan, compact_id: int) -> np.ndarray:
    """One stored row, decoded from the buffers that a file holds."""
    state = tables.state_dict()
    row = int(tables.storage_rows(table.name, np.array([compact_id]))[0])
    ((number, group),) = [(n, g) for n, g in enumerate(tables.groups) if g.start <= row < g.start + g.num_rows]
    key, place, bits = f"packed.{number}", row - group.start, table.bits
    if group.banded:
        ends = np.cumsum([rows for rows, _ in table.bands])
        band = int(np.searchsorted(ends, compact_id, side="right"))
        start, bits = ends[band] - table.bands[band][0], table.bands[band][1]
        others = [tables.layout.tables[name] for name in group.tables[: group.tables.index(table.name)]]
        users = [name for name in group.tables if bits in [b for _, b in tables.layout.tables[name].bands]]
        place = compact_id - start + sum(rows for other in others for rows, b in other.bands if b == bits)
        key = f"{key}.stores.{bits}"
    stored = state[f"{key}.values"][place].numpy()
    if bits > CODE_BITS:
        return stored.astype(np.float64)
    stretch = (users if group.banded else list(group.tables)).index(table.name)
    scale, offset = (state[f"{key}.{name}"][stretch].double().numpy() for name in ("scale", "offset"))
    return codes_by_hand(stored, group.width, bits) * scale + offset


def decoded_first_order(tables: EmbeddingTables, table: TablePlan, compact_id: int) -> float:
    state = tables.state_dict()
    alike = [t for t in tables.plan.tables if t.first_order_bits == table.first_order_bits]
    first = min(
        int(tables.storage_rows(t.name, np.arange(t.num_compact_rows)).min()) for t in alike if t.num_compact_rows
    )
    row = int(tables.storage_rows(table.name, np.array([compact_id]))[0]) - first
    key = f"packed_first_order.{table.first_order_bits}"
    value = float(state[f"{key}.values"][row])
    if table.bits > CODE_BITS:
        return value
    stretch = alike.index(table)
    return value * float(state[f"{key}.scale"][stretch]) + float(state[f"{key}.offset"][stretch])


@st.composite
def precisions(draw, plan: SizePlan) -> SizePlan:
    """The plan with bits for every table, and with bands in some of its uniform tables."""
    plan = plan.with_bits({t.name: draw(st.sampled_from(BITS)) for t in plan.tables})
    tables = []
    for table in plan.tables:
        if table.mixed or table.bits > CODE_BITS or not table.num_kept or not draw(st.booleans()):
            tables.append(table)
            continue
        rows = np.sort(np.flatnonzero(table.kept_mask().any(1)) if table.output_width else np.arange(table.num_kept))
        levels = sorted(draw(st.sets(st.sampled_from([8, 4, 3, 2]), min_size=1)), reverse=True)[: len(rows)]
        parts = np.array_split(draw(st.permutations(rows.tolist())), len(levels))
        blocks = tuple(
            Block(len(part), table.columns, table.alignment, np.sort(part).astype(np.int32), bits=bits)
            for part, bits in zip(parts, levels, strict=True)
        )
        tables.append(dataclasses.replace(table, blocks=blocks, bits=levels[0]))
    return dataclasses.replace(plan, tables=tuple(tables))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_every_layout_reads_what_decoding_by_hand_gives(case, draw):
    reference, ids = case
    plan = draw.draw(precisions(reference.plan))
    reference = EmbeddingTables(reference.schema, plan.with_bits(32)).eval()
    tables = EmbeddingTables(reference.schema, plan, 1.0).eval()
    with torch.no_grad():
        for name, parameter in tables.named_parameters():
            parameter.normal_()
            if "projection" in name:
                reference.get_parameter(name).copy_(parameter)
    original = {t.name: tables.get_rows(t.name, np.arange(t.num_compact_rows)) for t in plan.tables}
    tables.quantize_()
    assert sum(value.nbytes for value in tables.state_dict().values()) == tables.plan.num_bytes()
    if tables.layout.has_projections:
        projections = tables.projections().detach()
        torch.testing.assert_close(projections, reference.projection.detach(), rtol=1e-3, atol=1e-6)
        reference.projection.data.copy_(projections)

    for table in tables.plan.tables:
        for rows, values in original[table.name]:
            if not values.shape[1]:
                continue
            found = np.stack([decoded(tables, table, i) for i in rows])
            fewest = min(bits for _, bits in table.bands)
            span = np.ptp(values.numpy(), axis=0) / (2**fewest - 1) if fewest <= CODE_BITS else 0.0
            error = np.sqrt(((found - values.numpy()) ** 2).mean(0))
            assert (error <= span / 2 + 1e-3 * abs(values.numpy()).max() + 1e-3).all()
            wide = torch.zeros(len(rows), reference.width, dtype=torch.float64)
            wide[:, : found.shape[1]] = torch.from_numpy(found)
            reference.set_rows(table.name, rows, wide)
        if reference.first_order is not None:
            for i in range(table.num_compact_rows):
                row = reference.storage_rows(table.name, np.array([i]))
                reference.first_order.data[row] = decoded_first_order(tables, table, i)

    concat, aligned, first_order = naive(reference, ids)
    views = tables(ids)
    np.testing.assert_allclose(views.concat.detach().numpy(), concat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views.aligned.detach().numpy(), aligned, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views.fm().detach().numpy(), naive_fm(aligned), rtol=1e-3, atol=1e-3)
    if tables.plan.first_order:
        np.testing.assert_allclose(views.first_order.detach().numpy(), first_order, rtol=1e-4, atol=1e-4)
    else:
        assert views.first_order is None

    again = EmbeddingTables(reference.schema, tables.plan, 1.0).eval()
    again.load_state_dict(tables.state_dict())
    assert torch.equal(again(ids).concat, views.concat)


@settings(max_examples=20, deadline=None)
@given(cases(), st.data())
def test_dequantised_tables_read_the_same_and_can_be_trained(case, draw):
    reference, ids = case
    tables = EmbeddingTables(reference.schema, draw.draw(precisions(reference.plan)), 1.0).eval()
    tables.quantize_()
    before, state = tables(ids), {name: value.clone() for name, value in tables.state_dict().items()}
    tables.dequantize_()
    tables.dequantize_()
    after = tables(ids)
    torch.testing.assert_close(after.concat, before.concat)
    if before.first_order is not None:
        torch.testing.assert_close(after.first_order, before.first_order)
    if tables.weight.numel():
        tables.train()(ids).concat.sum().backward()
    tables.eval().quantize_()
    assert {name: value.shape for name, value in tables.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_what_quantised_tables_refuse():
    plan = SizePlan.full(SCHEMA, 4, first_order=True).with_bits(8)
    tables, ids = EmbeddingTables(SCHEMA, plan), torch.zeros(2, 3, dtype=torch.int32)
    with tables.gated(lambda concat: concat), pytest.raises(EmbtrimError, match="masked by a gate"):
        tables.quantize_()
    tables.quantize_()
    for refused in (
        tables.quantize_,
        lambda: tables.gated(lambda concat: concat).__enter__(),
        lambda: RowSGD(tables),
        lambda: tables.get_rows("f0", np.array([0])),
        lambda: tables.set_rows("f0", np.array([0]), torch.zeros(1, 4)),
        lambda: tables.train()(ids),
    ):
        with pytest.raises(EmbtrimError, match="these tables are quantised, for inference only"):
            refused()
    split = EmbeddingTables(SCHEMA, plan)
    split.split_by_width()
    with pytest.raises(EmbtrimError, match="split by width"):
        split.quantize_()


# ---- models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 2000), rng.integers(0, 400, 2000)
    label = (rng.random(2000) < 1 / (1 + np.exp(-(user % 5 - 2.0)))).astype(int)
    return pl.DataFrame({"user": [f"u{i}" for i in user], "item": [f"i{i}" for i in item], "click": label})


@pytest.mark.slow
def test_a_run_trains_in_fp32_and_keeps_the_quantised_model(raw, tmp_path):
    data = embtrim.encode(raw, label="click", out=tmp_path / "data")
    config = RunConfig(hparams={"embedding_dim": 8, "hidden_units": [8]}, bits=4,
                       train=TrainConfig(epochs=1, batch_size=256, learning_rate=1e-2, precision="fp32"))  # fmt: skip
    full = train_full(data, config)
    done = shrink(full, data, config.replace(method="pme", budget="8%"))
    assert done.plan is not None
    assert any(t.mixed for t in done.plan.tables)
    for table in done.plan.tables:
        stored = sum(rows * width for rows, width in table.segments)
        assert done.record.widths[table.name] * table.num_compact_rows == pytest.approx(stored)
    assert done.record.verification["passed"]
    assert (full.record.bits, done.record.bits) == (32, 4)
    assert full.record.model_params == sum(p.numel() for p in full.model.parameters())
    recoded = data.recode(done.plan)
    assert done.record.test["auc"] == evaluate(done.model, recoded, "test").auc
    tables = [v for name, v in done.model.state_dict().items() if name.startswith("tables.")]
    assert done.record.table_bytes == sum(v.nbytes for v in tables)

    save(done.model, tmp_path / "bundle", recoded)
    bundle = load_bundle(tmp_path / "bundle")
    ids = next(iter(recoded.batches("test", 100))).ids_BC
    assert torch.equal(bundle.model(ids), done.model(ids))
    assert np.isfinite(bundle.predict(raw.head(20))).all()
    for refused in (
        lambda: fit(done.model, recoded, config.train),
        lambda: fit(done.model, recoded, config.train.replace(tables="dense")),
        lambda: compact(done.model, done.plan, init="inherit"),
    ):
        with pytest.raises(EmbtrimError, match="these tables are quantised"):
            refused()
    fp32 = compact(full.model, done.plan)
    for refused in (lambda: save(fp32, tmp_path / "b", recoded), lambda: export(fp32, "pt2", tmp_path / "e")):
        with pytest.raises(EmbtrimError, match=r"its tables are still fp32; call model\.tables\.quantize_\(\)"):
            refused()
    mixed = shrink(full, data, config.replace(bits=None, method="uniform", budget="6%"))
    assert mixed.record.bits == "mixed"
    assert mixed.plan
    assert {table.bits for table in mixed.plan.tables} <= {16, 8, 4}
    with pytest.raises(PlanError, match="quantised by column, which TorchRec's configs cannot say"):
        export(done.model, "torchrec", tmp_path / "torchrec")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_exported_model_stays_quantised(format, tmp_path):
    from tests.serving import export_models

    like = export_models.model_of("deepfm", export_models.schema_of(), export_models.mixed_blocks)
    names = [t.name for t in like.tables.plan.tables]
    plan = like.tables.plan.with_bits(dict(zip(names, (4, 8, 16, 8), strict=True)))
    model = compact(DeepFM(like.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5), plan).eval()
    model.tables.quantize_()
    manifest = export(model, format, tmp_path / "out")
    export_models.check_agreement(model, tmp_path / "out", format)
    assert manifest["table_bytes"] == dataclasses.replace(plan, first_order=True).num_bytes()


def test_tables_that_are_coded_together_have_the_codes_of_each(monkeypatch):
    """Small tables of equally many rows side by side, a table alone, and one that is too large to be joined."""
    monkeypatch.setattr("embtrim.tables.packing.SMALL_VALUES", 60)
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, 3, 4), (7, 5, 4), (7, 3, 8), (9, 2, 4), (40, 4, 4), (40, 4, 4), (7, 0, 4), (0, 3, 4)]
    tables = [torch.randn(rows, width, generator=generator) for rows, width, _ in sizes]
    bits = [level for *_, level in sizes]
    assert together(tables, bits) == [[0, 1, 6], [2], [3], [4], [5], [7]]
    for found, table, level in zip(fit_each(tables, bits), tables, bits, strict=True):
        for joined, alone in zip(found, fit_codes(table, level), strict=True):
            torch.testing.assert_close(joined, alone, rtol=0, atol=0)
    weights = [torch.arange(len(table)) ** 2 for table in tables]
    for found, table, level, weight in zip(fit_each(tables, bits, weights), tables, bits, weights, strict=True):
        for joined, alone in zip(found, fit_codes(table, level, weight), strict=True):
            torch.testing.assert_close(joined, alone, rtol=0, atol=0)
    counts = [np.arange(len(table)) for table in tables]
    for level in (16, 4):
        for found, table, count in zip(errors_of_each(tables, counts, level), tables, counts, strict=True):
            np.testing.assert_allclose(found, code_errors(table, count, level), rtol=1e-12)


def weighted_error(table: torch.Tensor, count_N: torch.Tensor, codes: tuple[torch.Tensor, torch.Tensor], bits: int):
    return ((as_coded(table, *codes, bits) - table).double().square() * count_N[:, None]).sum(0)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_fitted_to_what_is_read(bits):
    """Rows that are read often are near the mean; a few rare ones are far away."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(400, 5, generator=generator)
    table[::40] *= 8
    count_N = torch.ones(400, dtype=torch.int64) * 1000
    count_N[::40] = 1
    plain, fitted = fit_codes(table, bits), fit_codes(table, bits, count_N)
    assert (weighted_error(table, count_N, fitted, bits) < 0.8 * weighted_error(table, count_N, plain, bits)).all()
    for one, other in zip(fit_codes(table, bits, torch.full((400,), 7)), plain, strict=True):
        torch.testing.assert_close(one, other)
    zeros = fit_codes(table, bits, torch.zeros(400))
    assert all(torch.equal(one, other) for one, other in zip(zeros, plain, strict=True)), "rows count once at least"


def test_quantize_takes_counts_by_table():
    model = DeepFM(Schema.from_sizes([90, 7]), embedding_dim=4, hidden_units=(8,), init_std=0.5)
    small = compact(model, model.tables.plan.with_bits(3), init="inherit")
    names = [table.name for table in small.tables.plan.tables]
    counts = {name: np.arange(rows, dtype=np.int64) ** 3 for name, rows in zip(names, (90, 7), strict=True)}
    rows = [small.tables.get_rows(name, np.arange(len(counts[name])))[0][1] for name in names]
    with pytest.raises(ModelError, match=r"counts has an array of shape \(3,\) for table .*; give one number for each"):
        small.tables.quantize_({**counts, names[0]: np.ones(3)})
    with pytest.raises(ModelError, match=r"counts has none for table"):
        small.tables.quantize_({names[0]: counts[names[0]]})
    quantize_(small, counts)
    small.tables.dequantize_()  # its rows can be read then
    for name, before in zip(names, rows, strict=True):
        codes = fit_codes(before, 3, torch.from_numpy(counts[name]))
        found = small.tables.get_rows(name, np.arange(len(before)))[0][1]
        torch.testing.assert_close(found, as_coded(before, *codes, 3), rtol=0, atol=1e-6)
        assert not torch.equal(torch.stack(codes), torch.stack(fit_codes(before, 3)))
