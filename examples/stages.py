"""Run the three stages one by one, and write the codes and the sound to files.

python examples/stages.py [MODEL] [SECONDS]
"""

import sys

import numpy as np
import soundfile

from khala_mlx import Khala

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
np.savez("stages.npz", codes=codes)  # `khala decode stages.npz` reads it
waveform = khala.render(codes)
print("rendered:", waveform.shape)
soundfile.write("stages.wav", np.clip(waveform, -1, 1), codec.sample_rate)
