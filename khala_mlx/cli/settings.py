"""The user's own defaults: a TOML file in the platform's place, one table for each command.

[generate]
model = "khala-model"
loudness = -14
"""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from khala_mlx.errors import KhalaError
from khala_mlx.storage.paths import named_settings
from khala_mlx.text import shown


def settings_path() -> Path:
    """KHALA_CONFIG, or config.toml where the platform keeps such files."""
    return named_settings() or Path(click.get_app_dir("khala")) / "config.toml"


def read_settings(main: click.Group, path: Path | None = None) -> dict[str, Any]:
    """The defaults of the file for each command, as click's default_map.

    Raises:
        click.UsageError: if it is not a TOML, names a command or an option that does not exist, or
            gives an option what it cannot have.
    """
    try:
        path = path or settings_path()
    except KhalaError as error:
        raise click.UsageError(str(error)) from error
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is not a TOML file: {error}.") from error
    return _checked(main, data, str(path))


def _checked(group: click.Group, data: dict[str, Any], where: str) -> dict[str, Any]:
    found = {}
    for name, table in data.items():
        command = group.commands.get(name)
        if command is not None and not isinstance(table, dict):
            raise click.UsageError(f"{where}: {name!r} must be a table, [{name}].")
        if command is None:
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
        found[parameter.name] = _value(parameter, value, f"{where}: {shown(name)}")
    return found


def _value(parameter: click.Option, value: Any, where: str) -> Any:
    """As it would stand on the command line; switches are true or false."""
    if parameter.multiple:
        return [_one(each, where) for each in (value if isinstance(value, list) else [value])]
    return value if parameter.is_flag and isinstance(value, bool) else _one(value, where)


def _one(value: Any, where: str) -> str:
    if isinstance(value, (dict, list)):
        raise click.UsageError(f"{where} must be one value.")
    if isinstance(value, bool):
        raise click.UsageError(f"{where} is not a switch: it cannot be {str(value).lower()}.")
    return str(value)


def _unknown(name: str, known: list[str], what: str) -> str:
    near = get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what} {shown(name)!r} does not exist.{hint}"
