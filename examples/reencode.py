"""Any sound through the codec and back: what the codes keep of it.

python examples/reencode.py SOUND [MODEL]
"""

import sys
from pathlib import Path

import numpy as np

from khala_mlx import Khala
from khala_mlx.audio.files import fit_scale, read_audio, write_audio

source = Path(sys.argv[1])
khala = Khala.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else "demo")
config = khala.config.codec
wave = read_audio(source, config.sample_rate, config.channels)
codes = khala.codec.encode(wave)
back = khala.render(codes)[: len(wave)]
noise = np.sum((wave - back) ** 2) / max(float(np.sum(wave**2)), 1e-20)
print(f"{codes.shape[1]} frames of {codes.shape[0]} codes, SNR {-10 * np.log10(noise):.1f} dB")
back, _ = fit_scale(back, normalize=True)
write_audio(Path("reencoded.wav"), back, config.sample_rate)
