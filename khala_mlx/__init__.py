"""khala-mlx: whole songs from tags and lyrics, in MLX.

from khala_mlx import Khala

khala = Khala.from_pretrained("khala-model")
khala.generate(tags="slow rock", lyrics="...", minutes=2, seed=7).save("song.wav")
"""

from typing import TYPE_CHECKING, Any

from khala_mlx.errors import KhalaError

if TYPE_CHECKING:
    from khala_mlx.pipeline.khala import Khala
    from khala_mlx.song.song import Song

__all__ = ["Khala", "KhalaError", "Song"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `khala --help` and the converter's --help never import MLX.
    if name == "Khala":
        from khala_mlx.pipeline.khala import Khala

        return Khala
    if name == "Song":
        from khala_mlx.song.song import Song

        return Song
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
