"""Readers of foreign checkpoints, the only place that knows their layouts, and of training runs."""

from khala_mlx.convert.run import convert, pack

__all__ = ["convert", "pack"]
