"""The released sizes with random weights: every stage runs, within 20 GB and 30 minutes."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from upstream_rules import write_tokens

from khala_mlx.config import KhalaConfig
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.sampling import Detail
from khala_mlx.model.superres import SuperRes

FRAMES = 16


@contextmanager
def measured(name: str, report: dict[str, Any]) -> Iterator[None]:
    mx.reset_peak_memory()
    began = time.perf_counter()
    yield
    report[name] = {
        "seconds": round(time.perf_counter() - began, 2),
        "mlx_peak_gb": round(mx.get_peak_memory() / 1e9, 2),
    }


def build(make: Callable[[], Any]) -> Any:
    model: nn.Module = make()
    mx.eval(model.parameters())
    return model


@pytest.mark.slow
def test_released_sizes_run() -> None:
    config, report = KhalaConfig(), {}
    mx.random.seed(0)
    began = time.perf_counter()

    with measured("load backbone", report):
        backbone = build(lambda: Backbone(config.backbone, config.tokens))
    prompt = np.arange(14)
    with measured("compose 40 tokens", report):
        written = write_tokens(
            backbone, prompt, max_tokens=40, min_tokens=40, top_k=50, key=mx.random.key(0)
        )
    assert len(written) == 40
    del backbone
    mx.clear_cache()

    coarse = np.random.default_rng(0).integers(0, 1024, (2, FRAMES))
    with measured("load superres", report):
        superres = build(lambda: SuperRes(config.superres, config.tokens))
    with measured("refine 16 frames, 62 steps", report):
        codes = superres.refine(prompt, coarse, Detail(top_k=10), key=mx.random.key(1))
    assert codes.shape == (64, FRAMES)
    del superres
    mx.clear_cache()

    with measured("load codec", report):
        codec = build(lambda: Codec(config.codec))
    with measured("render 16 frames", report):
        wave = codec.decode(codes)
    assert wave.shape == (FRAMES * 2048, 2)
    assert np.isfinite(wave).all()

    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    report["total"] = {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_rss_gb": round(peak / 1e9, 2),
    }
    print(json.dumps(report, indent=1))
    assert peak < 20e9
    assert report["total"]["seconds"] < 1800
