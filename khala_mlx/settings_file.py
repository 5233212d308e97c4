"""The user's own defaults: a TOML file in the platform's place, one table for each command.

[generate]
model = "khala-model"
loudness = -14
"""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from khala_mlx.names import shown


def settings_path() -> Path:
    """KHALA_CONFIG, or config.toml where the platform keeps such files."""
    if given := os.environ.get("KHALA_CONFIG"):
        return Path(given).expanduser()
    return Path(click.get_app_dir("khala")) / "config.toml"


def read_settings(main: click.Group, path: Path | None = None) -> dict[str, Any]:
    """The defaults of the file for each command, as click's default_map.

    Raises:
        click.UsageError: if it is no TOML, or names a command or an option that does not exist.
    """
    path = path or settings_path()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is no TOML file: {error}.") from error
    return _checked(main, data, str(path))


def _checked(group: click.Group, data: dict[str, Any], where: str) -> dict[str, Any]:
    found = {}
    for name, table in data.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            raise click.UsageError(_unknown(name, list(group.commands), f"{where}: command"))
        if isinstance(command, click.Group):
            found[name] = _checked(command, table, where)
        else:
            found[name] = _options(command, table, f"{where}, [{name}]")
    return found


def _options(command: click.Command, table: dict[str, Any], where: str) -> dict[str, Any]:
    names = {
        spelled.lstrip("-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for spelled in parameter.opts
    }
    found = {}
    for name, value in table.items():
        parameter = names.get(name)
        if parameter is None or parameter.name is None:
            raise click.UsageError(_unknown(name, list(names), f"{where}: option"))
        if isinstance(value, dict) or (isinstance(value, list) and not parameter.multiple):
            raise click.UsageError(f"{where}: {shown(name)} has to be one value.")
        # As it would stand on the command line; switches are true or false.
        found[parameter.name] = value if isinstance(value, (bool, list)) else str(value)
    return found


def _unknown(name: str, known: list[str], what: str) -> str:
    near = get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what} {shown(name)!r} does not exist.{hint}"
