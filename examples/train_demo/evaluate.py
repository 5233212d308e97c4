"""The figures of docs/demo-model.md: codec, songs, superres.

    python evaluate.py codec MODEL
    python evaluate.py songs MODEL JUDGE
    python evaluate.py curve MODEL JUDGE RUN...
    python evaluate.py superres MODEL
    python evaluate.py pictures MODEL OUT

Each prints one JSON object. All songs and prompts are of the test split, which no training saw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from corpus import SAMPLE_RATE, Song, song, whole_frames
from judge import judge_songs, load_judge, score

from khala_mlx import Khala
from khala_mlx.train import losses
from khala_mlx.train.codec import mel_correlation

DOUBLINGS = (1, 2, 4, 8, 16, 32, 64)
# dB of full scale; loud bins of the corpus lie at -20.
FLOORS = (-40, -60)
_SECONDS = 6.0
_WINDOW = 2048
# Prompts of four to eight syllables are sung in six to nine seconds.
_PROMPT_SECONDS = (6.0, 9.0)
_SYLLABLES = range(4, 9)
_SECONDS_MARGIN = 3.0


def held_out(count: int) -> list[Song]:
    """Songs of the test split."""
    length = whole_frames(_SECONDS)
    return [song(seed, "test", seconds=length) for seed in range(count)]


def prompts(count: int) -> list[Song]:
    """Songs of the test split with four to eight syllables, six and nine seconds in turn."""
    found: list[Song] = []
    seed = 50_000
    while len(found) < count:
        length = whole_frames(_PROMPT_SECONDS[len(found) % len(_PROMPT_SECONDS)])
        drawn = song(seed, "test", seconds=length)
        if len(drawn.syllables) in _SYLLABLES:
            found.append(drawn)
        seed += 1
    return found


@click.group()
def main() -> None:
    """Measure a demo model on songs and prompts it has never seen."""


@main.command()
@click.argument("model")
@click.option("--clips", default=50, show_default=True)
def codec(model: str, clips: int) -> None:
    """SNR, log-mel correlation and codebook use by number of layers."""
    khala = Khala.from_pretrained(model)
    table = {k: {"snr_db": 0.0, "mel_correlation": 0.0} for k in DOUBLINGS}
    all_codes = []
    for each in held_out(clips):
        codes = khala.codec.encode(each.waveform)
        all_codes.append(codes)
        for layers, row in table.items():
            ours = mx.array(khala.codec.decode(codes[:layers]))[None]
            target = mx.array(each.waveform)[None]
            row["snr_db"] += float(losses.snr_db(ours, target).mean()) / clips
            row["mel_correlation"] += mel_correlation(ours, target, SAMPLE_RATE) / clips
    codes = np.concatenate(all_codes, axis=1)
    size = khala.config.tokens.codebook_size
    used = [round(len(np.unique(layer)) / size, 3) for layer in codes]
    _print({"clips": clips, "layers": table, "codebook_use": used})


@main.command()
@click.argument("model")
@click.argument("judge", type=click.Path(path_type=Path))
@click.option("--count", default=100, show_default=True)
@click.option("--temperature", default=None, type=float)
@click.option("--top-k", default=None, type=int)
@click.option("--coarse", is_flag=True, help="Decode the two coarse layers; leave superres out.")
@click.option("--keep", type=click.Path(path_type=Path), help="Write the songs as wav there.")
def songs(
    model: str,
    judge: Path,
    count: int,
    temperature: float | None,
    top_k: int | None,
    coarse: bool,
    keep: Path | None,
) -> None:
    """Syllables and style that the judge hears in generated songs, and in the truth."""
    khala, jury, truth = Khala.from_pretrained(model), load_judge(judge), prompts(count)
    sampling = {"temperature": temperature, "top_k": top_k}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    began, waves = time.perf_counter(), []
    for seed, each in enumerate(truth):
        seconds = len(each.waveform) / SAMPLE_RATE + _SECONDS_MARGIN
        waves.append(_generate(khala, each, seed, seconds, sampling, coarse))
    taken = time.perf_counter() - began
    figures = {
        "seconds_per_song": round(taken / count, 2),
        "generated": score(judge_songs(jury, waves), truth),
        "truth": score(judge_songs(jury, [each.waveform for each in truth]), truth),
        "truth_through_codec": score(judge_songs(jury, _decoded(khala, truth, 64)), truth),
        "truth_through_2_layers": score(judge_songs(jury, _decoded(khala, truth, 2)), truth),
        "length": {
            "generated": round(float(np.mean([len(w) for w in waves])) / SAMPLE_RATE, 2),
            "truth": round(float(np.mean([len(t.waveform) for t in truth])) / SAMPLE_RATE, 2),
        },
    }
    if keep is not None:
        _write(keep, waves, truth)
    _print(figures)


@main.command()
@click.argument("model")
@click.argument("judge", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--count", default=30, show_default=True)
def curve(model: str, judge: Path, runs: tuple[Path, ...], count: int) -> None:
    """What the judge hears in songs of the weights kept along runs of the backbone.

    The two coarse layers are decoded; superres is left out.
    """
    khala, jury, truth = Khala.from_pretrained(model), load_judge(judge), prompts(count)
    for weights in (path for run in runs for path in sorted(run.glob("weights-*.safetensors"))):
        khala.backbone.load_weights(str(weights), strict=True)
        waves = []
        for seed, each in enumerate(truth):
            seconds = len(each.waveform) / SAMPLE_RATE + _SECONDS_MARGIN
            waves.append(_generate(khala, each, seed, seconds, {}, coarse=True))
        _print({"weights": str(weights), "generated": score(judge_songs(jury, waves), truth)})


@main.command()
@click.argument("model")
@click.option("--clips", default=20, show_default=True)
@click.option("--top-k", default=10, show_default=True)
@click.option("--expected", is_flag=True, help="Choose codes by expectation instead.")
def superres(model: str, clips: int, top_k: int, expected: bool) -> None:
    """Log-spectral distance to the truth by refined layers, coarse codes given."""
    khala = Khala.from_pretrained(model)
    names = [f"{kind}_above_{floor}_db" for kind in ("refined", "true") for floor in FLOORS]
    tables = {name: dict.fromkeys(DOUBLINGS[1:], 0.0) for name in names}
    for seed, each in enumerate(held_out(clips)):
        codes = khala.codec.encode(each.waveform)
        _, ids = khala.prompt_ids(tags=each.tags, lyrics=each.lyrics)
        ours = khala.refine(ids, codes[:2], top_k=top_k, seed=seed, expected=expected)
        for layers in DOUBLINGS[1:]:
            for kind, source in (("refined", ours), ("true", codes)):
                wave = khala.codec.decode(source[:layers])
                for floor in FLOORS:
                    distance = log_spectral_distance(wave, each.waveform, floor)
                    tables[f"{kind}_above_{floor}_db"][layers] += distance / clips
    _print({"clips": clips, "top_k": None if expected else top_k, **tables})


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def pictures(model: str, out: Path) -> None:
    """Spectrograms: a test song, the same through the codec, and one generated from its prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    khala, each = Khala.from_pretrained(model), prompts(1)[0]
    codes = khala.codec.encode(each.waveform)
    rows = [
        ("corpus song", each.waveform),
        ("through the codec, 64 layers", khala.codec.decode(codes)),
        ("through the codec, 2 layers", khala.codec.decode(codes[:2])),
        ("generated from the same prompt", _generate(khala, each, 0, 12.0, {}, coarse=False)),
    ]
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(8, 9), layout="constrained")
    for axis, (title, wave) in zip(axes, rows, strict=True):
        mel = np.array(losses.log_mel(mx.array(wave)[None].mean(-1), SAMPLE_RATE, 96, 2048, 512))[0]
        extent = (0, len(wave) / SAMPLE_RATE, 0, 96)
        axis.imshow(mel.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axis.set(title=title, ylabel="mel band")
    axes[-1].set(xlabel=f"seconds; lyrics: {each.lyrics.replace(chr(10), ' / ')} ({each.tags})")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=60)
    click.echo(str(out))


def log_spectral_distance(ours: np.ndarray, target: np.ndarray, floor: int) -> float:
    """Root mean square over frequency of the level difference in dB, mean over frames.

    Levels below `floor` dB of a full-scale sine count as that: what is silent in both agrees.
    """
    a, b = (
        np.array(losses.magnitudes(mx.array(wave)[None].mean(-1), _WINDOW))[0]
        for wave in (ours, target)
    )
    lowest = _WINDOW / 4 * 10 ** (floor / 20)
    decibels = 20 * np.log10(np.maximum(a, lowest) / np.maximum(b, lowest))
    return float(np.sqrt(np.mean(decibels**2, axis=1)).mean())


def _generate(
    khala: Khala, each: Song, seed: int, seconds: float, sampling: dict[str, float], coarse: bool
) -> np.ndarray:
    if coarse:
        ids, _ = khala.prompt_ids(tags=each.tags, lyrics=each.lyrics)
        rate = khala.config.codec.frame_rate
        # Early in its training the backbone may end a song at once.
        lengths = {"max_frames": int(seconds * rate), "min_frames": int(rate)}
        return khala.codec.decode(khala.compose(ids, seed=seed, **lengths, **sampling))
    made = khala.generate(
        tags=each.tags, lyrics=each.lyrics, seconds=seconds, seed=seed, **sampling
    )
    return made.waveform


def _decoded(khala: Khala, songs: Sequence[Song], layers: int) -> list[np.ndarray]:
    return [khala.codec.decode(khala.codec.encode(each.waveform)[:layers]) for each in songs]


def _write(folder: Path, waves: Sequence[np.ndarray], truth: Sequence[Song]) -> None:
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    for number, (wave, each) in enumerate(zip(waves, truth, strict=True)):
        name = f"{number:03d} {each.tags} - {each.lyrics.replace(chr(10), ' ')}.wav"
        soundfile.write(folder / name, wave, SAMPLE_RATE)


def _print(figures: dict[str, object]) -> None:
    click.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
