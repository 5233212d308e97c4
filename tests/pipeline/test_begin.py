from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khala_mlx import Khala, KhalaError
from khala_mlx.prompt.request import Request


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"minutes": 11}, "minutes must be 1..10"),
        ({"seconds": 0.0}, "above 0"),
        ({"seconds": -1.0}, "number of seconds"),
        ({"seconds": float("nan")}, "type float"),
        ({"seconds": "12"}, "type float"),
        ({"seconds": 10**400}, "type float"),
        ({"seconds": 1e308}, "number of seconds"),
        ({"seconds": 1.0, "min_seconds": 2.0}, "not below min_seconds"),
        ({"min_seconds": -1.0}, "number of seconds"),
        ({"top_k": 0}, "top_k"),
        ({"refine_top_k": 0}, "top_k"),
        ({"temperature": 0}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"text_mode": "other"}, "text_mode"),
        ({"tags": None}, "type str"),
        ({"lyrics": "x" * 400}, "--truncate-lyrics"),
    ],
)
def test_bad_requests_are_refused_before_anything_loads(
    tiny_folder: Path, arguments: dict[str, Any], sentence: str
) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    with pytest.raises(KhalaError, match=sentence):
        khala.generate(**arguments)
    assert khala.parts._loaded == {}


def test_wrong_packings_of_the_cache_are_refused(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    for bits, sentence in ((3, "must be 4 or 8"), (8, "heads of 32")):
        with pytest.raises(KhalaError, match=sentence):
            khala.generate(seconds=0.2, kv_bits=bits)
    assert khala.parts._loaded == {}


def test_no_seeds_are_refused_before_anything_loads(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    for seeds, sentence in (([], "At least one seed"), ([1, -4], "seed must be")):
        with pytest.raises(KhalaError, match=sentence):
            khala.compose_many(np.arange(5), seeds=seeds, max_frames=3)
    assert khala.parts._loaded == {}


def test_a_take_is_described_before_anything_loads(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    request = Request(tags="pop", seconds=0.2, min_seconds=0.1, seed=3)
    take = khala.begin(request)
    ids = khala.prompt_ids(tags="pop", instrumental=True)
    assert take.prompts == (ids[0].tolist(), ids[1].tolist())
    assert take.budget == (69, 35)
    assert take.metadata["model"]["config_sha256"] == khala.parts.identity
    assert take.metadata["request"] == {**request.to_dict(), "instrumental": True}
    assert khala.preview(request)["max_frames"] == 69
    assert khala.parts._loaded == {}


def test_the_seed_of_the_detail_is_checked_too(tiny_folder: Path) -> None:
    khala = Khala.from_pretrained(tiny_folder)
    assert Request(seed=3).detail_seed == 3
    assert Request(seed=3, refine_seed=4).detail_seed == 4
    with pytest.raises(KhalaError, match="seed"):
        khala.begin(Request(refine_seed=-1))
