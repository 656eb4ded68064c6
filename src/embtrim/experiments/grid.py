"""The grid of `compare`: its settings, its cells, and the cells that are on disk.

A cell is one trained model. The full model of each (model, seed) is a cell, which all methods share.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from embtrim.config import Config, first_change, read_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import ConfigError, DataError, hint
from embtrim.experiments.records import RECORDS_FILE, RunRecord, read_records
from embtrim.experiments.settings import InitSetting, RunConfig, check_run
from embtrim.methods import METHODS, method_named
from embtrim.models import MODELS, arguments
from embtrim.models.ctr_model import HyperParameters
from embtrim.plan.budget import Budget, BudgetSetting
from embtrim.plan.budget_limits import target_settings
from embtrim.plan.table import Bits, Target
from embtrim.system.files import write_then_rename
from embtrim.system.holding import content
from embtrim.training.settings import TrainConfig
from embtrim.untrusted import read_json

FULL = "full"
ALL = "all"


class CompareConfig(Config):
    """All settings of a grid; its result depends on them and on the data.

    Attributes:
        models: Names of base models (`embtrim models`).
        hparams: Arguments of the base models. A model takes the arguments that it knows; every argument must be known to
            at least one model.
        train: Settings of training, for full and compact models alike.
        methods: Names of search methods, run with their default settings; "all" stands for every method.
        variants: Methods with other settings, by label: {"method": name, setting: value, ...}. The keys `bits`, `init`
            and `teacher` set the precision of the variant's tables, and the initial weights and the labels of its compact
            models (see RunConfig). Without `bits` tables are stored in 32, the setting of the papers.
        budgets: Size limits of the compact tables, such as "10%", "200MB" or "1.5M params".
        init: Initial weights of compact models: "scratch", "initial", "inherit", "low_rank" or "auto"; see RunConfig.
        teacher: Share of the full model's predicted probability in the labels of compact models; see RunConfig.
        target: Where the tables will be served: "torch", "onnx" or "fbgemm". Sizes are counted as that backend stores
            them, and a budget in bytes then includes the vocabulary.
        seed: First seed.
        seeds: Number of seeds.
    """

    models: tuple[str, ...] = Field(default=("deepfm",), min_length=1)
    hparams: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    methods: tuple[str, ...] = (ALL,)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    budgets: tuple[BudgetSetting, ...] = Field(
        default=tuple(map(Budget.parse, ("50%", "20%", "10%", "5%", "2%", "1%"))), min_length=1
    )
    init: InitSetting = "auto"
    teacher: float = Field(default=0.5, ge=0, le=1)
    target: Target | None = None
    seed: int = Field(default=0, ge=0)
    seeds: int = Field(default=3, ge=1)


@dataclass(frozen=True)
class Cell:
    """One trained model of a grid.

    Attributes:
        model: Name of the base model.
        seed: Seed of training and search.
        label: Name of a method or label of a variant; "full" for a full model.
        budget: Size limit of the compact tables; None for a full model.
    """

    model: str
    seed: int
    label: str = FULL
    budget: Budget | None = None

    @property
    def name(self) -> str:
        """Name of the cell's record, without suffix; equal budgets give one name, however they are written."""
        parts = [self.model, self.label, f"seed{self.seed}"]
        if (budget := self.budget) is not None:
            amount, unit = (100 * budget.amount, "pct") if budget.kind == "percent" else (budget.amount, budget.kind)
            parts.insert(2, f"{amount:.15g}{unit}")
        return "-".join(parts)

    @property
    def full(self) -> Cell:
        """The cell of the full model with the same base model and seed."""
        return Cell(self.model, self.seed)


def cell_of(model: str, seed: int, label: str, budget: str | None) -> Cell:
    """The cell that a file names, its budget in words."""
    return Cell(model, seed, label, None if budget is None else Budget.parse(budget))


class Skipped(Config):
    """A cell that could not be made, for example because its budget is too small for its method.

    Attributes:
        model: Name of the base model.
        label: Name of a method or label of a variant; "full" for a full model.
        budget: Size limit of the compact tables; None for a full model.
        seed: Seed of training and search.
        reason: Message of the error.
    """

    model: str
    label: str
    budget: str | None
    seed: int
    reason: str

    @property
    def cell(self) -> Cell:
        """The cell that was skipped."""
        return cell_of(self.model, self.seed, self.label, self.budget)


# --- the grid -------------------------------------------------------------------------------------------------------


def resolve(config: CompareConfig) -> CompareConfig:
    """The config with "all" replaced by the names of all methods, and without repetitions.

    Raises:
        ConfigError: A model, method or setting is unknown, or a label is not a name.
    """
    methods = tuple(METHODS) if ALL in config.methods else tuple(dict.fromkeys(config.methods))
    models, budgets = tuple(dict.fromkeys(config.models)), tuple(dict.fromkeys(config.budgets))
    config = config.replace(models=models, methods=methods, budgets=budgets)
    if not settings_by_label(config):
        raise ConfigError("no methods and no variants: there is nothing to compare; give methods = ['all']")
    known = [name for name in models if name in MODELS]  # check_run rejects unknown ones
    allowed = sorted({name for model in known for name in arguments(model)})
    for key in config.hparams:
        if known and key not in allowed:
            raise ConfigError(f"[hparams] {key!r} is an argument of none of {', '.join(known)}; {hint(key, allowed)}")
    return config


@dataclass(frozen=True)
class MethodSetup:
    """A search method with everything that it runs with.

    Attributes:
        method: Name of the method; "full" for full models.
        search: All settings of the method.
        bits: Bits per stored value in the compact tables.
        init: Initial weights of the compact models; None for full models.
        teacher: Share of the full model's probability in the labels of the compact models; 0 for full models.
    """

    method: str
    search: dict[str, Any]
    bits: Bits = 32
    init: InitSetting | None = None
    teacher: float = 0.0


def settings_by_label(config: CompareConfig) -> dict[str, MethodSetup]:
    """The method and settings of each label: the methods, then the variants.

    Raises:
        ConfigError: A method or setting is unknown, or a label is not a name.
    """
    found = {
        name: MethodSetup(
            name, method_named(name).config().model_dump(mode="json"), init=config.init, teacher=config.teacher
        )
        for name in config.methods
    }
    for label, variant in config.variants.items():
        where = f"variants.{label}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", label):
            raise ConfigError(f"[variants] label {label!r} is not a name; allowed: letters, digits, - and _")
        if label in METHODS or label in (FULL, ALL):
            raise ConfigError(f"[{where}] the label is taken, by {label!r} with default settings; choose another")
        if not isinstance(variant.get("method"), str):
            raise ConfigError(f"[{where}] needs method, one of {', '.join(METHODS)}; given {variant.get('method')!r}")
        try:
            method = method_named(variant["method"])
        except ConfigError as error:
            raise ConfigError(f"[{where}] {error}") from None
        settings = {key: value for key, value in variant.items() if key not in ("method", "bits", "init", "teacher")}
        bits, init = variant.get("bits", 32), variant.get("init", config.init)
        teacher = variant.get("teacher", config.teacher)
        for name, given, kind in (("bits", bits, Bits), ("init", init, InitSetting)):
            if given not in get_args(kind):
                allowed = ", ".join(map(str, get_args(kind)))
                raise ConfigError(f"[{where}] {name} must be one of {allowed}; given {given!r}")
        if type(teacher) not in (int, float) or not 0 <= teacher <= 1:
            raise ConfigError(f"[{where}] teacher must be a number from 0 to 1; given {teacher!r}")
        search = method.parse(settings, where).model_dump(mode="json")
        found[label] = MethodSetup(method.name, search, bits, init, float(teacher))
    return found


def run_config(config: CompareConfig, model: str) -> RunConfig:
    """Settings of a run with one model of the grid; see `cell_config` for those of a cell."""
    known = arguments(model) if model in MODELS else config.hparams
    hparams = {key: value for key, value in config.hparams.items() if key in known}
    return RunConfig(
        model=model, hparams=hparams, train=config.train, init=config.init, teacher=config.teacher, bits=32,
        target=config.target, controls=(),
    )  # fmt: skip


def cell_config(config: CompareConfig, cell: Cell) -> RunConfig:
    """Settings of a run that makes one cell of the grid."""
    run = run_config(config, cell.model).replace(seed=cell.seed)
    if cell.budget is None:
        return run
    setup = settings_by_label(config)[cell.label]
    return run.replace(
        method=setup.method, search=setup.search, bits=setup.bits, init=setup.init, teacher=setup.teacher,
        budget=cell.budget,
    )  # fmt: skip


def check_compare(data: EncodedDataset, config: CompareConfig) -> None:
    """Raise early, before any training, for a missing split or an unknown name or setting; see `resolve` too."""
    for model in config.models:
        check_run(data, run_config(config, model))


def grid(config: CompareConfig) -> list[Cell]:
    """The cells in the order of the work: the full models, then all cells of one (seed, model) together."""
    seeds = range(config.seed, config.seed + config.seeds)
    pairs = list(itertools.product(seeds, config.models))
    labels = settings_by_label(config)
    return [Cell(model, seed) for seed, model in pairs] + [
        Cell(model, seed, label, budget) for seed, model in pairs for budget in config.budgets for label in labels
    ]


# --- what is on disk ------------------------------------------------------------------------------------------------


def record_path(out: Path, cell: Cell) -> Path:
    """File of a cell's record."""
    return out / "records" / f"{cell.name}.json"


def weights_path(out: Path, cell: Cell) -> Path:
    """File of a full model's weights."""
    return out / "full" / f"{cell.model}-seed{cell.seed}.safetensors"


def finished(cells: Iterable[Cell], data: EncodedDataset, config: CompareConfig, out: Path) -> dict[Cell, RunRecord]:
    """The records that exist in the folder of a grid.

    Raises:
        DataError: A record was made with other settings or is damaged, or `out` is not a folder of `compare`.
    """
    if out.exists() and (not out.is_dir() or content(out)):
        settings = out / "config.toml"
        if not settings.is_file() or "models" not in read_toml(settings):
            raise DataError(f"{out} exists and is not a folder of `embtrim compare`; choose another --out or remove it")
    found = {}
    labels = settings_by_label(config)
    for cell in cells:
        path = record_path(out, cell)
        if path.exists():
            found[cell] = RunRecord.load(path)
            check_settings(path, found[cell], cell, labels, data, config)
    return found


def check_settings(
    path: Path,
    record: RunRecord,
    cell: Cell,
    labels: dict[str, MethodSetup],
    data: EncodedDataset,
    config: CompareConfig,
) -> None:
    """Raise DataError if a record was made with other settings than the cell asks for."""
    setup = labels.get(cell.label, MethodSetup(FULL, {}))
    hparams = {**arguments(cell.model), **run_config(config, cell.model).hparams}
    expected = {
        "the data": data.schema.fingerprint,
        "rows": {name: data.num_rows(name) for name in data.splits},
        "method": setup.method,
        "bits": setup.bits,
        "init": setup.init,
        "teacher": setup.teacher,
        **target_settings(cell.budget, config.target),
        **_under("train", config.train.model_dump(mode="json")),
        **_under("hparams", HyperParameters.parse(hparams).model_dump(mode="json", include=set(hparams))),
        **_under("search", setup.search),
    }
    # A setting that is newer than the record had its default when the record was made.
    default = {} if cell.label == FULL else method_named(setup.method).config().model_dump(mode="json")
    made = {
        "the data": record.data["fingerprint"],
        "rows": record.data["num_rows"],
        "method": record.method or record.variant,
        "bits": record.bits,
        "init": record.init,
        "teacher": record.teacher,
        "target": record.target or "torch",
        "vocabulary in the budget": record.counted_vocabulary_bytes is not None,
        **_under("train", {**TrainConfig().model_dump(mode="json"), **record.train}),
        **_under("hparams", record.hparams),
        **_under("search", {**default, **record.search}),
    }
    chosen = () if config.train.embedding_l2 is not None else ("train.embedding_l2",)
    for free in ("train.seed", "hparams.seed", "train.checkpoint_seconds", *chosen):
        expected.pop(free, None)
        made.pop(free, None)
    change = first_change(made, expected)
    if change is not None:
        raise DataError(f"{path} was made with {change}; choose another --out, or give the earlier settings")


def _under(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def read_skipped(out: str | Path) -> list[Skipped]:
    """The cells of a folder that failed when they were last tried and still have no record.

    Raises:
        DataError: The file skipped.json or the folder's records.jsonl is damaged.
    """
    path = Path(out) / "skipped.json"
    try:
        skipped = [Skipped.parse(values, where=str(path)) for values in read_json(path)]
        without_file = [s for s in skipped if not record_path(Path(out), s.cell).exists()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and start the comparison again") from None
    if (Path(out) / RECORDS_FILE).exists():
        made = {cell_of(r.model, r.seed, r.variant, r.budget) for r in read_records(out)}
        return [s for s in skipped if s.cell not in made]
    return without_file


def write_skipped(out: Path, skipped: Iterable[Skipped]) -> None:
    """Write the list that `read_skipped` reads."""
    text = json.dumps([s.model_dump() for s in skipped], indent=1)
    write_then_rename(out / "skipped.json", lambda file: file.write(text.encode()))
