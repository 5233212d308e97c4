"""khala-mlx: whole songs from tags and lyrics, in MLX.

from khala_mlx import Khala

khala = Khala.from_pretrained("khala-model")
khala.generate(tags="slow rock", lyrics="...", minutes=2, seed=7).save("song.wav")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from khala_mlx.errors import KhalaError, KhalaWarning

if TYPE_CHECKING:
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.prompt.request import Request
    from khala_mlx.song.song import Song
    from khala_mlx.song.take import Take

__all__ = ["Khala", "KhalaError", "KhalaWarning", "Request", "Song", "Take"]

# Imported when first used, so that `khala --help` never imports MLX.
_LAZY = {
    "Khala": "khala_mlx.pipeline.khala",
    "Request": "khala_mlx.prompt.request",
    "Song": "khala_mlx.song.song",
    "Take": "khala_mlx.song.take",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("khala-mlx")
    if name in _LAZY:
        from khala_mlx.performance.blas import load

        # Before the first import of mlx.
        load()
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
