"""Settings of a command, from the weakest: defaults, the recipe of a known dataset, --config, --set, flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from embtrim.config import Config, apply_overrides, merge, read_toml
from embtrim.errors import BudgetError, ConfigError
from embtrim.plan.budget import Budget, parse_or_auto

if TYPE_CHECKING:  # these modules import torch: commands import them when they need them, --help does not wait
    from embtrim.data.read_options import ReadOptions
    from embtrim.experiments.grid import CompareConfig
    from embtrim.experiments.settings import RunConfig
    from embtrim.trackers.tracker import Tracker

SettingsT = TypeVar("SettingsT", bound=Config)


class EncodeSettings(Config):
    """Settings of `embtrim encode`.

    Attributes:
        schema_file: TOML file with the schema; if None, the schema is inferred.
        label: Column with the binary label, or a rule that makes it.
        where: Rule that chooses the rows of the log.
        time: Column that orders the rows for a split by time.
        time_format: Form of the times in text, as strptime takes it.
        split: How rows are split: "8:1:1", "time:8:1:1" or "time:CUT,CUT".
        valid: Log of the validation split.
        test: Log of the test split.
        dataset: Name of a known dataset; the log has its layout.
        min_count: Occurrences that a value needs for a row of its own, in the fields of a known dataset.
        seed: Seed of a random split.
        read: How the log is read; see ReadOptions.
    """

    schema_file: str | None = None
    label: str | None = None
    where: str | None = None
    time: str | None = None
    time_format: str | None = None
    split: str | None = None
    valid: str | None = None
    test: str | None = None
    dataset: str | None = None
    min_count: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    read: dict[str, Any] = Field(default_factory=dict)


class PredictSettings(Config):
    """Settings of `embtrim predict`.

    Attributes:
        keep: Columns of the log that are copied beside the score.
        drift_tolerance: Share by which unseen or missing values may exceed those of validation.
        strict: Fail if a field has drifted.
        raw_text: Copy texts into a csv as they are, also those that a spreadsheet would run as formulas.
        read: How the log is read; see ReadOptions.
    """

    keep: tuple[str, ...] = ()
    raw_text: bool = False
    drift_tolerance: float = Field(default=0.01, ge=0, le=1)
    strict: bool = False
    read: dict[str, Any] = Field(default_factory=dict)


def settle(
    kind: type[SettingsT],
    config: Path | None,
    overrides: Sequence[str] | None,
    flags: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
) -> SettingsT:
    """Merge settings, from the weakest: the recipe, the file, --set, the flags that were given."""
    values: dict[str, Any] = dict(recipe or {})
    if config is not None:
        in_file = read_toml(config)
        kind.parse(in_file, where=str(config))  # parsed alone first: the message then names the file
        values = merge(values, in_file)
    values = apply_overrides(values, overrides or ())
    kind.parse(values)  # parsed before the flags, which would hide a fault
    return kind.parse(merge(values, {key: value for key, value in flags.items() if value is not None}))


def run_config(data: str, config: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> RunConfig:
    """The settings of a run; faults are found before any work is done."""
    if isinstance(flags.get("budget"), str):
        flags = {**flags, "budget": _budget(flags["budget"])}
    from embtrim.experiments.settings import RunConfig, split_control
    from embtrim.methods import method_named

    settings = settle(RunConfig, config, overrides, flags)
    method_named(settings.method)
    for control in settings.controls:
        split_control(control)
    recipe = _known_recipe(data, [settings.model])
    if recipe is not None:
        settings = settle(RunConfig, config, overrides, flags, recipe)
    return settings.replace(bits=settings.stored_bits)  # as `--dry-run` shows them


def compare_config(
    data: str, config: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]
) -> CompareConfig:
    """The settings of a grid; faults are found before any work is done."""
    from embtrim.experiments.grid import CompareConfig, resolve

    settings = settle(CompareConfig, config, overrides, flags)
    recipe = _known_recipe(data, settings.models)
    return resolve(settings if recipe is None else settle(CompareConfig, config, overrides, flags, recipe))


def _known_recipe(data: str, models: Sequence[str]) -> dict[str, Any] | None:
    """The recipe of a known dataset, or None. It was written for one model; other models take the arguments they know."""
    from embtrim.data.catalog import CATALOG
    from embtrim.models import MODELS, arguments

    if data not in CATALOG or Path(data).is_dir():
        return None
    recipe = CATALOG[data].recipe
    known = {key for name in models if name in MODELS for key in arguments(name)}
    hparams = {key: value for key, value in recipe.get("model", {}).items() if key in known}
    return {"hparams": hparams, "train": recipe.get("train", {})}


def _budget(text: str) -> Budget | Literal["auto"]:
    """The budget of a flag, whose name leads the message of an error."""
    try:
        return parse_or_auto(text)
    except BudgetError as error:
        raise ConfigError(f"--budget: {error}") from None


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """The budgets of --budgets, which are separated by commas."""
    try:
        found = tuple(map(Budget.parse, split_commas(text)))
    except BudgetError as error:
        raise ConfigError(f"--budgets: {error}") from None
    if not found:
        raise ConfigError("--budgets names no budget; give some, such as 20%,10%,5%")
    return found


def trackers_of(track: str | None, out: Path | None) -> list[Tracker]:
    """The tracker that --track names, if any.

    Raises:
        ConfigError: The name is unknown, or its tool is not installed.
    """
    if track is None:
        return []
    from embtrim.trackers import tracker_beside

    return [tracker_beside(track, out or Path("dry-run"))]


@contextmanager
def closed_after(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Close trackers after a `with` block, however it ends."""
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.close()


def check_known(settings: EncodeSettings, log: Sequence[str] | None) -> None:
    """Raise ConfigError for settings that a known dataset has of its own."""
    own = [
        key
        for key in ("schema_file", "label", "where", "time", "time_format", "valid", "test", "read")
        if getattr(settings, key)
    ]
    if own:
        raise ConfigError(
            f"dataset {settings.dataset!r} brings its own {', '.join(own)}; leave that out, or leave out --dataset"
        )
    if log and len(log) > 1:
        raise ConfigError(f"--dataset takes one folder (or file) as LOG, given {len(log)}: {', '.join(log)}")


def parse_bits(text: str | None) -> int | str | None:
    """The value of --bits: a number, or a word such as "mixed"."""
    return int(text) if text and text.isdecimal() else text


def read_flags(
    format: str | None,
    no_header: bool | None,
    columns: str | None,
    separator: str | None,
    encoding: str | None,
    quote: str | None,
    escape: str | None,
    on_error: str | None,
) -> dict[str, Any]:
    """The [read] section that the flags about the log make; flags that were not given are left out."""
    flags = {
        "format": format,
        "header": False if no_header else None,
        "columns": None if columns is None else split_commas(columns),
        "separator": None if separator is None else separator.replace("\\t", "\t"),
        "encoding": encoding,
        "quoted": False if quote == "none" else None,
        "quote": None if quote == "none" else quote,
        "escape": escape,
        "on_error": on_error,
    }
    return {key: value for key, value in flags.items() if value is not None}


def read_options(values: Mapping[str, Any]) -> ReadOptions:
    """The options of a [read] section; ConfigError if one is wrong."""
    from embtrim.data.read_options import ReadOptions

    return ReadOptions.parse(values, where="read")


def split_commas(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated flag, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def needed(out: Path | None) -> Path:
    """The value of --out; ConfigError if it was not given."""
    if out is None:
        raise ConfigError("--out is needed: where to write (or --dry-run)")
    return out
