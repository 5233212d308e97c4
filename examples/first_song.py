"""The whole way in one run: checkpoints in upstream's format, a model folder, a song, a check.

Uses the small reference checkpoints that the tests use. Their weights are random, so what they
sing is noise; `python examples/first_song.py CHECKPOINTS` takes the same way with the released
weights (README.md tells where to get them).
"""

import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import soundfile

from khala_mlx import Khala
from khala_mlx.convert import convert
from khala_mlx.errors import KhalaError, KhalaWarning
from khala_mlx.song.song import check_free

REFERENCE = Path(__file__).parents[1] / "tests" / "fixtures" / "setA.tar.xz"
OUTPUT = Path("song.wav")


def main() -> None:
    check_free(OUTPUT)
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        if len(sys.argv) > 1:
            convert(sys.argv[1], model)
        else:
            with tarfile.open(REFERENCE) as archive:
                archive.extractall(work, filter="data")
            reference = Path(work) / "setA"
            with warnings.catch_warnings():
                # The reference set's tokenizer is a small one, not Llama's, on purpose.
                warnings.simplefilter("ignore", KhalaWarning)
                convert(
                    reference / "checkpoints",
                    model,
                    dtype="float32",
                    tokenizer=reference / "tokenizer_small" / "tokenizer.json",
                )
        khala = Khala.from_pretrained(model, keep_loaded=False)
        song = khala.generate(
            tags="slow rock",
            lyrics="If the sky forgets the sun\nI've got a spark",
            seconds=12,
            min_seconds=12,
            seed=7,
            on_progress=lambda stage, done, total: print(f"\r{stage} {done}/{total}   ", end=""),
        )
        print()
        song.save(OUTPUT)
        back, rate = soundfile.read(OUTPUT)
        print(f"{OUTPUT}: {len(back) / rate:.1f} s at {rate} Hz, codes {song.codes.shape}")
        assert len(back) == len(song.waveform)
        assert np.isfinite(back).all()


if __name__ == "__main__":
    try:
        main()
    except KhalaError as error:
        sys.exit(f"Error: {error}")
