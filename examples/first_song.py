"""Convert checkpoints in upstream's format to a model folder, make a song, and check the file.

By default this uses the small reference checkpoints of the tests. Their weights are random, so the
song is noise. `python examples/first_song.py CHECKPOINTS` does the same with the released weights
(docs/install.md says where to get them).
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from khala_mlx import Khala, KhalaError

REFERENCE = Path(__file__).parents[1] / "tests" / "fixtures" / "setA.tar.xz"
OUTPUT = Path("song.wav")


def convert(work: Path) -> Path:
    """Return a model folder in `work`."""
    options: list[str] = []
    if len(sys.argv) > 1:
        checkpoints = Path(sys.argv[1])
    else:
        with tarfile.open(REFERENCE) as archive:
            archive.extractall(work, filter="data")
        checkpoints = work / "setA" / "checkpoints"
        tokenizer = work / "setA" / "tokenizer_small" / "tokenizer.json"
        options = ["--dtype", "float32", "--tokenizer", str(tokenizer)]
    model = work / "model"
    subprocess.run(["khala", "convert", str(checkpoints), str(model), *options], check=True)
    return model


def main() -> None:
    if OUTPUT.exists():
        raise KhalaError(f"{OUTPUT} exists already. Remove it or work in another folder.")
    with tempfile.TemporaryDirectory() as work:
        khala = Khala.from_pretrained(convert(Path(work)), keep_loaded=False)
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
