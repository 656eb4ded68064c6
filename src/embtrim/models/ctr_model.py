"""CTRModel: what every base model has in common.

A model reads its embeddings through `EmbeddingTables` alone and never knows whether they are full, masked or compact.
It says which axes of its parameters read which parts of its input (`reads`), and which positions of a part are left
(`kept_inputs`); from these a compact model inherits the weights of a full one.

Axes: B batch, C id columns, E dense fields, F id fields, D full width, S columns of `concat` (sum of the widths).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import DataError, PlanError
from embtrim.models.blocks import Units
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.schema import Schema
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.views import EmbeddingViews


class HyperParameters(Config):
    """What base models can be given; each takes some of these.

    Attributes:
        embedding_dim: D, columns of the full tables; a plan brings its own width, which then counts.
        seed: of all initial weights.
        init_std: standard deviation of the initial embeddings and first-order weights.
        hidden_units: width of each hidden layer of the deep part.
        bottom_units: DLRM: width of each hidden layer of the MLP over dense fields.
        num_cross_layers: DCN, DCNv2: number of cross layers.
        dropout: share of hidden units dropped in training.
        batch_norm: normalise hidden layers over the batch.
    """

    embedding_dim: int = Field(default=16, ge=1, strict=True)
    seed: int = Field(default=0, ge=0, strict=True)
    init_std: float = Field(default=1e-4, ge=0, strict=True)
    hidden_units: Units = (400, 400, 400)
    bottom_units: Units = (64, 64, 64)
    num_cross_layers: int = Field(default=3, ge=1, strict=True)
    dropout: float = Field(default=0.0, ge=0, lt=1, strict=True)
    batch_norm: bool = Field(default=True, strict=True)


@dataclass(frozen=True)
class Reads:
    """One axis of a parameter reads parts of the model's input.

    Attributes:
        parameter: name of the parameter (or buffer), as in `named_parameters`.
        axis: the axis that reads.
        parts: names of the parts, in order; see `CTRModel.kept_inputs`.
    """

    parameter: str
    axis: int
    parts: tuple[str, ...]


class CTRModel(nn.Module):
    """What base models share: tables, hyper-parameters, checks of the input.

    Args:
        schema: fields and vocabulary sizes of the data.
        generator: source of the initial embeddings; models draw their other weights from it afterwards.
        plan: how the tables are laid out; None keeps everything. Whether first-order weights are stored is the
            model's own choice, whatever the plan says.
        hparams: the model's other constructor arguments, see HyperParameters.

    Attributes:
        name: short name, as in `embtrim.models.MODELS`.
        needs_aligned: whether the model reads embeddings of equal width (`aligned` or `fm()`).
        has_first_order: whether its tables carry first-order weights.
        tables: the embeddings.
        hparams: JSON-able constructor arguments except schema and plan; `type(model)(schema, plan=plan, **hparams)`
            builds the same model.
        num_dense: dense fields, E.
        num_inputs: columns of [concat, dense], S + E.

    Raises:
        ConfigError: a hyper-parameter is out of range.
        DataError: the schema has no id field.
        PlanError: the plan was made for another schema.
    """

    name: ClassVar[str]
    needs_aligned: ClassVar[bool] = False
    has_first_order: ClassVar[bool] = False

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
            ids_BC: integer ids, PAD = -1.
            dense_BE: values of the dense fields; None if the schema has none.

        Returns:
            The views of the tables, and the dense values (B, E) in the tables' dtype (E may be 0).

        Raises:
            DataError: ids or dense values are missing, or not of the schema's number of columns.
        """
        columns = self.schema.num_id_columns
        if ids_BC is None or ids_BC.ndim != 2 or ids_BC.shape[1] != columns:
            given = "none" if ids_BC is None else tuple(ids_BC.shape)
            raise DataError(f"{self.name}: ids must be (batch, {columns}), one column an id column of schema "
                            f"{self.schema.describe()}; given {given}")  # fmt: skip
        views = self.tables(ids_BC)
        shape = (ids_BC.shape[0], self.num_dense)
        if dense_BE is None and not self.num_dense:
            dense_BE = views.concat.new_zeros(shape)
        if dense_BE is None or dense_BE.shape != shape:
            names = ", ".join(field.name for field in self.schema.dense_fields) or "none"
            given = "none" if dense_BE is None else tuple(dense_BE.shape)
            raise DataError(f"{self.name}: dense values must be (batch, {self.num_dense}), one column a dense field of "
                            f"the schema ({names}); given {given} for {shape[0]} rows")  # fmt: skip
        return views, dense_BE.to(views.concat.dtype)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits of a batch.

        Args:
            ids_BC: integer ids local to their table, PAD = -1.
            dense_BE: values of the dense fields, needed if the schema has any.

        Raises:
            DataError: see `look_up`.
        """
        raise NotImplementedError

    def reads(self) -> list[Reads]:
        """Which axes of which parameters read which parts of the input; all others do not depend on the plan."""
        return []

    def kept_inputs(self, part: str) -> Tensor:
        """int64 positions, in the full model's `part`, of what this model keeps; on the CPU.

        Parts are "concat" (columns of the embeddings, F D in the full model), "dense" (dense fields) and those
        which a model adds.
        """
        if part == "concat":
            return self.tables.place_S.cpu()
        assert part == "dense", f"{self.name} has no input part {part!r}"
        return torch.arange(self.num_dense)

    def fold_dropped(self, full: CTRModel) -> None:
        """Take over the constants which removed coordinates leave in `full`; called after weights were inherited.

        Nothing for models in which a zero embedding leaves nothing.
        """
