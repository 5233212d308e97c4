"""Write a song with title, artist, loudness and fade, and show how its file turned out.

python examples/finished_file.py [MODEL] [SECONDS]
"""

import sys

from khala_mlx import Khala

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model, keep_loaded=False)
song = khala.generate(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds, seed=1)
song.save("finished.mp3", title="First Waltz", artist="me", loudness=-14, fade=seconds / 8)
for name, value in song.metadata["output"].items():
    print(f"{name:<16} {value}")
