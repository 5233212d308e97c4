"""The `khala` command."""

from khala_mlx.cli.main import main

__all__ = ["main"]
