"""Building blocks of base models: MLP, first-order part, cross layers, inner products of pairs.

Weights are initialised as in FuxiCTR, the code behind the BARS benchmark: Xavier normal, with zero biases. They come
from a given generator, so that the global one is left alone.

Axes: B batch, E dense fields, F id fields, D full width, P pairs, L layers, N inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.plan.table import projects
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.storage import normal_values
from embtrim.tables.views import EmbeddingViews

Units = Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 20, strict=True)], ...], Field(max_length=1_000)]


def xavier_normal(num_outputs: int, num_inputs: int, generator: torch.Generator) -> nn.Parameter:
    """(num_outputs, num_inputs) weights from N(0, 2 / (inputs + outputs)) (Glorot & Bengio 2010)."""
    std = (2 / max(1, num_inputs + num_outputs)) ** 0.5
    return nn.Parameter(normal_values(std, generator, num_outputs, num_inputs))


def linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """A Linear layer with Xavier normal weights and zero bias. Either side may be empty, where a plan keeps nothing."""
    # torch's own initialisation would draw from the global generator, and warn about empty sides. `skip_init` would import
    # sympy, which takes a second.
    layer = nn.Linear(1, 1, device="meta")
    layer.in_features, layer.out_features = num_inputs, num_outputs
    layer.weight = xavier_normal(num_outputs, num_inputs, generator)
    layer.bias = nn.Parameter(torch.zeros(num_outputs))
    return layer


def side_by_side(*parts: Tensor) -> Tensor:
    """Concatenate (B, n) tensors along the columns. A part without columns costs no copy."""
    filled = [part for part in parts if part.shape[1]]
    return filled[0] if len(filled) == 1 else torch.cat(filled or parts, 1)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that normalises a training batch of one row, which has no variance, by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        if self.training and len(input) == 1:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


class Dropout(nn.Dropout):
    """nn.Dropout whose mask costs 16 random bits per element on the CPU.

    On the CPU, torch's own dropout draws one variate per element in series. For (4096, 400) it takes 12 ms, more than the
    layer's matmul, where this one takes 1 ms. The share kept is rounded to 1/65536, and the scale follows the rounded
    share. Compiled models use torch's own dropout, which then draws within the loops beside it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        if not self.training or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        kept = min(65535, round((1 - self.p) * 65536))
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: input.numel()].view(input.shape) < kept - 32768
        return input * (keep.to(input.dtype) * (65536 / max(1, kept)))


class MLP(nn.Sequential):
    """Hidden layers of Linear -> BatchNorm -> ReLU -> Dropout, and a last Linear.

    The bias in front of a BatchNorm stays zero. The norm subtracts it, so that its gradient is rounding error alone,
    which Adam would turn into steps of full length: results would then depend on the number of threads.

    Args:
        num_inputs: Number of inputs, N; may be 0.
        hidden_units: Width of each hidden layer.
        dropout: Share of hidden units dropped in training.
        batch_norm: Whether hidden layers are normalised over the batch.
        generator: Source of the weights.
        num_outputs: Width of the last Linear. None leaves the layer out.
    """

    def __init__(
        self,
        num_inputs: int,
        hidden_units: Sequence[int],
        dropout: float,
        batch_norm: bool,
        generator: torch.Generator,
        num_outputs: int | None = 1,
    ) -> None:
        layers: list[nn.Module] = []
        width = num_inputs
        for units in hidden_units:
            layer = linear(width, units, generator)
            layers.append(layer)
            if batch_norm:
                layer.bias.requires_grad_(False)
                layers.append(BatchNorm(units))
            layers.append(nn.ReLU(inplace=True))  # nothing else reads what Linear and BatchNorm give
            if dropout:
                layers.append(Dropout(dropout))
            width = units
        if num_outputs is not None:
            layers.append(linear(width, num_outputs, generator))
        super().__init__(*layers)

    def folded(self) -> nn.Sequential:
        """The same function of the MLP in eval mode, with each BatchNorm folded into the Linear before it, and no Dropout."""
        layers: list[nn.Module] = []
        for layer in self:
            if isinstance(layer, BatchNorm):
                before = layers.pop()
                assert isinstance(before, nn.Linear)
                layers.append(nn.utils.fuse_linear_bn_eval(before, layer))
            elif not isinstance(layer, nn.Dropout):
                layers.append(layer)
        return nn.Sequential(*layers)


class FirstOrder(nn.Module):
    """The linear part: a bias, one weight per feature value (held by the tables), and one weight per dense field.

        y = w_0 + sum_i w_i + sum_e v_e x_e

    Args:
        num_dense: Number of dense fields, E.
        init_std: Standard deviation of the initial v.
        generator: Source of the weights.
    """

    def __init__(self, num_dense: int, init_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense_E = nn.Parameter(normal_values(init_std, generator, num_dense))

    def forward(self, views: EmbeddingViews, dense_BE: Tensor) -> Tensor:
        """(B,) linear term of a batch."""
        assert views.first_order is not None, "these tables carry no first-order weights"
        first_B = self.bias + views.first_order
        # Without dense fields there is no product: onnxruntime leaves the result of an empty one unset.
        return first_B + dense_BE @ self.dense_E if len(self.dense_E) else first_B


class CrossVectors(nn.Module):
    """Cross layers with a weight vector each (Wang et al. 2017):

        x_{l+1} = x_0 (w_l . x_l + c_l) + b_l + x_l

    In the paper c is zero. In a compact model c is the share of w_l . x_l that the coordinates contribute which a plan
    removed: their x_0 is zero, yet they hold the sum of the biases so far.

    Args:
        num_inputs: Number of inputs, N.
        num_layers: Number of layers, L.
        generator: Source of the weights.
    """

    carried_L: Tensor

    def __init__(self, num_inputs: int, num_layers: int, generator: torch.Generator) -> None:
        super().__init__()
        # Each w_l is a layer with one output of its own.
        weights = [xavier_normal(1, num_inputs, generator) for _ in range(num_layers)]
        self.weight_LN = nn.Parameter(torch.cat([w.detach() for w in weights]))
        self.bias_LN = nn.Parameter(torch.zeros(num_layers, num_inputs))
        self.register_buffer("carried_L", torch.zeros(num_layers))

    def forward(self, x0_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        x_BN = x0_BN
        for w_N, b_N, c in zip(self.weight_LN, self.bias_LN, self.carried_L, strict=True):
            x_BN = x0_BN * (x_BN @ w_N + c)[:, None] + b_N + x_BN
        return x_BN


class CrossMatrices(nn.ModuleList):
    """Cross layers with a weight matrix each (Wang et al. 2021):

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l

    Args:
        num_inputs: Number of inputs, N.
        num_layers: Number of layers, L.
        generator: Source of the weights.
    """

    def __init__(self, num_inputs: int, num_layers: int, generator: torch.Generator) -> None:
        super().__init__(linear(num_inputs, num_inputs, generator) for _ in range(num_layers))

    def forward(self, x0_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N)."""
        x_BN = x0_BN
        for layer in self:
            x_BN = x0_BN * layer(x_BN) + x_BN
        return x_BN


class PairProducts(nn.Module):
    """Inner products of the pairs of vectors (i, j), i < j, that a plan has not made zero.

    Pairs run row by row: (0, 1), (0, 2), ..., (1, 2), ... The vectors are the fields' embeddings, then `num_extra` others
    of full width.

    Args:
        tables: Embeddings of all fields.
        num_extra: Number of vectors that are not embeddings.

    Attributes:
        kept: Positions of the kept pairs among all pairs.
    """

    place_P: Tensor

    def __init__(self, tables: EmbeddingTables, num_extra: int = 0) -> None:
        super().__init__()
        plans = {table.name: table for table in tables.plan.tables}
        of_field = [plans[field.table_name] for field in tables.schema.id_fields]
        # Columns in which each vector may be nonzero: all for a projected vector, the kept ones for a scattered vector.
        everywhere = frozenset(range(tables.width))
        columns = [everywhere if projects(table) else frozenset(table.columns) for table in of_field]
        columns += [everywhere] * num_extra
        pairs = list(itertools.combinations(range(len(columns)), 2))
        self.kept = tuple(n for n, (i, j) in enumerate(pairs) if columns[i] & columns[j])
        # Where the kept pairs stand in the flattened (vectors, vectors) matrix of all products.
        places = [pairs[n][0] * len(columns) + pairs[n][1] for n in self.kept]
        self.register_buffer("place_P", torch.tensor(places, dtype=torch.int64), persistent=False)

    def forward(self, vectors_BFD: Tensor) -> Tensor:
        """(B, P) inner products."""
        products_BFF = vectors_BFD @ vectors_BFD.transpose(1, 2)
        return products_BFF.flatten(1).index_select(1, self.place_P)
