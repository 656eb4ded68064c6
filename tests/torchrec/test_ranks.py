"""Two ranks find what one process finds: scores, plans, compact models, and weights under another sharding."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("torchrec")
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

import embtrim
from embtrim import torchrec as on_ranks
from embtrim.methods import GuidedConfig, HardMaskConfig, OptEmbedConfig
from embtrim.plan.plan import SizePlan
from embtrim.tasks.sensitivity import sensitivities
from tests.torchrec import searching
from tests.torchrec.models import SIZES, Pooled, batches, loss, make_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORLD = 2


def on_rank(rank: int, folder: str, jobs: list[str]) -> None:
    """Run the jobs on one of two ranks, and write what they return."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    from tests.torchrec import jobs as home
    from tests.torchrec import searching

    for job in jobs:
        try:
            found[job] = getattr(searching if hasattr(searching, job) else home, job)(rank, Path(folder))
        except BaseException:
            found[job] = traceback.format_exc()
            break  # the ranks are no longer in step
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    jobs = ["scores", "plans", "compaction", "sizes", "searches", "sized", "readings", "orders", "refusals"]
    mp.spawn(on_rank, (str(folder), jobs), WORLD)
    found = [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]
    return [{**part, "folder": folder} for part in found]


def of(ranks: list[dict[str, Any]], job: str) -> list[Any]:
    failed = [part for rank in ranks for part in rank.values() if isinstance(part, str)]
    assert not failed, "\n".join(failed)
    return [rank[job] for rank in ranks]


def test_scores_are_those_of_one_process_whatever_the_sharding(ranks):
    first, second = of(ranks, "scores")
    assert first == second
    assert len(first) == 8
    assert max(first.values()) <= 1e-5, first


def test_all_ranks_get_the_plan_of_one_process(ranks):
    first, second = of(ranks, "plans")
    assert first == second
    assert [name for name, (found, expected) in first.items() if found != expected] == []


def test_compact_models_inherit_any_sharding_by_any_other(ranks):
    first, second = of(ranks, "compaction")
    assert first == second
    assert len(first) == 9
    assert max(first.values()) == 0.0, first


def test_ranks_hold_and_send_the_bytes_of_the_formulas(ranks):
    for found in of(ranks, "sizes"):
        assert [len(part) for part in found.values()] == [10, 10]
        for sharding, part in found.items():
            wrong = {name: both for name, both in part.items() if both[0] != both[1]}
            assert not wrong, (sharding, wrong)


def test_outputs_are_read_by_name_since_sharding_moves_them(ranks):
    for found in of(ranks, "orders"):
        keys, by_name, by_place = found["table_wise"]
        assert sorted(keys) == sorted(SIZES)
        assert keys != list(SIZES), (
            "torchrec keeps the order: reads by position are safe, and docs/torchrec.md is wrong"
        )
        assert by_name < 1e-6 < 0.1 < by_place
        assert found["row_wise"][0] == list(SIZES)


def test_searches_that_train_find_what_one_process_finds(ranks):
    first, second = of(ranks, "searches")
    assert first == second
    expected = searching.searches(None)
    assert {name: digest for name, (digest, _) in first.items()} == {n: digest for n, (digest, _) in expected.items()}
    for name, (_, scores) in first.items():
        assert scores == pytest.approx(expected[name][1], rel=1e-5, abs=1e-6), name


def test_values_get_the_sizes_of_one_process(ranks):
    first, second = of(ranks, "sized")
    assert first == second == searching.sized(None)


def test_guided_reads_and_plans_what_one_process_does(ranks):
    first, second = of(ranks, "readings")
    assert first == second
    for name, (digests, numbers) in searching.readings(None).items():
        assert first[name][0] == digests, name
        assert first[name][1] == pytest.approx(numbers, rel=1e-4, abs=1e-6), name


def test_a_search_that_cannot_run_says_why_on_all_ranks(ranks):
    first, second = of(ranks, "refusals")
    assert first == second
    assert "batches have 160, 96 rows" in first["unequal"]
    for name in ("hard_mask", "optembed"):
        assert "'ebc' pools several ids of feature 'user'" in first[f"pooled {name}"]
    assert "a sharded model cannot be copied; give the Task `fresh=`" in first["copy"]
    assert "trained here without patience" in first["patience"]
    assert "the compute kernel 'fused' of table 't_user'" in first["fused"]
    assert "with compute_kernel='dense' for every table" in first["fused"]
    assert "embeddings of the EmbeddingCollection 'ec' come out wrong there" in first["sequences"]
    assert "pme with score = 'random' gives the scores of one value to another" in first["control"]
    assert "those of the collection 'ebc' may lie on several ranks" in first["mixed bits"]
    assert "export writes one folder from a model in one process" in first["export"]
    assert len(first["without rows"]) == 12


def test_a_checkpoint_of_two_ranks_opens_in_one_process(ranks):
    import torch.distributed.checkpoint as dcp

    of(ranks, "compaction")
    folder = ranks[0]["folder"]
    small = on_ranks.compact(Pooled, SizePlan.load(folder / "plan.json"))
    assert small.ebc.get_buffer("map_1").dtype == torch.uint8  # 100 of 300 rows
    state = small.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    small.load_state_dict(state)
    with torch.no_grad():
        found = small(batches(0, 256)[0][1])
    assert torch.equal(found, torch.load(folder / "logits.pt"))


def test_norms_are_taken_some_rows_at_a_time(monkeypatch):
    model = make_model(Pooled)
    task = on_ranks.Task(model, loss, batches(0, 256))
    monkeypatch.setattr("embtrim.tasks.table_parts.CHUNK_ROWS", 7)
    columns, rows = task.column_norms(), task.row_norms()
    for config in model.ebc.embedding_bag_configs():
        name = f"ebc.embedding_bags.{config.name}"
        weight = model.get_parameter(f"{name}.weight").detach().double()
        assert columns[name] == pytest.approx(weight.norm(dim=0).numpy())
        assert rows[name].scores == pytest.approx(weight.norm(dim=1).numpy())


@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
def test_sensitivities_of_bags_are_those_of_their_rows(pooling: str):
    model = make_model(Pooled)
    for config in model.ebc.embedding_bag_configs():
        config.pooling = PoolingType(pooling)
    model.ebc = EmbeddingBagCollection(tables=model.ebc.embedding_bag_configs())
    data = [(labels, searching.pairs(features)) for labels, features in batches(0, 512)]
    found = sensitivities(on_ranks.Task(model, loss, data, data))
    expected = sensitivities(embtrim.Task(model, loss, data, data))
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-5, atol=1e-12)


WIDTHS = {"user": 8, "item": 4, "ad": 8, "hour": 4}


class Widths(torch.nn.Module):
    """A hidden layer over tables of two widths, which are two sites of one collection."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        tables = [
            EmbeddingBagConfig(rows, WIDTHS[name], name=f"t_{name}", feature_names=[name])
            for name, rows in SIZES.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=tables)
        self.out = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def forward(self, features: Any) -> torch.Tensor:
        found = self.ebc(features)
        return self.out(torch.cat([found[name] for name in SIZES], 1)).squeeze(1)


@pytest.mark.parametrize(
    "config",
    [GuidedConfig(), HardMaskConfig(epochs=1), OptEmbedConfig(epochs=1, population=3, generations=1)],
    ids=lambda config: type(config).__name__,
)
def test_a_collection_of_several_widths_is_searched_as_modules_are(config: Any):
    model, data = Widths(), batches(0, 1024)
    given: dict[str, Any] = {"optimizer": searching.optimizer, "fresh": Widths}
    task = on_ranks.Task(model, loss, data, data, **given)
    plan = embtrim.search(task, config, "30%", seed=1)
    small = on_ranks.compact(Widths, plan)
    on_ranks.inherit(model, small, plan)
    assert on_ranks.verify(model, small, plan, task).max_difference == 0.0
    if not isinstance(config, OptEmbedConfig):  # which draws the widths of all tables of a site together
        expected = embtrim.search(embtrim.Task(model, loss, data, data, **given), config, "30%", seed=1)
        kept = {table.name: (table.columns, table.num_compact_rows) for table in expected.tables}
        assert {table.name: (table.columns, table.num_compact_rows) for table in plan.tables} == kept
