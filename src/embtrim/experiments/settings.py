"""Settings of a run, and a check of them before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from embtrim.compaction.foreign import Init
from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import ConfigError, DataError
from embtrim.methods import method_named
from embtrim.methods.curves import STARTS
from embtrim.methods.guided import Start
from embtrim.models import MODELS, arguments, build
from embtrim.models.ctr_model import HyperParameters
from embtrim.plan.budget import AUTO, Budget, BudgetOrAuto
from embtrim.plan.budget_limits import check_budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.training.devices import device_of
from embtrim.training.settings import TrainConfig

# Initial weights of a compact model, as they can be asked for; see RunConfig.
InitSetting = Literal["auto", Init]


class RunConfig(Config):
    """All settings of a run; its result depends on them and on the data.

    Attributes:
        model: Name of the base model (`embtrim models`).
        hparams: Arguments of the base model, such as embedding_dim and hidden_units.
        train: Settings of training, for full and compact models alike.
        method: Name of the search method (`embtrim methods`).
        search: Settings of the search method.
        budget: Size limit of the compact tables, such as "10%", "200MB" or "1.5M params". With `guided`, "auto" takes the
            smallest budget whose predicted loss is at most `tolerance`.
        tolerance: Largest predicted loss of validation AUC that `budget = "auto"` accepts, and largest loss with which
            `guided` tries no second start.
        max_loss: Largest loss of validation AUC against the full model. If set, the budget is ignored, and the smallest
            plan within this loss is looked for. `guided` predicts its budget and retrains twice at most; other methods
            bisect, with six trainings.
        init: Initial weights of the compact model: "scratch", "initial", "inherit" or "low_rank"; see `compact`. "auto" is
            "scratch" for the published methods and the controls. With `guided` it is "low_rank"; a model that is not
            within the tolerance of the full one is also trained from scratch, and the better one is kept.
        teacher: Share of the full model's predicted probability in the labels on which a compact model trains: label =
            (1 - teacher) * click + teacher * probability (Hinton et al. 2015, arXiv 1503.02531). 0 trains on the clicks
            alone, as the papers of the search methods do.
        bits: Bits per stored value in the compact tables: 32, 16, 8, 4, 3 or 2; "mixed" chooses 16 or fewer for each table.
            None stands for "mixed", but for 32 with a budget in parameters or the target "fbgemm", which do not allow
            "mixed". Tables are trained in fp32 and quantised afterwards; with fewer bits the same budget has room for
            more parameters.
        target: Where the tables will be served: "torch", "onnx" or "fbgemm". Sizes are counted as that backend stores
            them, and a budget in bytes then includes the vocabulary. None counts the tables as torch stores them, without
            the vocabulary.
        controls: Methods run at the same budget for comparison, with their default settings. "NAME:BITS", such as
            "uniform:8", gives a control its own bits; its records are called "NAME-BITS".
        seed: First seed.
        seeds: Number of seeds.
    """

    model: str = "deepfm"
    hparams: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    method: str = "guided"
    search: dict[str, Any] = Field(default_factory=dict)
    budget: BudgetOrAuto = Budget.parse("10%")
    tolerance: float = Field(default=0.001, gt=0, lt=0.5)
    max_loss: float | None = Field(default=None, gt=0, lt=0.5)
    init: InitSetting = "auto"
    teacher: float = Field(default=0.5, ge=0, le=1)
    bits: Bits | None = None
    target: Target | None = None
    controls: tuple[str, ...] = ("uniform",)
    seed: int = Field(default=0, ge=0, lt=2**63)
    seeds: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _only_guided_predicts(self) -> RunConfig:
        if self.budget == AUTO and self.method != "guided":
            raise ConfigError(
                f"budget 'auto' is the smallest one whose predicted loss is within the tolerance, and method {self.method!r} "
                "predicts none; use method 'guided', or give a budget such as '10%'"
            )
        return self

    @property
    def limit(self) -> Budget | None:
        """The budget; None if it is yet to be found, for "auto" and with `max_loss`."""
        return None if self.budget == AUTO or self.max_loss is not None else self.budget

    @property
    def stored_bits(self) -> Bits:
        """`bits`, or what None stands for."""
        if self.bits is not None:
            return self.bits
        in_params = self.limit is not None and self.limit.kind == "params"
        return 32 if in_params or self.target == "fbgemm" else "mixed"


def method_config(config: RunConfig) -> Config:
    """The settings of a run's search method, parsed.

    Raises:
        ConfigError: The method or one of the settings is unknown.
    """
    return method_named(config.method).parse(config.search)


def split_control(control: str) -> tuple[str, Bits | None]:
    """The method of a control such as "uniform:8", and its bits; None for those of the run.

    Raises:
        ConfigError: The method is unknown, or the bits are none that tables can have.
    """
    name, colon, text = control.partition(":")
    method_named(name)
    bits: Any = int(text) if text.isdigit() else text
    if colon and bits not in get_args(Bits):
        allowed = ", ".join(map(str, get_args(Bits)))
        raise ConfigError(f"control {control!r} has no bits that tables can have; allowed after the colon: {allowed}")
    return name, bits if colon else None


def starts_of(config: RunConfig) -> tuple[Start, ...]:
    """The ways in which `guided` may start a run's compact model; each has plans of its own. See GuidedConfig."""
    start = config.search.get("start")
    if start is None and config.init == "auto":
        return STARTS
    return (start or "scratch",)


def check_run(data: EncodedDataset, config: RunConfig) -> None:
    """Raise early, before any training, for a missing split, an unknown name or setting, or an impossible budget."""
    if not isinstance(data, EncodedDataset):
        given = f"the path {str(data)!r}" if isinstance(data, (str, Path)) else f"a {type(data).__name__}"
        raise DataError(
            f"run and compare take encoded data, given {given}; embtrim.encode(LOG, label=..) makes them from a raw log, and "
            "embtrim.load opens their folder"
        )
    for split in ("train", "valid", "test"):
        data.split(split)
    for control in config.controls:
        split_control(control)
    method_config(config)
    device_of(config.train)
    full = full_plan(data, config)
    if full.width == 0:
        raise ConfigError(
            f"model {config.model!r} has no embedding tables to shrink, only first-order weights; choose another"
        )
    if config.limit is not None and (config.stored_bits == 32 or config.target != "fbgemm"):
        check_budget(full, config.limit, config.stored_bits, config.target, method_named(config.method).adds)


def full_plan(data: EncodedDataset, config: RunConfig) -> SizePlan:
    """Plan of the full tables of a run's model, whose settings are checked.

    Raises:
        ConfigError: The model or one of its arguments is unknown or cannot be used.
    """
    hparams, known = config.hparams, arguments(config.model) if config.model in MODELS else {}
    width = hparams.get("embedding_dim", known.get("embedding_dim", 0))
    if "embedding_dim" in {**known, **hparams}:
        HyperParameters.parse({"embedding_dim": width}, where="hparams")
        hparams = {**hparams, "embedding_dim": 1}  # a small model is built faster
    model = build(config.model, data.schema, **hparams)
    return SizePlan.full(data.schema, width, model.tables.plan.first_order)
