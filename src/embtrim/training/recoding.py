"""Data for a model: a compact model reads re-coded ids, a full one the ids as they were encoded."""

from __future__ import annotations

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError, ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import unwrapped


def data_for(model: CTRModel, data: EncodedDataset) -> EncodedDataset:
    """The data with the ids that a model reads.

    Args:
        model: Full or compact zoo model.
        data: Data of the model's schema, as they were encoded or already re-coded by the model's plan.

    Returns:
        The data as given, or re-coded where the model is compact and the data are not. A compact model knows its plan
        until it is saved.

    Raises:
        DataError: The data belong to another schema, are re-coded by another plan, or are not re-coded and the model's
            plan comes from a bundle, which does not list the kept rows.
        ModelError: The model is not one of embtrim.models, or the data are not encoded.
    """
    if not isinstance(model, CTRModel):
        if isinstance(unwrapped(model), CTRModel):
            raise ModelError(
                f"this {type(model).__name__} holds the {unwrapped(model).name}; give the model inside it, such as model._orig_mod "  # type: ignore[union-attr]
                "or model.module (TrainConfig(compile=True) compiles it)"
            )
        raise ModelError(
            f"this is for the models of embtrim.models, given a {type(model).__name__}; train, evaluate and save that "
            "model by its own means, and search it through a Task"
        )
    if not isinstance(data, EncodedDataset):
        raise ModelError(
            f"a {model.name} is trained, evaluated and saved on encoded data, given a {type(data).__name__}; make them "
            "with embtrim.encode"
        )
    if data.schema.fingerprint != model.schema.fingerprint:
        raise DataError(
            f"model was made for schema {model.schema.describe()}, this dataset is {data.schema.describe()}"
        )
    plan = model.tables.plan
    if not data.id_maps and isinstance(plan, SizePlan):
        data = data.recode(plan)
    for table in plan.tables:
        is_recoded = table.name in data.id_maps
        if is_recoded and not table.renumbers:
            raise DataError(
                f"ids of table {table.name!r} are re-coded, but the model reads the stored ones; give the data as they "
                "were encoded, not data.recode(plan)"
            )
        if table.renumbers and not is_recoded:
            raise DataError(
                f"ids of table {table.name!r} are as stored, but the model is compact, and its plan does not list the "
                "rows that it keeps; give data.recode(plan) with the plan of its search"
            )
        if is_recoded and not table.reads(data.id_maps[table.name]):
            raise DataError(
                f"ids of table {table.name!r} are re-coded by another plan than the model's; give the data as they were "
                "encoded, or data.recode(plan) with the plan of the model"
            )
    return data
