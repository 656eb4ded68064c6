"""What a search says about the embeddings that its plan covers, leaves alone or empties."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.methods import MagnitudeConfig, RandomConfig, UniformConfig, search
from embtrim.plan.plan import SizePlan
from embtrim.serving.exporting import export
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_batches, foreign_task, zoo_task


def chosen_task(**given) -> Task:
    task = foreign_task()
    return Task(task.model, task.loss, list(foreign_batches()), list(foreign_batches()), **given)


def test_the_share_is_said_in_the_plan_and_its_file(tmp_path: Path, caplog):
    plan = search(foreign_task(), RandomConfig(), "50%")
    full = 4 * (40 * 6 + 25 * 4)
    assert (plan.left_bytes, plan.coverage) == (160, full / (full + 160))
    assert "covers 89.5% of all embedding bytes, 160 are left alone" in plan.summary()
    assert "covers" not in caplog.text
    plan.save(tmp_path / "plan.json")
    assert SizePlan.load(tmp_path / "plan.json").left_bytes == 160


@pytest.mark.parametrize(
    ("given", "share", "left"),
    [
        ({"exclude": "user"}, "26.3", "user: Embedding 40 x 6, left (excluded); bias"),
        ({"include": "user"}, "63.2", "item"),
    ],
)
def test_a_small_share_is_warned_of(given, share: str, left: str, caplog):
    plan = search(chosen_task(**given), RandomConfig(), "50%")
    assert f"covers {share}% of all embedding bytes of the model, and so does its budget" in caplog.text
    assert left in caplog.text
    assert f"covers {share}%" in plan.summary()


def test_zoo_models_are_covered_whole():
    plan = search(zoo_task(), UniformConfig(), "50%")
    assert (plan.left_bytes, plan.coverage) == (None, 1.0)
    assert "covers" not in plan.summary()


def test_a_table_without_columns_is_named(caplog):
    task = foreign_task()
    with torch.no_grad():
        task.model.item.weight.mul_(1e-3)  # type: ignore[union-attr, operator]
    plan = search(task, MagnitudeConfig(), "40%")
    assert [t.name for t in plan.tables if not t.output_width] == ["item"]
    assert "the plan takes the last column of 'item', which will read as zeros" in caplog.text
    caplog.clear()
    search(task, UniformConfig(), "40%")
    assert "last column" not in caplog.text


def test_bits_that_are_owed_are_said_once(caplog):
    task = foreign_task()
    plan = search(task, UniformConfig(), "40%", bits=8)
    small = compact(task.model, plan)
    assert caplog.text.count("fp32 still") == 1
    assert f"its plan stores {plan.num_bytes():,}: call embtrim.quantize_(model) once it is trained" in caplog.text
    assert "8 bits once quantized" in repr(small)
    quantize_(small)
    assert "once quantized" not in repr(small)
    caplog.clear()
    compact(task.model, plan.with_bits(32))
    assert not caplog.records
    zoo = zoo_task()
    plan = search(zoo, UniformConfig(), "40%", bits=8)
    with caplog.at_level(logging.INFO, logger="embtrim"):
        compact(zoo.model, plan)
    assert "call model.tables.quantize_() once it is trained" in caplog.text


@pytest.mark.parametrize("bits", [32, 8])
def test_a_manifest_counts_the_plan_and_what_it_leaves(bits: int, tmp_path: Path):
    task = foreign_task()
    plan = search(task, UniformConfig(), "40%", bits=bits)  # type: ignore[arg-type]
    small = compact(task.model, plan)
    if bits == 8:
        quantize_(small)
    manifest = export(small.eval(), "pt2", tmp_path / "out", example=(next(foreign_batches())[0],))
    assert manifest["table_bytes"] == plan.num_bytes() + (plan.left_bytes or 0)
    assert isinstance(small, nn.Module)
