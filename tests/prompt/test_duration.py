import warnings
from typing import Any

import pytest

from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.prompt.duration import frame_budget
from khala_mlx.prompt.request import Request

TINY = KhalaConfig.tiny()


def budget(**request: Any) -> tuple[int, int]:
    return frame_budget(KhalaConfig(), Request(**request), 100, 80)


def test_a_small_window_breaks_no_wish_that_was_not_made() -> None:
    """Tiny windows hold less than a second, and one minute is the least a prompt can ask for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        most, _ = frame_budget(TINY, Request(), 20, 10)
    assert most == (TINY.backbone.context - 20) // 2
    for wish in (Request(minutes=2), Request(seconds=5.0), Request(min_seconds=5.0)):
        with pytest.warns(KhalaWarning, match="do not fit the window"):
            frame_budget(TINY, wish, 20, 10)


def test_the_frame_budget_of_the_released_windows() -> None:
    # 1.8 minutes at 21.533 frames a second (upstream: 2584 tokens a minute).
    assert budget(minutes=1) == (2326, 0)
    assert budget(seconds=10.0, min_seconds=10.0) == (216, 216)
    with pytest.warns(KhalaWarning, match=r"10:00 of song .* the longest is 6:18"):
        assert budget(minutes=10) == (8142, 0)
    with pytest.warns(KhalaWarning, match=r"the longest is 6:18"):
        assert budget(min_seconds=1000.0) == (8142, 8142)


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(KhalaError, match="leaves no room"):
        frame_budget(TINY, Request(), 511, 80)
    with pytest.raises(KhalaError, match="384 tokens leaves no room"):
        frame_budget(TINY, Request(), 20, 384)
