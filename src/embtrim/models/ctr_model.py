"""CTRModel: the base class of all base models.

A model reads its embeddings through `EmbeddingTables` alone and never knows whether they are full, masked or compact.
It says which axes of its parameters read which parts of its input (`reads`), and which positions of a part it keeps
(`kept_inputs`). With both, a compact model inherits the weights of a full model.

Axes: B batch, C id columns, E dense fields, F id fields, D full width, S columns of `concat` (sum of the widths).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import DataError, PlanError
from embtrim.models.blocks import MLP, Units
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import MAX_WIDTH
from embtrim.schema import Schema
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.views import EmbeddingViews


class HyperParameters(Config):
    """Constructor arguments of base models. Each model takes some of them.

    Attributes:
        embedding_dim: Columns of the full tables, D. A plan's own width takes precedence.
        seed: Seed of all initial weights.
        init_std: Standard deviation of the initial embeddings and first-order weights.
        hidden_units: Width of each hidden layer of the deep part.
        bottom_units: Width of each hidden layer of DLRM's MLP over dense fields.
        num_cross_layers: Number of cross layers of DCN and DCNv2.
        dropout: Share of hidden units dropped in training.
        batch_norm: Whether hidden layers are normalised over the batch.
    """

    embedding_dim: int = Field(default=16, ge=1, le=MAX_WIDTH, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    init_std: float = Field(default=1e-4, ge=0, strict=True)
    hidden_units: Units = (400, 400, 400)
    bottom_units: Units = (64, 64, 64)
    num_cross_layers: int = Field(default=3, ge=1, le=1_000, strict=True)
    dropout: float = Field(default=0.0, ge=0, lt=1, strict=True)
    batch_norm: bool = Field(default=True, strict=True)


@dataclass(frozen=True)
class Reads:
    """An axis of a parameter that reads parts of the model's input.

    Attributes:
        parameter: Name of the parameter or buffer, as in `named_parameters`.
        axis: Number of the axis.
        parts: Names of the parts in order; see `CTRModel.kept_inputs`.
    """

    parameter: str
    axis: int
    parts: tuple[str, ...]


class CTRModel(nn.Module):
    """A base model: embedding tables, hyper-parameters, checks of the input.

    Args:
        schema: Fields and vocabulary sizes of the data.
        generator: Source of the initial embeddings. A model draws its other weights from it afterwards.
        plan: The rows and columns that the tables store; None keeps everything. Whether first-order weights are stored
            is the model's own choice, whatever the plan says.
        hparams: Other constructor arguments of the model; see HyperParameters.

    Attributes:
        name: Short name, a key of `embtrim.models.MODELS`.
        needs_aligned: Whether the model reads embeddings of equal width (`aligned` or `fm()`).
        has_first_order: Whether the model reads first-order weights.
        knows_columns: Whether the model tells one column of the embeddings from another, as cross layers do, which
            multiply column by column. Other models give the same logits if the embeddings of all fields are rotated
            alike, and the layers that read them are rotated back.
        tables: Embeddings of all fields.
        hparams: Constructor arguments as JSON values, without schema and plan. `type(model)(schema, plan=plan, **hparams)`
            builds the same model.
        num_dense: Number of dense fields, E.
        num_inputs: Columns of [concat, dense], S + E.

    Raises:
        ConfigError: A hyper-parameter is out of range.
        DataError: The schema has no id field.
        PlanError: The plan was made for another schema.
    """

    name: ClassVar[str]
    needs_aligned: ClassVar[bool] = False
    has_first_order: ClassVar[bool] = False
    knows_columns: bool = False

    def __init__(self, schema: Schema, generator: torch.Generator, plan: PlanShape | None, **hparams: Any) -> None:
        super().__init__()
        if not schema.id_fields:
            raise DataError(f"schema {schema.describe()} has no id field; {type(self).__name__} needs at least one")
        checked = HyperParameters.parse(hparams, where=f"model {self.name}")
        self.hparams: dict[str, Any] = checked.model_dump(mode="json", include=set(hparams))
        self.schema = schema
        width = self.hparams.get("embedding_dim", 0)
        plan = plan or SizePlan.full(schema, width, first_order=self.has_first_order)
        if plan.first_order != self.has_first_order:
            plan = dataclasses.replace(plan, first_order=self.has_first_order)
        if "embedding_dim" in self.hparams:
            self.hparams["embedding_dim"] = plan.width
        elif plan.width:
            raise PlanError(f"plan keeps embeddings of width {plan.width}, {type(self).__name__} has none")
        self.tables = EmbeddingTables(schema, plan, checked.init_std, generator)
        self.num_dense = len(schema.dense_fields)
        self.num_inputs = sum(self.tables.widths) + self.num_dense

    def look_up(self, ids_BC: Tensor, dense_BE: Tensor | None) -> tuple[EmbeddingViews, Tensor]:
        """Check the input of a forward pass and look up its embeddings.

        Args:
            ids_BC: Integer ids, PAD = -1.
            dense_BE: Values of the dense fields, or None if the schema has none.

        Returns:
            The views of the tables, and the dense values (B, E) in the tables' dtype. E may be 0.

        Raises:
            DataError: Ids or dense values are missing, or have the wrong number of columns for the schema.
        """
        columns = self.schema.num_id_columns
        if ids_BC is None or ids_BC.ndim != 2 or ids_BC.shape[1] != columns:
            given = "none" if ids_BC is None else tuple(ids_BC.shape)
            raise DataError(f"{self.name}: ids must be (batch, {columns}), one column for each id column of schema "
                            f"{self.schema.describe()}; given {given}")  # fmt: skip
        views = self.tables(ids_BC)
        shape = (ids_BC.shape[0], self.num_dense)
        if dense_BE is None and not self.num_dense:
            dense_BE = views.concat.new_zeros(shape)
        if dense_BE is None or dense_BE.shape != shape:
            names = ", ".join(field.name for field in self.schema.dense_fields) or "none"
            given = "none" if dense_BE is None else tuple(dense_BE.shape)
            raise DataError(f"{self.name}: dense values must be (batch, {self.num_dense}), one column for each dense field "
                            f"of the schema ({names}); given {given} for {shape[0]} rows")  # fmt: skip
        return views, dense_BE.to(views.concat.dtype)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits of a batch.

        Args:
            ids_BC: Integer ids local to their table, PAD = -1.
            dense_BE: Values of the dense fields, needed if the schema has any.

        Raises:
            DataError: Ids or dense values are missing, or have the wrong number of columns for the schema.
        """
        raise NotImplementedError

    def reads(self) -> list[Reads]:
        """The axes of parameters that read parts of the input. No other axis depends on the plan."""
        return []

    def kept_inputs(self, part: str) -> Tensor:
        """int64 positions, in a part of the full model's input, that this model keeps; on the CPU.

        Parts are "concat" (columns of the embeddings, F D in the full model), "dense" (dense fields), and the parts
        that a model adds.
        """
        if part == "concat":
            return self.tables.place_S.cpu()
        assert part == "dense", f"{self.name} has no input part {part!r}"
        return torch.arange(self.num_dense)

    def folded(self) -> CTRModel:
        """This model in eval mode in fewer passes over its activations: the same logits, up to rounding; see `MLP.folded`.

        All but the weights of its MLPs is shared with this model.
        """
        twin = copy.copy(self)
        twin._modules = {name: part.folded() if isinstance(part, MLP) else part for name, part in self._modules.items()}
        return twin

    def fold_dropped(self, full: CTRModel) -> None:
        """Take over the constants that removed coordinates leave in `full`, once the weights are inherited.

        The default does nothing: in most models a zero embedding leaves no constant.
        """
