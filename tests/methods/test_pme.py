"""PME: saliency and sizes by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from embtrim.compaction.compacting import compact
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.errors import EmbtrimError
from embtrim.methods import (
    PMEConfig,
    search,
    value_sizes,
)
from embtrim.methods.pme import entry_saliency, reassign
from embtrim.methods.value_sizes import Shares, bucket_scores, fill_sizes, sized_plan
from embtrim.models import FNN, DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.schema import Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.entries import normal_chunks
from embtrim.testing.checks import kept_shares
from embtrim.testing.toys import (
    foreign_task,
    planted_data,
)
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig
from tests.resident import peak_resident
from tests.threads import Threads


class TestPME:
    """Sizes per feature value."""

    def test_saliency_equals_autograd_of_an_explicit_entry_mask(self):
        data = planted_data(num_rows=400, noise_vocab=50)
        model = DeepFM(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
        task = CTRTask(model, data, TrainConfig(batch_size=64))
        found = torch.cat(entry_saliency(task, model, task.entries(model), 1.0, seed=0))
        mask = torch.ones_like(found, requires_grad=True)
        start = torch.tensor([0, 30, 50])
        for batch in task.batches("train", 0):
            rows_BF = batch.ids_BC + start

            def masked(concat: torch.Tensor, rows_BF: torch.Tensor = rows_BF) -> torch.Tensor:
                return concat * mask[rows_BF].reshape(len(concat), -1)

            with model.tables.gated(slot_gate=masked):
                task.loss(model, batch).backward()
        np.testing.assert_allclose(found.numpy(), mask.grad.abs().numpy(), rtol=1e-3, atol=1e-7)
        assert found.max() > 0

    def test_sizes_are_counts_of_the_largest_entries_bucketed_down(self):
        full = SizePlan.full(Schema.from_sizes((8,)), 4)
        ranked = [np.array([[9.0, 8, 7, 1], [6, 5, 0.5, 0.5], [4, 0.1, 0.1, 0.1], *[[0.0] * 4] * 5])]
        # Entries above 3.5 are 3, 2, 1, 0 .. of the values: sizes 2, 2, 1, 0 .., 2 for DROPPED and 4 + 8 of W.
        sizes = fill_sizes(full, bucket_scores(full, ranked), 19)
        assert sizes[0].tolist() == [2, 2, 1, 0, 0, 0, 0, 0]
        plan = sized_plan(full, sizes)
        assert plan.num_params == 2 + 2 + 1 + 2 + 4 + 8
        assert [(b.width, list(b.rows)) for b in plan.tables[0].blocks] == [(2, [0, 1]), (1, [2])]
        # One less, and only W_2 is left: what it frees goes to the next values in order.
        assert fill_sizes(full, bucket_scores(full, ranked), 18)[0].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
        assert fill_sizes(full, bucket_scores(full, ranked), 32)[0].tolist() == [4] * 8

    def test_controls_give_the_same_histogram_to_other_values(self):
        rng = np.random.default_rng(0)
        ranked = [np.sort(rng.random((n, 4)))[:, ::-1] for n in (5, 3)]
        key = np.array([0, 1, 2, 3, 4, 7, 6, 5])
        given = reassign(ranked, key)
        assert sorted(map(tuple, np.concatenate(given))) == sorted(map(tuple, np.concatenate(ranked)))
        sums = np.concatenate(given).sum(1)
        assert np.argsort(sums).tolist() == np.argsort(key).tolist()

    def test_frequency_sizes_grow_with_frequency(self, data):
        task = CTRTask(FNN(data.schema, embedding_dim=8, hidden_units=(4,)), data)
        plan = search(task, PMEConfig(score="frequency"), "20%")
        counts = task.row_counts()
        blocks = [(b.width, counts[t.name][b.rows]) for t in plan.tables for b in t.blocks if b.rows is not None]
        means = {w: np.mean(np.concatenate([c for width, c in blocks if width == w])) for w, _ in blocks}
        assert len(means) > 2
        assert sorted(means, key=means.get) == sorted(means)

    def test_ids_are_renumbered_by_size(self, data):
        task = CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(4,)), data)
        plan = search(task, PMEConfig(), "20%")
        small = compact(task.model, plan)
        fit(small, data.recode(plan), epochs=1)
        assert small.tables.weight.numel() + sum(p.numel() for p in small.tables.shared_projections.values()) == (
            plan.num_params
        )

    def test_steps_are_counted_about_twice_however_many_there_are(self, monkeypatch):
        """A bisection counts only the steps that its last answer left open."""
        full = SizePlan.full(Schema.from_sizes((5000, 300)), 8)
        rng = np.random.default_rng(0)
        ranked = [np.sort(rng.random((t.num_rows, 8)), axis=1)[:, ::-1] for t in full.tables]
        counted = []
        rows_of_levels, bincount = value_sizes._Steps.rows_of_levels, np.bincount

        def noted(steps, prefix):
            with monkeypatch.context() as patch:
                patch.setattr(np, "bincount", lambda x, **more: counted.append(len(x)) or bincount(x, **more))
                return rows_of_levels(steps, prefix)

        monkeypatch.setattr(value_sizes._Steps, "rows_of_levels", noted)
        fill_sizes(full, bucket_scores(full, ranked), 6000)
        assert 0 < sum(counted) < 2 * 4 * 5300

    @pytest.mark.parametrize("standalone", [False, True])
    def test_processes_that_share_tables_find_the_sizes_of_one(self, standalone: bool):
        """Scores are small integers, so that many are equal, and map widths change with the rows."""
        plan = SizePlan.full(Schema.from_sizes((300, 70, 5)), 8)
        full = dataclasses.replace(plan, standalone=standalone)
        rng = np.random.default_rng(0)
        ranked = [np.sort(rng.integers(0, 9, (t.num_rows, 8)), axis=1)[:, ::-1].astype(np.float32) for t in full.tables]
        # One process has the end of the first table and no row of the last.
        bounds = [(0, 120, 250, 300), (0, 0, 40, 70), (0, 2, 5, 5)]
        for limit in (200, 901, 1700, full.num_full_params):
            whole = fill_sizes(full, bucket_scores(full, ranked), limit)

            def search_part(process: int, group: Threads, limit: int = limit) -> tuple[list[np.ndarray], SizePlan]:
                own = [slice(*ends[process : process + 2]) for ends in bounds]
                parts = [scores[rows] for scores, rows in zip(ranked, own, strict=True)]
                shares = Shares([rows.start for rows in own], group)
                sizes = fill_sizes(full, bucket_scores(full, parts), limit, shares=shares)
                return sizes, sized_plan(full, sizes, shares)

            found = Threads.run(3, search_part)
            for number, expected in enumerate(whole):
                np.testing.assert_array_equal(np.concatenate([sizes[number] for sizes, _ in found]), expected)
            assert {plan.digest for _, plan in found} == {sized_plan(full, whole).digest}

    def test_weights_are_drawn_in_parts_as_they_are_at_once(self, monkeypatch):
        monkeypatch.setattr("embtrim.tasks.entries.CHUNK_ROWS", 32)
        for rows, width in ((1, 3), (5, 3), (32, 4), (33, 1), (47, 1), (48, 5), (100, 7)):
            drawn = [noise for _, noise in normal_chunks(rows, width, 0.5, torch.Generator().manual_seed(3))]
            whole = torch.empty(rows, width).normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
            assert torch.equal(torch.cat(drawn), whole), (rows, width)

    def test_memory_is_at_most_three_times_the_tables(self):
        rng = np.random.default_rng(0)
        schema = Schema.from_sizes((200_000, 10))
        ids = np.stack([rng.integers(200_000, size=2048), rng.integers(10, size=2048)], 1).astype(np.int32)
        splits = SplitArrays(ids, rng.integers(2, size=2048).astype(np.float32))
        data = EncodedDataset(schema, {"train": splits, "valid": splits})
        task = CTRTask(FNN(schema, embedding_dim=32, hidden_units=(4,)), data, TrainConfig(batch_size=256))
        small = planted_data(num_rows=300, noise_vocab=20)
        search(CTRTask(FNN(small.schema, embedding_dim=2, hidden_units=(4,)), small), PMEConfig(), "20%")  # imports
        assert peak_resident(lambda: search(task, PMEConfig(), "20%")) <= 3 * 4 * 200_000 * 32

    def test_no_batches(self):
        task = foreign_task()
        task._train = []
        with pytest.raises(EmbtrimError, match="no training batches"):
            search(task, PMEConfig(), "50%")


def test_warming_up_mends_pme_a_little(planted: CTRTask):
    """Read after an epoch of training the saliency puts the strong field further ahead of the noise."""

    def lead(config: PMEConfig) -> float:
        kept = kept_shares(search(planted, config, "30%"))
        return kept["strong"] / kept["noise"]

    assert lead(PMEConfig(warmup_epochs=1)) > 1.2 * lead(PMEConfig())
