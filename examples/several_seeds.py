"""Songs of several seeds composed together, the loudest part of each told, all of them kept.

python examples/several_seeds.py [MODEL] [SECONDS]
"""

import sys
from dataclasses import replace

from khala_mlx import Khala, Request
from khala_mlx.audio.loudness import levels

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model)
request = Request(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds)
for song in khala.finish_many([khala.begin(replace(request, seed=seed)) for seed in (1, 2, 3)]):
    seed = song.metadata["request"]["seed"]
    song.save(f"seed-{seed}.wav")
    print(f"seed {seed}: {song.duration:.1f} s, {levels(song.waveform, song.sample_rate)}")
