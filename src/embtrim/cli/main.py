"""The command line: one command per verb, each a thin mirror of a Python function.

Results go to stdout, logs and errors to stderr. Exit codes: 0 done; 1 failed; 2 usage (a flag or a setting is wrong);
130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import embtrim
from embtrim.cli.data_commands import encode, profile
from embtrim.cli.errors import Stopped, fail, fail_interrupted, fail_os, stopping
from embtrim.cli.list_commands import datasets, methods, models
from embtrim.cli.model_commands import compact, curve, search, train
from embtrim.cli.run_commands import compare, report, run
from embtrim.cli.serving_commands import export, predict, update
from embtrim.errors import ConfigError, EmbtrimError
from embtrim.system.interrupts import signals_raised

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shrink the embedding tables of CTR models: find sizes within a budget, retrain, and verify the result.",
)


# In the order of --help.
for command in (
    encode, profile, train, curve, search, compact, predict, update, export,
    run, compare, report, datasets, models, methods,
):  # fmt: skip
    app.command()(stopping(command))


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"embtrim {embtrim.__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point. A user's error becomes one clear line and an exit code; a fault of embtrim keeps its traceback."""
    code: Any
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with signals_raised():
            code = app(args=given, standalone_mode=False)
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort) as interrupt:
        code = fail_interrupted(interrupt, given)
    except Stopped as stopped:
        code = fail_interrupted(stopped.interrupt, given)
    except ConfigError as error:
        code = fail(str(error), 2)
    except EmbtrimError as error:
        code = fail(str(error), 1)
    except OSError as error:
        code = fail_os(error)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of click, which some versions of typer have a copy of
        if show is None:
            raise
        show(file=sys.stderr)
        code = 2
    sys.exit(code or 0)
