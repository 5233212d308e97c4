"""Make songs of several seeds, composed together.

python examples/several_seeds.py [MODEL] [SECONDS]
"""

import sys
from dataclasses import replace

import numpy as np

from khala_mlx import Khala, Request

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model)
request = Request(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds)
takes = [khala.begin(replace(request, seed=seed)) for seed in (1, 2, 3)]
for take, song in zip(takes, khala.finish_many(takes), strict=True):
    seed = take.request.seed
    song.save(f"seed-{seed}.wav")
    print(f"seed {seed}: {song.duration:.1f} s, peak {np.abs(song.waveform).max():.2f}")
