"""How long a song becomes: what was asked for, and what the trained windows hold."""

from __future__ import annotations

import math
import warnings

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.request import Request
from khala_mlx.text import clock_time, shown

# Songs run past the minutes asked for; upstream's progress bar allows for 0.8 more.
SPARE_MINUTES = 0.8
# Seconds that a song adds at least to a prefix, if they fit.
LEAST_ADDED = 5.0
# Seconds beyond any song, and few enough to count frames of.
_ENDLESS = 1e9


def backbone_room(config: KhalaConfig, prompt_length: int) -> int:
    """Whole frames that fit the backbone's trained window behind a prompt."""
    return max(0, config.backbone.context - prompt_length) // config.tokens.num_coarse


def frame_budget(
    config: KhalaConfig, request: Request, backbone_length: int, superres_length: int
) -> tuple[int, int]:
    """(most, least) frames of a request whose prompts have these lengths, in tokens.

    A length that cannot fit the backbone's trained window is cut, with a KhalaWarning that names
    the longest that can; superres goes beyond its own in windows.

    Raises:
        KhalaError: if nothing fits behind the prompt, or the seconds make no sense.
    """
    fit = backbone_room(config, backbone_length)
    for length, context, room in (
        (backbone_length, config.backbone.context, fit),
        (superres_length, config.superres.context, config.superres.context - superres_length),
    ):
        if room < 1:
            raise KhalaError(
                f"The prompt of {length} tokens leaves no room for a song in the trained window "
                f"of {context}: shorten the lyrics."
            )
    seconds, least = request.seconds, request.min_seconds
    for name, value in (("seconds", seconds), ("min_seconds", least)):
        if value is not None and not 0 <= value < _ENDLESS:
            raise KhalaError(
                f"{name} must be a number of seconds from 0 to below {_ENDLESS:,.0f}, "
                f"got {shown(value)}."
            )
    if seconds is not None and (seconds <= 0 or least > seconds):
        raise KhalaError(f"seconds must be above 0 and not below min_seconds, got {seconds}.")
    rate = config.codec.frame_rate
    asked = request.minutes * 60 if seconds is None else seconds
    # One minute is the least a prompt can say, and no wish that a smaller window breaks.
    wished = least if seconds is None and request.minutes == 1 else max(asked, least)
    if _frames(wished, rate) > fit:
        warn_window(config, _frames(wished, rate), fit)
    most = _frames(asked + (SPARE_MINUTES * 60 if seconds is None else 0), rate)
    most = min(fit, max(most, _frames(least, rate)))
    return most, min(most, math.ceil(least * rate))


def budget_behind(config: KhalaConfig, budget: tuple[int, int], begun: int) -> tuple[int, int]:
    """Return (most, least) frames of a song that continues `begun` frames of another.

    Raises:
        KhalaError: if the song may be no longer than that.
    """
    (most, least), rate = budget, config.codec.frame_rate
    if begun >= most:
        raise KhalaError(
            f"The continuation prefix lasts {clock_time(begun / rate)} and the song may last "
            f"{clock_time(most / rate)}. Keep less of it, or ask for more --minutes or --seconds."
        )
    # Otherwise a prefix that was a whole song leads straight to its end.
    return most, min(most, max(least, begun + math.ceil(LEAST_ADDED * rate)))


def warn_window(config: KhalaConfig, frames: int, fit: int) -> None:
    """Tell that `frames` were cut to the `fit` of the trained window."""
    rate = config.codec.frame_rate
    warnings.warn(
        f"{clock_time(frames / rate)} of song do not fit the window the backbone was trained on "
        f"({config.backbone.context} tokens): with this prompt the longest is "
        f"{clock_time(fit / rate)}.",
        KhalaWarning,
        stacklevel=4,
    )


def _frames(seconds: float, rate: float) -> int:
    return max(1, math.ceil(seconds * rate))
