"""EmbeddingTables against a lookup in plain numpy, value by value, for random schemas and plans."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embtrim.errors import EmbtrimError, PlanError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.tables import embedding_tables as tables_module
from embtrim.tables.embedding_tables import EmbeddingTables, full_tables
from embtrim.tables.row_optimizers import RowSGD
from embtrim.tables.views import gram_parts


@pytest.fixture(autouse=True, scope="module")
def _short_runs():
    """Runs of a field or two, so that small schemas have several."""
    with mock.patch("embtrim.tables.layout.RUN_OUTPUTS", 4):
        yield


# ---- random schemas, plans and batches ---------------------------------------------------------------------------


@st.composite
def schemas(draw) -> Schema:
    num_tables = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 7), min_size=num_tables, max_size=num_tables))
    names = [f"t{i}" for i in range(num_tables)]
    readers = [*range(num_tables), *draw(st.lists(st.integers(0, num_tables - 1), max_size=2))]
    fields = []
    for place, number in enumerate(draw(st.permutations(readers))):
        length = draw(st.sampled_from([1, 1, 1, 3]))
        kind = "multi" if length > 1 else draw(st.sampled_from(["categorical", "categorical", "multi"]))
        pooling = draw(st.sampled_from(["mean", "sum"]))
        fields.append(FieldSpec(name=f"f{place}", type=kind, max_len=length, pooling=pooling, table=names[number],
                                vocab_size=sizes[number]))  # fmt: skip
    return Schema(label="label", fields=tuple(fields))


@st.composite
def table_plans(draw, name: str, num_rows: int, full_width: int) -> TablePlan:
    kind = draw(st.sampled_from(["full", "columns", "rows", "mixed", "mixed", "nothing"]))
    width = full_width if kind in ("full", "mixed") else draw(st.integers(1, full_width))  # a site may be narrower
    if kind == "full":
        return TablePlan(name, num_rows, width, (Block(num_rows, tuple(range(width))),))
    if kind == "nothing":
        return TablePlan(name, num_rows, width, ())
    alignment = draw(st.sampled_from(["concat", "scatter", "project"]))
    columns = tuple(sorted(draw(st.sets(st.integers(0, width - 1)))))
    if kind == "columns":
        return TablePlan(name, num_rows, width, (Block(num_rows, columns, alignment),))
    block_of_row = draw(st.lists(st.integers(-1, 2), min_size=num_rows, max_size=num_rows))
    groups = [np.flatnonzero(np.array(block_of_row) == i).astype(np.int32) for i in range(3)]
    if kind == "rows":
        blocks = [Block(len(rows), columns, alignment, rows) for rows in groups if len(rows)]
    else:
        widths = draw(st.lists(st.integers(0, width), min_size=3, max_size=3))
        blocks = [Block(len(r), w, "project", r) for r, w in zip(groups, widths, strict=True) if len(r)]
    return TablePlan(name, num_rows, width, tuple(blocks))


@st.composite
def cases(draw) -> tuple[EmbeddingTables, Tensor]:
    """Tables in float64 with random weights, and a batch of ids."""
    schema = draw(schemas())
    full_width = draw(st.integers(1, 4))
    plans = tuple(draw(table_plans(name, rows, full_width)) for name, rows in schema.tables.items())
    # "project" means the width of the widest table, so that a narrower one must not use it.
    assume(all(t.width == full_width or t.alignment != "project" for t in plans))
    assume(max(t.width for t in plans) == full_width)
    plan = SizePlan(schema.fingerprint, len(schema.id_fields), plans, draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tables = EmbeddingTables(schema, plan, 1.0, generator).double()
    with torch.no_grad():  # OOV and DROPPED rows, which start at zero, must be told apart too
        for weight in (tables.weight, tables.first_order):
            if weight is not None:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    compact_rows = {t.name: t.num_compact_rows for t in plans}
    columns = []
    for field in schema.id_fields:
        low = PAD if tables.layout.is_pooled else 0
        columns += [torch.randint(low, compact_rows[field.table_name], (6,), generator=generator) for _ in range(field.length)]  # fmt: skip
    return tables, torch.stack(columns, 1).int()


# ---- the definition, value by value ------------------------------------------------------------------------------


def row_vector(tables: EmbeddingTables, table: TablePlan, compact_id: int) -> np.ndarray:
    """The embedding of one row: its own columns, or D columns if the table is mixed."""
    ((_, values),) = tables.get_rows(table.name, np.array([compact_id]))
    vector = values[0].numpy()
    if not table.mixed or len(vector) == table.width:
        return vector
    if len(vector) == 0:
        return np.zeros(table.width)
    return vector @ tables.shared_projections[str(len(vector))].detach().numpy()


def naive(tables: EmbeddingTables, ids_BC: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """concat (B, S), aligned (B, F, D) and first-order sums (B,)."""
    plans = {t.name: t for t in tables.plan.tables}
    num_fields, width = len(tables.schema.id_fields), tables.plan.width
    aligned = np.zeros((len(ids_BC), num_fields, width))
    first_order = np.zeros(len(ids_BC))
    concat = []
    for b, ids in enumerate(ids_BC.tolist()):
        outputs = []
        for f, (field, span) in enumerate(zip(tables.schema.id_fields, tables.schema.column_slices, strict=True)):
            table = plans[field.table_name]
            used = [i for i in ids[span] if i != PAD]
            share = 1 / len(used) if field.pooling == "mean" and used else 1.0
            vector = np.zeros(table.output_width)
            for i in used:
                vector = vector + share * row_vector(tables, table, i)
                if tables.first_order is not None:
                    first_order[b] += share * float(
                        tables.first_order.detach()[tables.storage_rows(table.name, np.array([i]))]
                    )
            outputs.append(vector)
            if table.alignment == "project" and 0 < table.output_width < table.width:
                aligned[b, f] = vector @ own_projection(tables, f)
            else:
                aligned[b, f, list(table.columns)] = vector
        concat.append(np.concatenate(outputs))
    return np.stack(concat), aligned, first_order


def own_projection(tables: EmbeddingTables, field: int) -> np.ndarray:
    """(d, D) projection of a uniform table's field: tables lie in `projection` in the order of the schema's tables."""
    start = 0
    for table in tables.plan.tables:
        if table.alignment == "project" and not table.mixed and 0 < table.output_width < table.width:
            if table.name == tables.schema.id_fields[field].table_name:
                return tables.projection[start : start + table.output_width].detach().numpy()
            start += table.output_width
    raise AssertionError("no projection")


def naive_fm(aligned_BFD: np.ndarray) -> np.ndarray:
    """(B,): the sum over pairs of fields of their inner products."""
    num_fields = aligned_BFD.shape[1]
    pairs = [(i, j) for i in range(num_fields) for j in range(i)]
    return sum(((aligned_BFD[:, i] * aligned_BFD[:, j]).sum(1) for i, j in pairs), np.zeros(len(aligned_BFD)))


def all_paths(tables: EmbeddingTables, ids: Tensor):
    """(name, views) of each way through forward."""
    tables.eval()
    yield "elements", tables(ids)
    with mock.patch.object(tables_module, "ELEMENT_GATHER_ROWS", 0):
        yield "direct", tables(ids)
    with tables.gated(row_gate=lambda rows, values: values):
        yield "distinct", tables(ids)
    RowSGD(tables)
    yield "attached, eval", tables(ids)
    tables.train()
    yield "attached", tables(ids)
    tables.attach(None)
    exported = copy.deepcopy(tables).eval()
    exported.split_by_width()
    yield "split by width", exported(ids)


def test_the_form_that_is_exported_has_the_fm_term_of_projected_and_whole_tables():
    """Indices of the exported form are int32, which not every operator takes."""
    schema = Schema.from_sizes([4, 3, 5])
    tables = [
        TablePlan(name, rows, 2, (Block(rows, tuple(range(width)), "project"),))
        for (name, rows), width in zip(schema.tables.items(), (2, 1, 2), strict=True)
    ]
    plan = dataclasses.replace(SizePlan.full(schema, 2), tables=tuple(tables))
    tables = EmbeddingTables(schema, plan, init_std=1.0, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([[1, 2, 3], [3, 0, 4]], dtype=torch.int32)
    expected = tables(ids).fm().detach()
    tables.eval().split_by_width()
    torch.testing.assert_close(tables(ids).fm().detach(), expected)


@settings(max_examples=150, deadline=None)
@given(cases())
@pytest.mark.slow
def test_every_path_equals_the_naive_lookup(case):
    tables, ids = case
    concat, aligned, first_order = naive(tables, ids)
    for name, views in all_paths(tables, ids):
        np.testing.assert_allclose(views.concat.detach(), concat, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(views.aligned.detach(), aligned, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(views.fm().detach(), naive_fm(aligned), atol=1e-10, err_msg=name)
        if tables.first_order is None:
            assert views.first_order is None
        else:
            np.testing.assert_allclose(views.first_order.detach(), first_order, atol=1e-10, err_msg=name)


def fm_and_gradients(tables: EmbeddingTables, ids: Tensor) -> list[Tensor]:
    """The FM term of a batch, and the gradients of all parameters under a slope for each sample."""
    tables.zero_grad(set_to_none=True)
    fm_B = tables(ids).fm()
    if fm_B.requires_grad:
        (fm_B * torch.linspace(-1, 2, len(fm_B), dtype=fm_B.dtype)).sum().backward()
    grads = [torch.zeros(0) if p.grad is None else p.grad.clone() for p in tables.parameters()]
    return [fm_B.detach(), *grads]


@settings(max_examples=150, deadline=None)
@given(cases())
@pytest.mark.slow
def test_fm_and_its_gradient_by_hand_are_those_of_autograd(case):
    tables, ids = case
    by_hand = fm_and_gradients(tables, ids)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        by_autograd = fm_and_gradients(tables, ids)
    for found, wanted in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("align", ["full", "scatter", "project"])
def test_to_the_gradient_of_fm_others_can_be_added_in_place(align):
    schema = Schema.from_sizes([20, 30])
    plan = SizePlan.full(schema, width=6)
    if align != "full":
        plan = plan.with_columns({"f0": [0, 2, 5], "f1": [1, 2]}, align)
    views = EmbeddingTables(schema, plan, init_std=1.0)(torch.randint(0, 10, (64, 2)))
    (grad_BS,) = torch.autograd.grad(views.fm().sum(), views.concat)
    assert not grad_BS._is_view()  # autograd copies those


@pytest.mark.parametrize("align", ["full", "scatter", "project"])
def test_fm_under_autocast_stays_near_that_in_fp32(align):
    schema = Schema.from_sizes([20, 30, 10])
    plan = SizePlan.full(schema, width=6)
    if align != "full":
        plan = plan.with_columns({"f0": [0, 2, 5], "f1": [1, 2], "f2": range(6)}, align)
    tables = EmbeddingTables(schema, plan, init_std=1.0, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 10, (64, 3), generator=torch.Generator().manual_seed(1))
    exact = fm_and_gradients(tables, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = fm_and_gradients(tables, ids)
        in_double = fm_and_gradients(copy.deepcopy(tables).double(), ids)
    for value, wanted, double in zip(found, exact, in_double, strict=True):
        assert value.dtype == torch.float32
        # Eight bits of mantissa; differences of large numbers lose some of them.
        assert (value - wanted).abs().max() <= 0.05 * wanted.abs().max()
        assert double.dtype == torch.float64  # which autocast leaves alone
        torch.testing.assert_close(double.float(), wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(cases())
@pytest.mark.slow
def test_gradients_of_the_attached_path_are_those_of_dense_autograd(case):
    tables, ids = case
    generator = torch.Generator().manual_seed(0)

    def backward(views) -> None:
        slope = torch.randn(views.concat.shape, generator=generator.manual_seed(1), dtype=torch.float64)
        loss = (views.concat * slope).sum() + views.fm().sum() + views.aligned.square().sum()
        if views.first_order is not None:
            loss = loss + views.first_order.square().sum()
        if loss.requires_grad:
            loss.backward()

    backward(tables.eval()(ids))
    dense = {name: p.grad for name, p in tables.named_parameters()}
    tables.zero_grad(set_to_none=True)
    RowSGD(tables)
    backward(tables.train()(ids))
    sparse = {name: p.grad for name, p in tables.named_parameters()}
    assert sparse.pop("weight") is None
    assert sparse.pop("first_order", None) is None
    weight_grad, first_order_grad = torch.zeros_like(tables.weight), torch.zeros(tables.num_rows, dtype=torch.float64)
    for lookup in tables.lookups:
        for group, (low, high), leaf in zip(tables.groups, lookup.bounds, lookup.leaves, strict=True):
            view = weight_grad[group.offset : group.offset + group.num_rows * group.width].view(-1, group.width) \
                if group.width else None  # fmt: skip
            if view is not None and leaf.grad is not None:
                view[lookup.rows_U[low:high].long() - group.start] = leaf.grad
        if lookup.first_order_U is not None and lookup.first_order_U.grad is not None:
            first_order_grad[lookup.rows_U.long()] = lookup.first_order_U.grad
    expected = dense.pop("weight")
    torch.testing.assert_close(weight_grad, torch.zeros_like(weight_grad) if expected is None else expected)
    if tables.first_order is not None:
        torch.testing.assert_close(first_order_grad, dense.pop("first_order"))
    for name, gradient in dense.items():
        left = torch.zeros(()) if sparse[name] is None else sparse[name]
        right = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(left.expand_as(right), right, msg=name)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_storage_is_what_the_plan_counts(case):
    tables, _ = case
    stored = sum(p.numel() for name, p in tables.named_parameters() if name != "first_order")
    assert stored == tables.plan.num_params
    assert (0 if tables.first_order is None else tables.first_order.numel()) == tables.plan.num_first_order_params
    assert tables.num_rows == sum(t.num_compact_rows for t in tables.plan.tables)
    assert set(tables.state_dict()) == {name for name, _ in tables.named_parameters()}, "index buffers are not saved"


@settings(max_examples=100, deadline=None)
@given(cases())
def test_storage_rows_are_a_numbering_and_rows_are_read_as_written(case):
    tables, _ = case
    seen = []
    for table in tables.plan.tables:
        ids = np.arange(table.num_compact_rows)
        seen.append(tables.storage_rows(table.name, ids))
        values = torch.randn(len(ids), tables.width, dtype=torch.float64)
        tables.set_rows(table.name, ids, values)
        widths = np.concatenate([np.full(n, w) for n, w in table.segments])
        covered = []
        for places, found in tables.get_rows(table.name, ids):
            assert (widths[places] == found.shape[1]).all()
            assert torch.equal(found, values[places, : found.shape[1]])
            covered.append(places)
        assert np.array_equal(np.sort(np.concatenate(covered)), ids)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(tables.num_rows))


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_oov_and_dropped_rows_start_at_zero_and_no_others():
    schema = Schema.from_sizes([5, 4])
    tables_ = (
        TablePlan("f0", 5, 3, (Block(2, (0, 2), rows=np.array([0, 3], np.int32)),)),
        TablePlan("f1", 4, 3, (Block(2, 1, "project", np.array([1, 2], np.int32)), Block(1, 3, "project", np.array([0], np.int32)))),
    )  # fmt: skip
    tables = EmbeddingTables(schema, SizePlan(schema.fingerprint, 2, tables_, first_order=True), init_std=1.0)
    zero = {(name, i) for name in ("f0", "f1") for i in range(4 if name == "f1" else 3)
            if not any(bool(v.any()) for _, v in tables.get_rows(name, np.array([i])))}  # fmt: skip
    # f0: OOV -> 0, 3 -> 1, DROPPED -> 2. f1: rows 1, 2 -> 0, 1; OOV -> 2; DROPPED, beside the widest block -> 3.
    assert zero == {("f0", 0), ("f0", 2), ("f1", 2), ("f1", 3)}
    by_hand = [tables.storage_rows(name, np.array([i]))[0] for name, i in zero]
    assert sorted(by_hand) == torch.nonzero(tables.first_order == 0).squeeze(1).tolist()


def test_initial_weights_have_the_std_asked_for_and_follow_the_generator():
    one, two = (full_tables(Schema.from_sizes([20_000]), 4, True, 0.3, torch.Generator().manual_seed(5)) for _ in "ab")
    assert torch.equal(one.weight, two.weight)
    assert float(one.weight.detach().std()) == pytest.approx(0.3, rel=0.02)
    assert float(one.first_order.detach().std()) == pytest.approx(0.3, rel=0.02)


def test_rows_of_one_width_lie_together():
    schema = Schema.from_sizes([3, 4, 5])
    plan = SizePlan.full(schema, 4).with_columns({"f0": [1, 2], "f1": [0], "f2": [0, 3]})
    tables = EmbeddingTables(schema, plan)
    assert [(g.width, g.start, g.num_rows, g.offset) for g in tables.groups] == [(2, 0, 8, 0), (1, 8, 4, 16)]
    assert tables.widths == (2, 1, 2)
    with torch.no_grad():
        tables.weight.copy_(torch.arange(20.0))
    views = tables(torch.tensor([[2, 1, 0]]))
    assert views.concat.tolist() == [[4.0, 5.0, 17.0, 6.0, 7.0]]
    assert views.aligned.tolist() == [[[0.0, 4.0, 5.0, 0.0], [17.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 7.0]]]


def test_multi_valued_fields_pool_and_pad_reads_zero():
    fields = (
        FieldSpec(name="genres", type="multi", max_len=3, vocab_size=4),
        FieldSpec(name="history", type="multi", max_len=2, pooling="sum", table="item", vocab_size=4),
        FieldSpec(name="item", vocab_size=4),
    )
    tables = full_tables(Schema(label="label", fields=fields), 1, first_order=True)
    with torch.no_grad():
        tables.weight.copy_(torch.tensor([1.0, 2, 4, 8, 10, 20, 40, 80]))
        tables.first_order.copy_(tables.weight)
    ids = torch.tensor([[0, 3, PAD, 1, 2, 3], [PAD, PAD, PAD, PAD, 1, 1]], dtype=torch.int32)
    views = tables(ids)
    assert views.concat.tolist() == [[(1 + 8) / 2, 20 + 40, 80], [0, 20, 20]]
    assert views.first_order.tolist() == [4.5 + 60 + 80, 40]


def test_row_gate_scales_distinct_rows_before_pooling_and_shows_their_gradient():
    fields = (FieldSpec(name="genres", type="multi", max_len=2, pooling="sum", vocab_size=4),)
    tables = full_tables(Schema(label="label", fields=fields), 2, init_std=1.0)
    ids = torch.tensor([[1, 2], [1, PAD], [3, 3]], dtype=torch.int32)
    plain = tables(ids).concat.detach()
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    with tables.gated(row_gate=lambda rows, values: values * gate[rows.long()][:, None]):
        gated = tables(ids).concat
    value = {i: tables.get_rows("genres", np.array([i]))[0][1][0] for i in range(4)}
    torch.testing.assert_close(gated, torch.stack([value[2], torch.zeros(2), 2 * value[3]]))
    gated.sum().backward()
    torch.testing.assert_close(
        gate.grad, torch.stack([torch.zeros(()), 2 * value[1].sum(), value[2].sum(), 2 * value[3].sum()])
    )
    assert torch.equal(tables(ids).concat, plain), "the gate is gone after the block"


def test_slot_gate_may_differ_per_sample_and_reaches_every_view():
    tables = full_tables(Schema.from_sizes([4, 4]), 2, init_std=1.0)
    ids = torch.tensor([[1, 2], [3, 1]])
    plain = tables(ids).concat
    gate = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0.5, 1]])
    with tables.gated(slot_gate=lambda concat: concat * gate):
        views = tables(ids)
    torch.testing.assert_close(views.concat, plain * gate)
    torch.testing.assert_close(views.aligned, (plain * gate).view(2, 2, 2))
    torch.testing.assert_close(views.fm(), (views.aligned[:, 0] * views.aligned[:, 1]).sum(1))


def test_projections_of_many_fields_take_memory_in_proportion_to_the_fields():
    def numbers(num_fields: int) -> int:
        schema = Schema.from_sizes([3] * num_fields)
        full = SizePlan.full(schema, 4)
        tables = EmbeddingTables(schema, full.with_columns({t.name: (0, 2) for t in full.tables}, "project"))
        return sum(b.numel() for b in tables.buffers()) + sum(gram.numel() for gram in gram_parts(tables))

    assert numbers(80) <= 2.1 * numbers(40)


def test_gates_do_not_nest_and_are_gone_after_an_error():
    tables = full_tables(Schema.from_sizes([4]), 2)
    with tables.gated(slot_gate=lambda x: x), pytest.raises(EmbtrimError, match="gates do not nest"):
        with tables.gated(row_gate=lambda rows, x: x):
            pass
    with pytest.raises(RuntimeError), tables.gated(slot_gate=lambda x: x):
        raise RuntimeError
    assert tables.slot_gate is None


def test_gates_act_while_a_row_optimizer_learns():
    tables = full_tables(Schema.from_sizes([4]), 2, init_std=1.0)
    RowSGD(tables)
    gate = torch.ones(4, requires_grad=True)
    with tables.gated(row_gate=lambda rows, values: values * gate[rows.long()][:, None]):
        tables(torch.tensor([[1], [2], [1]])).concat.sum().backward()
    ((_, one),) = tables.get_rows("f0", np.array([1]))
    torch.testing.assert_close(gate.grad[1], 2 * one.sum())
    assert tables.lookups[0].leaves[0].grad.tolist() == [[2, 2], [1, 1]]
    assert gate.grad[3] == 0


def test_ids_of_any_integer_type():
    tables = full_tables(Schema.from_sizes([5, 5]), 2, True, 1.0)
    ids = torch.tensor([[1, 2], [3, 4]])
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(tables(ids.to(dtype)).concat, tables(ids).concat)


def test_a_batch_without_rows():
    tables = full_tables(Schema.from_sizes([5, 5]), 2, True)
    views = tables(torch.zeros(0, 2, dtype=torch.int32))
    assert views.concat.shape == (0, 4)
    assert views.fm().shape == (0,)


def test_tables_of_another_schema_are_refused():
    with pytest.raises(PlanError, match="search again"):
        EmbeddingTables(Schema.from_sizes([5]), SizePlan.full(Schema.from_sizes([6]), 2))
    with pytest.raises(PlanError, match="embedding_dim must be 0 or more, given -1"):
        full_tables(Schema.from_sizes([5]), -1)


def test_looking_up_does_not_leak_lookups():
    import gc
    import weakref

    tables = full_tables(Schema.from_sizes([5]), 2)
    optimizer = RowSGD(tables)
    gc.collect()
    gc.disable()
    try:
        tables(torch.tensor([[1]])).concat.sum().backward()
        leaf = weakref.ref(tables.lookups[0].leaves[0])
        optimizer.step()
        assert leaf() is None
    finally:
        gc.enable()
