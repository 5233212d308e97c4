"""Encode a sound and decode it again, to hear what the codes keep of it.

python examples/reencode.py SOUND [MODEL]

SOUND must have the model's sample rate; `khala encode` also resamples.
"""

import sys

import numpy as np
import soundfile

from khala_mlx import Khala

khala = Khala.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else "demo")
config = khala.config.codec
waveform, rate = soundfile.read(sys.argv[1], dtype="float32", always_2d=True)
if rate != config.sample_rate:
    sys.exit(f"{sys.argv[1]} has {rate} Hz. Resample it to {config.sample_rate} Hz.")
if waveform.shape[1] == 1:
    waveform = np.repeat(waveform, config.channels, axis=1)
codes = khala.codec.encode(waveform)
decoded = khala.render(codes)[: len(waveform)]
noise = np.sum((waveform - decoded) ** 2) / max(float(np.sum(waveform**2)), 1e-20)
print(f"{codes.shape[1]} frames of {codes.shape[0]} codes, SNR {-10 * np.log10(noise):.1f} dB")
soundfile.write("reencoded.wav", np.clip(decoded, -1, 1), config.sample_rate)
