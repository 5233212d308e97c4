"""The three stages one by one, with the arrays between them in files.

python examples/stages.py [MODEL] [SECONDS]
"""

import sys
from pathlib import Path

from khala_mlx import Khala
from khala_mlx.audio.files import save_codes, write_audio

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model)
codec = khala.config.codec
frames = max(1, round(seconds * codec.frame_rate))
backbone_ids, superres_ids = khala.prompt_ids(tags="waltz, slow, happy", lyrics="do re mi")
coarse = khala.compose(backbone_ids, max_frames=frames, min_frames=frames, seed=1)
print("composed:", coarse.shape)
codes = khala.refine(superres_ids, coarse, seed=1)
print("refined:", codes.shape)
save_codes(Path("stages.npz"), codes)
wave = khala.render(codes)
print("rendered:", wave.shape)
write_audio(Path("stages.wav"), wave, codec.sample_rate)
