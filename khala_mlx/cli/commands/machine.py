"""`khala doctor`."""

from __future__ import annotations

import click

from khala_mlx.cli.options import json_option
from khala_mlx.cli.terminal import command, report


@click.command()
@json_option
@command
def doctor(as_json: bool) -> None:
    """Tell what this machine has, what will fit, and how to mend what is wrong."""
    from khala_mlx.cli.doctor import examine

    found = examine()
    if as_json:
        report(found, as_json)
        return
    fixes = found.pop("fixes")
    report(found, as_json)
    click.echo("\n".join(["", *(f"Fix: {fix}" for fix in fixes)]) if fixes else "\nAll is well.")
