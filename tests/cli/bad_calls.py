"""Bad calls in Python, about modules of other people, each with the words that its message must have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl


@dataclass(frozen=True)
class BadCall:
    """A call that fails, about a module of somebody else's.

    Attributes:
        name: what is wrong, in words.
        call: makes it.
        words: what the message must contain.
    """

    name: str
    call: Callable[[], object]
    words: tuple[str, ...]

    def message(self) -> str:
        from embtrim.errors import EmbtrimError

        try:
            self.call()
        except EmbtrimError as error:
            return str(error)
        raise AssertionError(f"{self.name}: no error")


def _search_module(module: str = "ForeignModel", budget: str = "50%", **changes: Any) -> object:
    """Search in a module of torch.nn or embtrim.testing, through a Task that lacks or has other things."""
    import torch

    import embtrim
    from embtrim import testing

    made = testing.ForeignModel() if module == "ForeignModel" else torch.nn.Linear(3, 1)
    given = {"loss": lambda model, batch: model(batch[0]).sum(), "train": list(testing.foreign_batches()), **changes}
    return embtrim.search(embtrim.Task(made, **given), embtrim.methods.FrequencyConfig(), budget)


def _compact_other() -> object:
    import embtrim
    from embtrim import testing

    plan = embtrim.search(testing.foreign_task(), embtrim.methods.UniformConfig(), "50%")
    return embtrim.compact(testing.PooledModel(), plan, init="inherit")


def _of_module(call: Callable[[Any, Any], object]) -> Callable[[], object]:
    """A call with embtrim and a Task of a module."""

    def made() -> object:
        import embtrim
        from embtrim import testing

        return call(embtrim, testing.foreign_task())

    return made


def _search_nan(embtrim: Any, task: Any) -> object:
    task.model.user.weight.data[3] = float("nan")
    return embtrim.search(task, embtrim.methods.UniformConfig(), "50%")


def _search_locked(embtrim: Any, task: Any) -> object:
    task.model.head.lock = threading.Lock()
    return embtrim.search(task, embtrim.methods.UniformConfig(), "50%")


def _search_penalty(embtrim: Any, task: Any) -> object:
    from torch import nn

    plain = task.loss
    task.loss = lambda model, batch: plain(model, batch) + sum(isinstance(m, nn.Embedding) for m in model.modules())
    return embtrim.search(task, embtrim.methods.UniformConfig(), "50%")


def _search_compact(embtrim: Any, task: Any) -> object:
    plan = embtrim.search(task, embtrim.methods.UniformConfig(), "50%")
    return embtrim.search(
        embtrim.Task(embtrim.compact(task.model, plan), task.loss, task.batches("train")),
        embtrim.methods.UniformConfig(),
        "50%",
    )


BAD_CALLS = (
    BadCall("module without embeddings", lambda: _search_module("Linear"), ("no embedding to shrink", "Linear")),
    BadCall("module of which nothing may shrink", lambda: _search_module(exclude="*"), ("no embedding to shrink", "user")),
    BadCall("fields= of no embedding", lambda: _search_module(fields={"usr": {"a": 40}}), ("names 'usr'", "not an embedding that was found")),
    BadCall("fields= whose rows are not the table's", lambda: _search_module(fields={"user": {"a": 30, "b": 5}}),
            ("fields of 'user'", "30 (a) + 5 (b) = 35 rows, the table has 40")),
    BadCall("search without the batches it reads", lambda: _search_module(train=None), ("reads train batches", "`train=`")),
    BadCall("module and a budget of nothing", lambda: _search_module(budget="0%"), ("must be a positive number",)),
    BadCall("plan of another module", _compact_other,
            ("plan was made for embeddings", "'user' is 40 x 6 in the plan, here missing", "search again")),
    BadCall("compact module searched", _of_module(_search_compact),
            ("no embedding to shrink", "compact already; search and compact the full")),
    BadCall("loss of a value a row", lambda: _search_module(loss=lambda model, batch: model(batch[0])),
            ("scalar tensor", "shape (64,)")),
    BadCall("loss that is not a tensor", lambda: _search_module(loss=lambda model, batch: 0.5), ("scalar tensor", "a float")),
    BadCall("loss that is NaN", _of_module(lambda e, task: e.search(
        e.Task(task.model, lambda *given: task.loss(*given) * float("nan"), task.batches("train")),
        e.methods.SSEDSConfig(data="train"), "50%")),
            ("the loss of train batch 0 (counted from 0) is nan", "missing values")),
    BadCall("weight that is NaN", _of_module(_search_nan), ("weight 'user.weight'", "nan or infinity, first in row 3")),
    BadCall("module that holds a lock", _of_module(_search_locked), ("cannot be copied", "'head.lock', a lock", "__deepcopy__")),
    BadCall("loss that asks for nn.Embedding", _of_module(_search_penalty), ("'user' cannot be replaced", "the loss changes", "exclude=")),
    BadCall("loss without a gradient", _of_module(lambda e, task: e.search(
        e.Task(task.model, lambda *given: task.loss(*given).detach(), task.batches("train"), task.batches("valid")),
        e.methods.SSEDSConfig(), "50%")),
            ("loss has no gradient by the embeddings",)),
    BadCall("module where a Task belongs", _of_module(lambda e, task: e.search(task.model, e.methods.SSEDSConfig(), "50%")),
            ("search takes a Task, given a ForeignModel", "Task(model, loss=..")),
    BadCall("raw log given to run", _of_module(lambda e, task: e.run("log.csv", e.RunConfig(), "out")),
            ("take encoded data, given the path 'log.csv'", "embtrim.encode(LOG, label=..)", "embtrim.load")),
    BadCall("frame given to compare", _of_module(lambda e, task: e.compare(pl.DataFrame(), e.CompareConfig(), "out")),
            ("take encoded data, given a DataFrame",)),
    BadCall("class of settings", _of_module(lambda e, task: e.search(task, e.methods.SSEDSConfig, "50%")),
            ("SSEDSConfig'> is not", "SSEDSConfig()")),
    BadCall("module trained as one of ours", _of_module(lambda e, task: e.fit(task.model, e.load("flights"))),
            ("for the models of embtrim.models, given a ForeignModel", "a Task")),
    BadCall("module evaluated as one of ours", _of_module(lambda e, task: e.evaluate(task.model, e.load("flights"))),
            ("given a ForeignModel",)),
    BadCall("one of our models trained on a Task",
            _of_module(lambda e, task: e.fit(e.models.LR(e.Schema.from_sizes([9])), task)),
            ("a lr is trained, evaluated and saved on encoded data, given a Task",)),
    BadCall("module saved as a bundle", _of_module(lambda e, task: e.save(task.model, "none", e.load("flights"))),
            ("a bundle holds a model of embtrim.models, given a ForeignModel", "state_dict()")),
    BadCall("module in a CTRTask", _of_module(lambda e, task: e.CTRTask(task.model, e.load("flights"))),
            ("given a ForeignModel", "a Task(model")),
)  # fmt: skip
