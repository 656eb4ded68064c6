"""include= and exclude= name the embeddings that a search may shrink."""

from __future__ import annotations

import pytest
from torch import nn

from embtrim.errors import ModelError
from embtrim.methods import RandomConfig, search
from embtrim.tasks.survey import find_sites, survey
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, OddModel, PooledModel, foreign_batches, foreign_task


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"include": "item"}, ["item"]),
        ({"include": ["item", "us*"]}, ["user", "item"]),
        ({"exclude": "item"}, ["user"]),
        ({"exclude": ("i*",)}, ["user"]),
        ({"include": "*", "exclude": "user"}, ["item"]),
    ],
)
def test_paths_and_patterns(given, found: list[str]):
    assert [name for site in find_sites(ForeignModel(), **given) for name in site.names] == found
    task = foreign_task()
    chosen = Task(task.model, task.loss, list(foreign_batches()), **given)
    assert [table.name for table in search(chosen, RandomConfig(), "50%").tables] == found


def test_the_reason_is_named():
    notes = {f.name: f.note for f in survey(ForeignModel(), include=["user", "item"], exclude="item")}
    assert notes == {"user": "", "item": "excluded", "bias": "width 1, a first-order term"}
    assert next(f for f in survey(ForeignModel(), include="user") if f.name == "item").note == "not included"


def test_a_path_with_brackets_is_that_path():
    (site,) = find_sites(OddModel(), include="tables.user[id]")
    assert site.names == ("tables.user[id]",)


def test_any_module_of_a_shared_weight_names_it():
    for path in ("history", "recent"):
        (site,) = find_sites(PooledModel(), include=path)
        assert site.names == ("history",)
        (site,) = find_sites(PooledModel(), exclude=path)
        assert site.names == ("flat",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exclude": "itm"}, r"exclude= names 'itm', which no embedding of the model matches; did you mean 'item'\?"),
        ({"include": ["user", "towers.*"]}, r"include= names 'towers.\*', .* allowed: user, item, bias"),
        ({"include": lambda path: True}, r"include= is the path of a module, a pattern .* given <function"),
        ({"exclude": ["user", 3]}, r"exclude= is the path of a module, a pattern"),
        ({"exclude": "*"}, r"no embedding to shrink was found in ForeignModel: user: .* left \(excluded\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, message: str):
    with pytest.raises(ModelError, match=message):
        find_sites(ForeignModel(), **given)


def test_a_model_without_embeddings_says_so_first():
    with pytest.raises(ModelError, match="no embedding"):
        find_sites(nn.Linear(2, 2))
