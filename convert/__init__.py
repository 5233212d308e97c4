"""Readers of foreign checkpoints, the only place that knows their layouts, and of training runs."""

from khala_mlx.convert.adapters import export_adapter, read_adapter
from khala_mlx.convert.fuse import fuse
from khala_mlx.convert.run import convert, pack

__all__ = ["convert", "export_adapter", "fuse", "pack", "read_adapter"]
