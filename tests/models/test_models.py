"""Base models against independent NumPy formulas; compact models against masked ones; sizes, seeds, errors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json

import numpy as np
import pytest
import torch

from embtrim.errors import ConfigError, DataError, EmbtrimError, PlanError
from embtrim.models import DCN, DLRM, FM, FNN, IPNN, LR, MODELS, DCNv2, DeepFM, build
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.training.evaluation import evaluate
from embtrim.training.fitting import fit

DIM = 5
NAMES = list(MODELS)
WITH_EMBEDDINGS = [name for name in NAMES if name != "lr"]


def make_schema(dense: bool = True) -> Schema:
    """Two plain fields, a mean-pooled one, a sum-pooled one that shares the second field's table, and two dense fields."""
    fields = [
        FieldSpec(name="user", vocab_size=9),
        FieldSpec(name="item", vocab_size=7),
        FieldSpec(name="tags", vocab_size=6, type="multi", max_len=3),
        FieldSpec(name="history", vocab_size=7, type="multi", max_len=4, pooling="sum", table="item"),
        FieldSpec(name="place", vocab_size=4),
    ]
    if dense:
        fields.insert(1, FieldSpec(name="price", type="dense", transform="none"))
        fields.append(FieldSpec(name="age", type="dense", transform="none"))
    return Schema(label="y", fields=tuple(fields))


def make_batch(schema: Schema, rows: int = 17, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    rng = np.random.default_rng(seed)
    columns = []
    for field in schema.id_fields:
        ids = rng.integers(0, field.vocab_size, (rows, field.length))
        if field.type == "multi":
            ids[rng.random(ids.shape) < 0.4] = PAD  # some rows have no value at all
        columns.append(ids)
    dense = torch.from_numpy(rng.normal(size=(rows, len(schema.dense_fields)))) if schema.dense_fields else None
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.int32)), dense


def make_model(name: str, schema: Schema, **hparams):
    """A small float64 model in eval mode, with random weights and running statistics that have an effect."""
    takes = inspect.signature(MODELS[name].__init__).parameters
    small = {"embedding_dim": DIM, "hidden_units": (8, 6), "bottom_units": (7,), "num_cross_layers": 3}
    model = build(name, schema, **{k: v for k, v in {**small, **hparams}.items() if k in takes}).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 1, generator=generator)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return model


# ---- NumPy formulas, one sample at a time -----------------------------------------------------------------------


class Sample:
    """One row as the formulas read it: embeddings, first-order sum, dense values; `w` holds the model's weights."""

    def __init__(self, model, ids: np.ndarray, dense: np.ndarray) -> None:
        self.w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        schema = model.schema
        width = model.tables.width
        start, tables, first = 0, {}, {}
        for table, rows in schema.tables.items():  # full tables of one width lie one after the other
            tables[table] = self.w["tables.weight"].reshape(-1, width)[start : start + rows] if width else None
            if model.has_first_order:
                first[table] = self.w["tables.first_order"][start : start + rows]
            start += rows
        self.dense = dense
        self.e: list[np.ndarray] = []
        self.first_order = 0.0
        for field, columns in zip(schema.id_fields, schema.column_slices, strict=True):
            used = [i for i in ids[columns] if i != PAD]
            share = 1 / len(used) if used and field.pooling == "mean" else 1.0
            vector = np.zeros(width)
            for i in used:
                if width:
                    vector = vector + share * tables[field.table_name][i]
                if model.has_first_order:
                    self.first_order += share * first[field.table_name][i]
            self.e.append(vector)
        self.x = np.concatenate([*self.e, dense])

    def linear(self) -> float:
        return self.w["linear.bias"][0] + self.first_order + float(np.dot(self.w["linear.dense_E"], self.dense))

    def products(self, vectors) -> list[float]:
        return [float(np.dot(a, b)) for a, b in itertools.combinations(vectors, 2)]

    def mlp(self, prefix: str, x: np.ndarray, num_hidden: int, batch_norm: bool = True, output: bool = True):
        """Each hidden layer is Linear, batch norm with running statistics, and ReLU; then a Linear. Dropout does nothing."""
        step = 3 if batch_norm else 2
        for layer in range(num_hidden):
            x = self.w[f"{prefix}.{layer * step}.weight"] @ x + self.w[f"{prefix}.{layer * step}.bias"]
            if batch_norm:
                bn = {
                    k: self.w[f"{prefix}.{layer * step + 1}.{k}"]
                    for k in ("running_mean", "running_var", "weight", "bias")
                }
                x = (x - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
            x = np.maximum(x, 0)
        last = num_hidden * step
        return self.w[f"{prefix}.{last}.weight"] @ x + self.w[f"{prefix}.{last}.bias"] if output else x


def lr_logit(s: Sample, bn: bool) -> float:
    return s.linear()


def fm_logit(s: Sample, bn: bool) -> float:
    return s.linear() + sum(s.products(s.e))


def fnn_logit(s: Sample, bn: bool) -> float:
    return s.mlp("mlp", s.x, 2, bn)[0]


def ipnn_logit(s: Sample, bn: bool) -> float:
    return s.mlp("mlp", np.concatenate([*s.e, s.products(s.e), s.dense]), 2, bn)[0]


def widedeep_logit(s: Sample, bn: bool) -> float:
    return s.linear() + s.mlp("mlp", s.x, 2, bn)[0]


def deepfm_logit(s: Sample, bn: bool) -> float:
    return s.linear() + sum(s.products(s.e)) + s.mlp("mlp", s.x, 2, bn)[0]


def dcn_logit(s: Sample, bn: bool) -> float:
    x = s.x
    for w, b in zip(s.w["cross.weight_LN"], s.w["cross.bias_LN"], strict=True):
        x = np.outer(s.x, x) @ w + b + x  # x_0 x_l^T w_l + b_l + x_l, as the paper writes it
    h = s.mlp("deep", s.x, 2, bn, output=False)
    return float(s.w["out.weight"][0] @ np.concatenate([x, h]) + s.w["out.bias"][0])


def dcnv2_logit(s: Sample, bn: bool) -> float:
    x = s.x
    for layer in range(3):
        x = s.x * (s.w[f"cross.{layer}.weight"] @ x + s.w[f"cross.{layer}.bias"]) + x
    h = s.mlp("deep", s.x, 2, bn, output=False)
    return float(s.w["out.weight"][0] @ np.concatenate([x, h]) + s.w["out.bias"][0])


def dlrm_logit(s: Sample, bn: bool) -> float:
    vectors, z = s.e, np.zeros(0)
    if len(s.dense):
        z = np.maximum(s.mlp("bottom", s.dense, 1, bn), 0)
        vectors = [*s.e, z]
    return s.mlp("mlp", np.concatenate([s.products(vectors), z]), 2, bn)[0]


FORMULAS = {
    "lr": lr_logit, "fm": fm_logit, "fnn": fnn_logit, "ipnn": ipnn_logit, "widedeep": widedeep_logit,
    "deepfm": deepfm_logit, "dcn": dcn_logit, "dcnv2": dcnv2_logit, "dlrm": dlrm_logit,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_model_equals_its_formula(name, dense, batch_norm):
    schema = make_schema(dense)
    model = make_model(name, schema, batch_norm=batch_norm)
    ids, values = make_batch(schema)
    expected = [
        FORMULAS[name](Sample(model, row, np.zeros(0) if values is None else values[n].numpy()), batch_norm)
        for n, row in enumerate(ids.numpy())
    ]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(model(ids, values).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_folded_model_gives_the_same_logits_without_norms(name):
    schema = make_schema()
    model = make_model(name, schema, dropout=0.3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded, batch = model.folded(), make_batch(schema)
    assert not any(isinstance(part, (torch.nn.BatchNorm1d, torch.nn.Dropout)) for part in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(*batch), model(*batch), rtol=1e-10, atol=1e-12)
    assert folded.tables is model.tables
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_cross_only_models_have_no_deep_part():
    schema = make_schema()
    ids, values = make_batch(schema)
    for name in ("dcn", "dcnv2"):
        model = make_model(name, schema, hidden_units=())
        assert model.out.in_features == 5 * DIM + 2
        assert model(ids, values).shape == (17,)


# ---- compact equals masked --------------------------------------------------------------------------------------


def column_plan(model, columns: dict[str, tuple[int, ...]], alignment="scatter") -> SizePlan:
    return model.tables.plan.with_columns(columns, alignment)


def random_columns(schema: Schema, seed: int) -> dict[str, tuple[int, ...]]:
    """A plan whose tables keep 0 to D columns each, the first table none."""
    rng = np.random.default_rng(seed)
    sizes = [0, *rng.integers(1, DIM + 1, len(schema.tables) - 1)]
    return {t: tuple(rng.choice(DIM, n, replace=False)) for t, n in zip(schema.tables, sizes, strict=True)}


@torch.no_grad()
def inherit(full, plan: SizePlan, fold: bool = True):
    """A compact model with the weights that the plan keeps of the full model."""
    small = type(full)(full.schema, plan=plan, **full.hparams).double().eval()
    for table in plan.tables:
        ids = np.arange(table.num_rows)
        if table.output_width:
            small.tables.set_rows(table.name, ids, full.tables.get_rows(table.name, ids)[0][1][:, list(table.columns)])
        if full.has_first_order:
            to, source = (m.tables.storage_rows(table.name, ids) for m in (small, full))
            small.tables.first_order[to] = full.tables.first_order[source]
    index = {}
    for read in small.reads():
        sizes = [len(full.kept_inputs(part)) for part in read.parts]
        offsets = np.cumsum([0, *sizes[:-1]]).tolist()
        kept = [small.kept_inputs(part) + at for part, at in zip(read.parts, offsets, strict=True)]
        index[read.parameter, read.axis] = torch.cat(kept)
    source = full.state_dict()
    for name, value in small.state_dict().items():
        if not name.startswith("tables."):
            taken = source[name]
            for axis in range(taken.ndim):
                if (name, axis) in index:
                    taken = taken.index_select(axis, index[name, axis])
            value.copy_(taken)
    if fold:
        small.fold_dropped(full)
    return small


@torch.no_grad()
def masked(full, plan: SizePlan):
    """A copy of the full model with the removed entries set to zero."""
    model = copy.deepcopy(full)
    for table in plan.tables:
        ids = np.arange(table.num_rows)
        values = model.tables.get_rows(table.name, ids)[0][1]
        model.tables.set_rows(table.name, ids, values * torch.from_numpy(table.kept_mask()))
    return model


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_compact_equals_masked(name, dense, seed):
    schema = make_schema(dense)
    full = make_model(name, schema)
    plan = column_plan(full, random_columns(schema, seed))
    small, reference = inherit(full, plan), masked(full, plan)
    for batch_seed, rows in ((0, 100), (1, 3)):
        ids, values = make_batch(schema, rows, batch_seed)
        expected = reference(ids, values)
        assert (expected - full(ids, values)).abs().max() > 0.01
        difference = (small(ids, values) - expected).abs() / (1 + expected.abs())
        assert difference.max() <= 1e-9


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_compact_equals_masked_when_nothing_is_left(name):
    schema = make_schema(dense=False)
    full = make_model(name, schema)
    plan = column_plan(full, {})
    ids, _ = make_batch(schema)
    torch.testing.assert_close(inherit(full, plan)(ids), masked(full, plan)(ids), rtol=1e-9, atol=1e-9)


def test_dcn_needs_the_folded_constants():
    schema = make_schema()
    full = make_model("dcn", schema)
    plan = column_plan(full, random_columns(schema, 0))
    ids, values = make_batch(schema)
    reference = masked(full, plan)(ids, values)
    assert (inherit(full, plan, fold=False)(ids, values) - reference).abs().max() > 0.01
    small = inherit(full, plan)
    assert small.cross.carried_L[0] == 0
    assert small.cross.carried_L[1:].abs().min() > 0
    again = small.out.bias.clone()
    small.fold_dropped(full)
    assert torch.equal(small.out.bias, again)
    assert "cross.carried_L" in small.state_dict()
    assert not any(p is small.cross.carried_L for p in small.parameters())


def test_dcn_folded_constants_by_hand():
    """One field of width 2 without column 1, two cross layers: the column holds 0, b_0, b_0 + b_1 in x_0, x_1, x_2."""
    full = DCN(Schema.from_sizes([3]), embedding_dim=2, hidden_units=(2,), num_cross_layers=2).double()
    with torch.no_grad():
        full.cross.weight_LN.copy_(torch.tensor([[1.0, 7.0], [2.0, 3.0]]))
        full.cross.bias_LN.copy_(torch.tensor([[0.1, 0.5], [0.2, 0.25]]))
        full.out.weight.copy_(torch.tensor([[1.0, 4.0, 0.0, 0.0]]))
        full.out.bias.fill_(10.0)
    small = inherit(full, column_plan(full, {"f0": (0,)}))
    assert small.cross.carried_L.tolist() == [0.0, 3.0 * 0.5]
    assert small.out.bias.tolist() == [10.0 + 4.0 * (0.5 + 0.25)]
    assert small.cross.weight_LN.tolist() == [[1.0], [2.0]]


# ---- what is kept -----------------------------------------------------------------------------------------------


def test_kept_inputs_by_hand():
    schema = Schema.from_sizes([4, 4, 4])
    full = IPNN(schema, embedding_dim=3, hidden_units=(4,))
    assert full.kept_inputs("concat").tolist() == list(range(9))
    assert full.kept_inputs("pairs").tolist() == [0, 1, 2]
    assert full.kept_inputs("dense").tolist() == []

    def kept(columns, alignment="scatter"):
        small = IPNN(schema, plan=column_plan(full, columns, alignment), embedding_dim=3, hidden_units=(4,))
        return small.kept_inputs("concat").tolist(), small.kept_inputs("pairs").tolist()

    # f0 and f2 have no column in common, f1 has none.
    assert kept({"f0": (0, 2), "f2": (1,)}) == ([0, 2, 7], [])
    # A projection reaches every column, but a field of width 0 none.
    assert kept({"f0": (0, 2), "f2": (1,)}, "project") == ([0, 2, 7], [1])
    # f0 f1 share column 2, f1 f2 share column 1, f0 f2 nothing.
    assert kept({"f0": (0, 2), "f1": (1, 2), "f2": (1,)}) == ([0, 2, 4, 5, 7], [0, 2])


def test_kept_pairs_of_dlrm_include_the_dense_vector():
    fields = (*Schema.from_sizes([4, 4, 4]).fields, FieldSpec(name="x", type="dense", transform="none"))
    schema = Schema(label="y", fields=fields)
    full = DLRM(schema, embedding_dim=3, hidden_units=(4,))
    assert full.kept_inputs("pairs").tolist() == [0, 1, 2, 3, 4, 5]
    small = DLRM(schema, plan=column_plan(full, {"f0": (0, 2), "f2": (1,)}), embedding_dim=3, hidden_units=(4,))
    # Pairs: f0f1 f0f2 f0z f1f2 f1z f2z.
    assert small.kept_inputs("pairs").tolist() == [2, 5]
    assert small.kept_inputs("bottom").tolist() == [0, 1, 2]
    assert small.mlp[0].weight.shape == (4, 5)


def test_rows_of_several_widths_keep_every_column():
    schema = Schema.from_sizes([4, 6])
    full = SizePlan.full(schema, 3)
    rows = (np.array([0, 1, 2], np.int32), np.array([3, 4, 5], np.int32))
    blocks = (Block(3, (0, 1, 2), "project", rows[0]), Block(3, 1, "project", rows[1]))
    plan = dataclasses.replace(full, tables=(full.tables[0], TablePlan("f1", 6, 3, blocks)))
    model = IPNN(schema, plan=plan, hidden_units=(4,))
    assert model.kept_inputs("concat").tolist() == [0, 1, 2, 3, 4, 5]
    assert model.kept_inputs("pairs").tolist() == [0]


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_compact_models_are_smaller(name):
    schema = make_schema()
    full = make_model(name, schema)
    plan = column_plan(full, {"user": (0,), "tags": (1, 3), "item": (0, 1)})
    small = type(full)(schema, plan=plan, **full.hparams)
    width = 1 + 2 + 2 + 2  # user, item, tags, history; place keeps none
    assert small.tables.widths == (1, 2, 2, 2, 0)
    assert small.tables.weight.numel() == 9 * 1 + 7 * 2 + 6 * 2
    # user-item 0, user-history 0, item-tags 1, item-history both, tags-history 1; with z each of the four.
    sizes = {
        "fm": 0, "fnn": 8 * (width + 2), "widedeep": 8 * (width + 2), "deepfm": 8 * (width + 2),
        "ipnn": 8 * (width + 5 + 2), "dlrm": 8 * (5 + 4 + DIM), "dcn": 8 * (width + 2), "dcnv2": 8 * (width + 2),
    }  # fmt: skip
    first = {"dcn": "deep.0.weight", "dcnv2": "deep.0.weight"}.get(name, "mlp.0.weight")
    parameters = dict(small.named_parameters())
    assert (parameters[first].numel() if name != "fm" else 0) == sizes[name]
    if name == "dcn":
        assert parameters["cross.weight_LN"].shape == parameters["cross.bias_LN"].shape == (3, width + 2)
    if name == "dcnv2":
        assert all(parameters[f"cross.{n}.weight"].shape == (width + 2, width + 2) for n in range(3))
    read = {(r.parameter, r.axis) for r in full.reads()}
    for key, value in full.named_parameters():
        for axis in range(value.ndim):
            if not key.startswith("tables."):
                smaller = parameters[key].shape[axis] < value.shape[axis]
                assert smaller == ((key, axis) in read), (key, axis)


# ---- seeds, learning, state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_the_seed_alone(name):
    schema = make_schema()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(name, schema, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    hparams = json.loads(json.dumps(first.hparams))
    second, third = type(first)(schema, **hparams), build(name, schema, seed=4)
    assert second.hparams == first.hparams
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
        assert len(value.unique()) <= 1 or not torch.equal(value, third.state_dict()[key]), key


def test_initial_weights_are_xavier_normal_with_zero_bias():
    model = DCNv2(Schema.from_sizes([50] * 20), embedding_dim=10, hidden_units=(300, 100), init_std=1e-2)
    for layer, inputs, outputs in ((model.deep[0], 200, 300), (model.deep[3], 300, 100), (model.cross[0], 200, 200)):
        assert layer.weight.shape == (outputs, inputs)
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (inputs + outputs)) ** 0.5, rel=0.02)
        assert not layer.bias.any()
    assert float(model.tables.weight.detach().std()) == pytest.approx(1e-2 * (49 / 50) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_everything_learns(name, batch_norm):
    schema = make_schema()
    model = make_model(name, schema, batch_norm=batch_norm).train()
    ids, values = make_batch(schema, 200)
    (model(ids, values) * torch.linspace(-1, 2, 200)).sum().backward()
    hidden_biases = set()
    if batch_norm:  # batch norm takes the mean away, and with it what the bias before it adds
        hidden_biases = {f"{part}.{n}.bias" for part, n in itertools.product(("mlp", "deep", "bottom"), (0, 3))}
        hidden_biases -= {"bottom.3.bias"}  # the last layer
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key not in hidden_biases), key
        if key not in hidden_biases and parameter.numel():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 1e-4, key
    if name != "lr":
        gradient = model.tables.weight.grad.view(-1, DIM).abs().sum(1)
        seen = {"user": 0, "item": 1, "tags": 2, "history": 1, "place": 3}
        starts = [0, 9, 16, 22]
        touched = {
            starts[seen[f.name]] + int(i)
            for f, columns in zip(schema.id_fields, schema.column_slices, strict=True)
            for i in ids[:, columns].flatten()
            if i != PAD
        }
        assert set(gradient.nonzero().flatten().tolist()) == touched


@pytest.mark.parametrize("name", NAMES)
def test_a_training_batch_of_one_row_works(name):
    schema = make_schema()
    model = make_model(name, schema).train()
    ids, values = make_batch(schema, 1)
    assert torch.isfinite(model(ids, values)).all()


def test_dropout_acts_in_training_only():
    schema = make_schema(dense=False)
    model = make_model("fnn", schema, dropout=0.5, batch_norm=False)
    ids, _ = make_batch(schema)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_compact_state_loads_again(name):
    schema = make_schema()
    full = make_model(name, schema)
    plan = column_plan(full, random_columns(schema, 1))
    small = inherit(full, plan)
    other = type(full)(schema, plan=plan, **full.hparams).double().eval()
    other.load_state_dict(small.state_dict())
    ids, values = make_batch(schema)
    assert torch.equal(other(ids, values), small(ids, values))


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, hparams, message",
    [
        ("deepmf", {}, r"unknown model 'deepmf'; did you mean 'deepfm'\?"),
        ("xyz", {}, "unknown model 'xyz'; allowed: lr, fm, fnn, ipnn, widedeep, deepfm, dcn, dcnv2, dlrm"),
        ("fnn", {"hiden_units": [4]}, r"\[model fnn\] unknown argument 'hiden_units'; did you mean 'hidden_units'\?"),
        ("lr", {"embedding_dim": 4}, r"\[model lr\] unknown argument 'embedding_dim'"),
        ("fm", {"hidden_units": [4]}, "unknown argument 'hidden_units'; allowed: embedding_dim, plan, seed, init_std"),
        ("fm", {"embedding_dim": 0}, "embedding_dim, given 0: .*greater than or equal to 1"),
        ("fm", {"embedding_dim": "8"}, "embedding_dim, given '8'.*integer"),
        ("fm", {"init_std": -1.0}, "init_std, given -1.0"),
        ("fnn", {"dropout": 1.0}, "dropout, given 1.0: .*less than 1"),
        ("fnn", {"hidden_units": [4, 0]}, r"hidden_units.1, given 0"),
        ("fnn", {"hidden_units": 4}, "hidden_units, given 4"),
        ("dcn", {"num_cross_layers": 0}, "num_cross_layers, given 0"),
        ("dlrm", {"bottom_units": ["a"]}, "bottom_units.0, given 'a'"),
    ],
)
def test_bad_settings_are_named(name, hparams, message):
    with pytest.raises(ConfigError, match=message):
        build(name, Schema.from_sizes([3, 4]), **hparams)


@pytest.mark.parametrize("name", NAMES)
def test_missing_input_is_named(name):
    schema = make_schema()
    model = make_model(name, schema)
    ids, values = make_batch(schema)
    with pytest.raises(DataError, match=r"dense fields?.*\(price, age\); given none for 17 rows"):
        model(ids)
    with pytest.raises(DataError, match=r"given \(17, 1\)"):
        model(ids, values[:, :1])
    with pytest.raises(DataError, match=r"given \(5, 2\) for 17 rows"):
        model(ids, values[:5])
    with pytest.raises(DataError, match=r"ids must be \(batch, 10\).*given \(17, 9\)"):
        model(ids[:, 1:], values)
    with pytest.raises(DataError, match="given none"):
        model(None, values)
    plain = make_schema(dense=False)
    with pytest.raises(DataError, match=r"\(batch, 0\).*none.*given \(17, 2\)"):
        make_model(name, plain)(ids, values)


def test_schemas_and_plans_that_cannot_serve():
    dense_only = Schema(label="y", fields=(FieldSpec(name="x", type="dense", transform="none"),))
    with pytest.raises(DataError, match="no id field"):
        FM(dense_only)
    with pytest.raises(DataError, match="two id fields"):
        DLRM(Schema.from_sizes([4]))
    schema = Schema.from_sizes([4, 5])
    with pytest.raises(PlanError, match="LR has none"):
        LR(schema, plan=SizePlan.full(schema, 4))
    with pytest.raises(PlanError, match="made for schema"):
        FNN(schema, plan=SizePlan.full(Schema.from_sizes([4, 6]), 4))
    with pytest.raises(EmbtrimError, match="draft"):
        FM(Schema(label="y", fields=(FieldSpec(name="a"),)))


def test_the_plan_decides_width_and_the_model_first_order():
    schema = Schema.from_sizes([4, 5])
    model = DeepFM(schema, plan=SizePlan.full(schema, 3))
    assert model.hparams["embedding_dim"] == 3
    assert model.tables.first_order is not None
    assert FNN(schema, plan=SizePlan.full(schema, 3, first_order=True)).tables.first_order is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_model_finds_the_planted_signal(name, wide_data):
    takes = inspect.signature(MODELS[name].__init__).parameters
    small = {"embedding_dim": 4, "hidden_units": (16,), "bottom_units": (8,), "init_std": 0.05}
    model = build(name, wide_data.schema, **{k: v for k, v in small.items() if k in takes})
    fit(model, wide_data, epochs=8, batch_size=128, learning_rate=0.02, precision="fp32")
    assert evaluate(model, wide_data).auc > 0.78


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graph_fits_any_batch_size(name):
    schema = make_schema()
    model = make_model(name, schema)
    rows = torch.export.Dim("rows", min=33, max=4096)
    program = torch.export.export(model, make_batch(schema, 64), dynamic_shapes=({0: rows}, {0: rows}))
    batch = make_batch(schema, 77, seed=3)
    with torch.no_grad():  # the graph's FM sums in another order
        torch.testing.assert_close(program.module()(*batch), model(*batch), rtol=1e-12, atol=1e-12)
