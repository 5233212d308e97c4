"""A song as a picture: waveform, mel spectrogram and token map (matplotlib, the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from khala_mlx.audio.mel import mel_decibels, mel_edges
from khala_mlx.errors import KhalaError
from khala_mlx.storage.atomic import appears_whole, check_destination

_BANDS, _WINDOW = 96, 2048
# About as many columns as a picture has pixels.
_COLUMNS = 1200
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse, before any work, a picture that could not be written.

    Raises:
        KhalaError: if matplotlib is missing, the suffix is not one of FORMATS, or `path` exists.
    """
    if path.suffix.lower() not in FORMATS:
        raise KhalaError(f"{path} must end in one of {', '.join(FORMATS)}.")
    check_destination(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KhalaError(
            "Pictures need matplotlib, which is missing here: `pip install 'khala-mlx[plot]'`."
        ) from error


def draw(
    path: Path,
    *,
    title: str = "",
    sound: tuple[np.ndarray, int] | None = None,
    codes: np.ndarray | None = None,
    frame_rate: float | None = None,
) -> None:
    """Draw what there is of a song.

    Args:
        path: the picture, see `check_picture`.
        sound: samples [L, C] and their rate: drawn as waveform and mel spectrogram.
        codes: [K, T], drawn as a map of token against time.
        frame_rate: frames of the codes a second; their axis counts frames without it.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    count = (2 if sound else 0) + (0 if codes is None else 1)
    figure = Figure(figsize=(10, 2.6 * count), layout="constrained")
    panels = figure.subplots(count, squeeze=False)[:, 0]
    if sound:
        _waveform(panels[0], *sound)
        _mel(panels[1], *sound)
    if codes is not None:
        _tokens(panels[-1], codes, frame_rate)
    # Dollars would be taken for mathematics.
    figure.suptitle(title[:100].replace("$", r"\$"))
    with appears_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _waveform(axes: Any, waveform: np.ndarray, rate: int) -> None:
    step = max(1, len(waveform) // _COLUMNS)
    mono = waveform[: max(step, len(waveform) // step * step)].reshape(-1, step, waveform.shape[1])
    times = np.arange(len(mono)) * step / rate
    axes.fill_between(times, mono.min((1, 2)), mono.max((1, 2)), linewidth=0)
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.axhline(-1, color="grey", linewidth=0.5)
    axes.set(ylabel="amplitude", xlim=(0, len(waveform) / rate), ylim=(-1.05, 1.05))


def _mel(axes: Any, waveform: np.ndarray, rate: int) -> None:
    hop = max(_WINDOW // 8, len(waveform) // _COLUMNS)
    level = mel_decibels(waveform.mean(1), rate, bands=_BANDS, length=_WINDOW, hop=hop)
    seconds = len(waveform) / rate
    image = axes.imshow(
        level.T, origin="lower", aspect="auto", extent=(0, seconds, 0, _BANDS), cmap="magma"
    )
    edges = mel_edges(rate, _BANDS)[1:-1]
    shown = [hertz for hertz in (200, 500, 1000, 2000, 5000, 10000) if hertz < edges[-1]]
    axes.set_yticks(np.interp(shown, edges, np.arange(_BANDS)), [str(hertz) for hertz in shown])
    axes.set(ylabel="Hz")
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.01)


def _tokens(axes: Any, codes: np.ndarray, frame_rate: float | None) -> None:
    layers, frames = codes.shape
    stop = frames / frame_rate if frame_rate else frames
    image = axes.imshow(
        codes, aspect="auto", extent=(0, stop, layers, 0), interpolation="nearest", cmap="viridis"
    )
    axes.set(xlabel="seconds" if frame_rate else "frames", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label="code", pad=0.01)
