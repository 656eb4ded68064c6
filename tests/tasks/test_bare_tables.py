"""Parameters that a model indexes itself: named by the survey with a reason, never searched in silence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from embtrim.tasks.survey import find_sites, survey


class Bare(nn.Module):
    """Matrices read in every way in which embeddings are read, and in ways in which they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(30, 4)
        for name in ("subscript", "function", "method", "alias", "sliced", "by_layer", "whole"):
            setattr(self, name, nn.Parameter(torch.randn(20, 4)))
        self.of_fields = nn.ParameterDict({"user": nn.Parameter(torch.randn(7, 4))})
        self.by_field = nn.ParameterList([nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(6, 4))])
        self.again = self.item.weight
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, ids: Tensor) -> Tensor:
        table = self.alias
        out = (
            self.item(ids) + self.subscript[ids % 20] + functional.embedding(ids % 20, self.function) + table[ids % 20]
        )
        out = out + self.of_fields["user"][ids % 7] + self.method.index_select(0, ids % 20) + self.again[ids]
        for field in self.by_field:
            out = out + field[ids % 5]
        for layer in range(2):
            out = out * self.by_layer[layer]
        out = out + self.sliced[: len(ids), :] + self.whole.sum() + self.whole[0]
        return out.sum(1) + self.bias[ids % 20]


class Wrapped(nn.Module):
    """A model inside another one, which inherits its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = type("Child", (Bare,), {})()


def test_parameters_that_a_module_indexes_are_named() -> None:
    findings = {finding.name: finding for finding in survey(Wrapped())}
    assert {name for name, finding in findings.items() if finding.kind == "Parameter"} == {
        f"inner.{name}"
        for name in ("subscript", "function", "method", "alias", "of_fields.user", "by_field.0", "by_field.1")
    }
    assert str(findings["inner.subscript"]) == (
        "inner.subscript: Parameter 20 x 4, left (Child indexes it itself; hold it in an nn.Embedding, call that, and it is "
        "searched)"
    )
    assert findings["inner.by_field.1"].num_bytes == 6 * 4 * 4
    assert [site.path for site in find_sites(Wrapped())] == ["inner.item"]
