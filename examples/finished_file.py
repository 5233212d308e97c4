"""A song with title, artist, loudness and fade, and what its file tells afterwards.

python examples/finished_file.py [MODEL] [SECONDS]
"""

import sys
from pathlib import Path

from khala_mlx import Khala
from khala_mlx.song.info import describe

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model, keep_loaded=False)
song = khala.generate(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds, seed=1)
path = song.save("finished.mp3", title="First Waltz", artist="me", loudness=-14, fade=seconds / 8)
for name, value in describe(Path(path)).items():
    print(f"{name:<16} {value}")
