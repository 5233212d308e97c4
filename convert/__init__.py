"""Readers of foreign checkpoints; the only place that knows foreign layouts."""

from khala_mlx.convert.run import convert

__all__ = ["convert"]
