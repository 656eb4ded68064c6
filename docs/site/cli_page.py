"""The reference of the command line, as Markdown, made from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from embtrim.cli.main import app

HEAD = """# Command line

Every command has `--help`. Results go to stdout; logs and errors go to stderr. Exit codes: 0 done; 1 failed; 2 a flag or a
setting is wrong; 130 interrupted by Ctrl-C; 143 interrupted by SIGTERM.
"""


def cli_page() -> str:
    """The page: a section for each command, in the order of `embtrim --help`."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD, "| command | what it does |\n|---|---|"]
    parts[-1] += "".join(
        f"\n| [`{name}`](#{name}) | {_first_sentence(command.help)} |" for name, command in group.commands.items()
    )
    parts += [_section(name, command) for name, command in group.commands.items()]
    return "\n\n".join(parts) + "\n"


def _first_sentence(text: str) -> str:
    return text.strip().partition(". ")[0].rstrip(".") + "."


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    usage = " ".join([f"embtrim {name}", *(_named(argument) for argument in arguments), "[OPTIONS]"])
    lines = [f"## {name} {{ #{name} }}", f"```text\n{usage}\n```", " ".join(command.help.split())]
    rows = [(f"`{_named(argument)}`", argument.help) for argument in arguments]
    rows += [(f"`{_flag(option)}`", option.help) for option in options]
    cells = "".join(f"\n| {left} | {_cell(right)} |" for left, right in rows)
    return "\n\n".join(lines) + f"\n\n| argument or option | meaning |\n|---|---|{cells}"


def _named(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name.strip('[]')}]"


def _flag(option: Any) -> str:
    flag = option.opts[0]
    if option.is_flag:
        return flag
    return f"{flag} {option.metavar or option.name.upper()}".replace("|", "\\|")


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
