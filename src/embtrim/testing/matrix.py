"""The matrix of methods and promises that `python -m embtrim.testing` prints."""

from __future__ import annotations

from collections.abc import Mapping

from embtrim.config import Config
from embtrim.methods import METHODS, MagnitudeConfig, SSEDSConfig
from embtrim.testing.checks import CHECKS, broken_promise, check_planted
from embtrim.testing.toys import TASKS

# Rows of the matrix that keep planted noise: the reason, and the settings that mend it, if there are any.
KEEPS_NOISE: Mapping[str, tuple[str, Config | None]] = {
    "uniform": ("one width for all fields", None),
    "random": ("it looks at nothing", None),
    "mde": ("it knows the size of a field, not its worth", None),
    "magnitude": ("a column of many rows has a large norm", MagnitudeConfig(cost_aware=True)),
    "sseds": ("every table keeps a column, so that no score takes the last one of an id", SSEDSConfig(min_dim=0)),
    "sseds-faithful": ("|g| of training data takes what was learned by heart for useful", SSEDSConfig(min_dim=0)),
    "optembed": ("rows learned by heart have large norms, and a table that keeps rows keeps a column", None),
    "optembed-faithful": (
        "its thresholds hardly move in so few steps, and a table that keeps rows keeps a column",
        None,
    ),
    "pme": ("at initialisation the saliency of a value tells little more than how often it occurs", None),
}


def matrix_configs() -> dict[str, Config]:
    """The rows of the matrix: every method with its defaults, and with its preset "faithful" if it has one."""
    configs = {name: method.config() for name, method in METHODS.items()}
    presets = {name: method for name, method in METHODS.items() if hasattr(method.config, "faithful")}
    return {**configs, **{f"{name}-faithful": method.parse({"preset": "faithful"}) for name, method in presets.items()}}


def conformance_matrix(configs: Mapping[str, Config]) -> str:
    """A markdown table with all checks of methods on the toy tasks, one line per method and task.

    The last column is `check_planted`, which has a task of its own.

    Args:
        configs: Settings of methods, by the name of their row.
    """
    names = [*CHECKS, "planted noise goes first"]
    lines = [f"| method | task | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for task_name, make_task in TASKS.items():
        task = make_task()
        for name, config in configs.items():
            faults = [broken_promise(check, task, config) for check in CHECKS.values()]
            cells = [f"FAILS: {fault}" if fault else "holds" for fault in faults]
            cells.append(planted_cell(name, config) if task_name == "zoo" else "-")
            lines.append(f"| {name} | {task_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planted_cell(name: str, config: Config) -> str:
    """The result of `check_planted` for a row of the matrix, in words; where it is known to fail, also the remedy."""
    try:
        check_planted(config)
        return "holds"
    except AssertionError as error:
        if name not in KEEPS_NOISE:
            return f"FAILS: {error}"
        why, mended = KEEPS_NOISE[name]
        text = f"fails as expected, {error} ({why})"
    if mended is None:
        return text
    check_planted(mended)
    changes = [f"{key} = {value!r}" for key, value in mended if value != getattr(config, key)]
    return f"{text}; holds with {', '.join(changes)}"
