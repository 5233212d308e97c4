"""The judge: hears which syllables a song sings, and its style, tempo and mood.

A small convolutional network on log-mel spectra, trained on the corpus alone with connectionist
temporal classification (CTC: Graves et al., 2006), so that it needs no timing. It never hears the
backbone or superres; with `--coded` it also hears true songs through the codec, as a listener does
who knows how the codec sounds.

    python judge.py train judge --coded coded --codec runs/codec
    python judge.py test judge
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from corpus import MOODS, SAMPLE_RATE, STYLES, SYLLABLES, TEMPOS, Song, song, whole_frames
from mlx.utils import tree_flatten

from khala_mlx.train.codec import load_codec
from khala_mlx.train.data.dataset import read_coded
from khala_mlx.train.losses import log_mel

TRAITS = {"style": STYLES, "tempo": TEMPOS, "mood": MOODS}
SECONDS = whole_frames(6.0)
_BANDS, _WINDOW, _HOP = 64, 2048, 512
_MOST_SYLLABLES = 12
_NONE = -1e9
# How the corpus is heard through a codec: all layers, or fewer, which is rougher.
_LAYERS = (64, 64, 16, 4, 2)


class Judge(nn.Module):
    """Log-mel [B, N, 64] to log-probabilities [B, N / 4, 8] of blank and syllables, and traits."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        sizes = [(_BANDS, width, 2), (width, width, 2), (width, width, 1), (width, width, 1)]
        self.convs = [nn.Conv1d(i, o, 7, stride=s, padding=3) for i, o, s in sizes]
        self.norms = [nn.LayerNorm(o) for _, o, _ in sizes]
        self.syllables = nn.Linear(width, 1 + len(SYLLABLES))
        self.traits = [nn.Linear(2 * width, len(names)) for names in TRAITS.values()]

    def __call__(self, mel: mx.array) -> tuple[mx.array, list[mx.array]]:
        x = mel
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = nn.gelu(norm(conv(x)))
            x = x + y if x.shape == y.shape else y
        pooled = mx.concatenate([x.mean(1), x.max(1)], axis=-1)
        return nn.log_softmax(self.syllables(x)), [head(pooled) for head in self.traits]


def ctc_loss(log_probs: mx.array, labels: np.ndarray) -> mx.array:
    """Mean negative log-likelihood of labels [B, S] (1.., 0 behind the end) under [B, N, C]."""
    batch, steps, classes = log_probs.shape
    states = 2 * labels.shape[1] + 1
    extended = np.zeros((batch, states), dtype=np.int64)
    extended[:, 1::2] = labels
    # A syllable may follow the last one without a blank only if it is another one.
    skip = np.zeros((batch, states), dtype=bool)
    skip[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    lengths = (labels > 0).sum(axis=1)
    chosen = mx.array(np.eye(classes, dtype=np.float32)[extended].swapaxes(1, 2))
    emitted = log_probs @ chosen
    first = np.full((batch, states), _NONE, dtype=np.float32)
    first[:, :2] = 0
    alpha = mx.array(first) + emitted[:, 0]
    barred = mx.where(mx.array(skip), 0.0, _NONE)
    for step in range(1, steps):
        one = mx.pad(alpha[:, :-1], [(0, 0), (1, 0)], constant_values=_NONE)
        two = mx.pad(alpha[:, :-2], [(0, 0), (2, 0)], constant_values=_NONE) + barred
        alpha = mx.logaddexp(mx.logaddexp(alpha, one), two) + emitted[:, step]
    ends = mx.array(np.stack([2 * lengths, np.maximum(2 * lengths - 1, 0)], axis=1))
    # Without labels both ends are one, which must not count twice.
    once = mx.array(np.stack([np.zeros(batch), np.where(lengths, 0, _NONE)], axis=1))
    last = mx.take_along_axis(alpha, ends, axis=1) + once.astype(mx.float32)
    return -mx.logsumexp(last, axis=1).mean()


def read(log_probs: np.ndarray) -> list[str]:
    """Greedy CTC reading of [N, C]: repeats merged, blanks dropped."""
    best = log_probs.argmax(axis=-1)
    kept = [c for before, c in zip([0, *best[:-1]], best, strict=True) if c and c != before]
    return [SYLLABLES[c - 1] for c in kept]


def edits(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(wanted) + 1))
    for i, ours in enumerate(said, start=1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(wanted, start=1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (ours != theirs)),
            )
    return row[-1]


def syllable_error(said: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Edits over all songs, as a share of the syllables wanted."""
    pairs = zip(said, wanted, strict=True)
    return sum(edits(a, b) for a, b in pairs) / sum(len(words) for words in wanted)


def shuffled_error(said: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """`syllable_error` against the lyrics of other songs: the mean over ten permutations."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(wanted)) for _ in range(10)]
    return float(np.mean([syllable_error(said, [wanted[i] for i in order]) for order in orders]))


@dataclass(frozen=True)
class Verdict:
    """What the judge hears in one song."""

    syllables: list[str]
    style: str
    tempo: str
    mood: str


def judge_songs(judge: Judge, waves: Sequence[np.ndarray]) -> list[Verdict]:
    """Verdicts on waves [L, 2], each of its own length."""
    verdicts = []
    for wave in waves:
        log_probs, traits = judge(mel_of(wave[None]))
        heard = [
            names[int(scores[0].argmax())]
            for names, scores in zip(TRAITS.values(), traits, strict=True)
        ]
        verdicts.append(Verdict(read(np.array(log_probs[0])), *heard))
    return verdicts


def mel_of(waves: np.ndarray) -> mx.array:
    """Log-mel spectra [B, N, 64] of waves [B, L, 2], four to a frame of the codec."""
    return log_mel(mx.array(waves).mean(-1), SAMPLE_RATE, _BANDS, _WINDOW, _HOP)


def load_judge(folder: Path) -> Judge:
    """The judge that `train` wrote."""
    judge = Judge()
    judge.load_weights(str(folder / "judge.safetensors"), strict=True)
    judge.eval()
    return judge


@dataclass(frozen=True)
class _Heard:
    """Songs as the judge learns them."""

    mel: np.ndarray  # [n, N, 64]
    labels: np.ndarray  # [n, S]
    traits: np.ndarray  # [n, 3]


def _hear(songs: Iterable[tuple[np.ndarray, str, str]]) -> _Heard:
    """Songs as waves [L, 2] of one length, tags and lyrics."""
    mels, labels, traits = [], [], []
    for wave, tags, lyrics in songs:
        mels.append(np.array(mel_of(wave[None]))[0])
        row = [SYLLABLES.index(word) + 1 for word in lyrics.split()]
        labels.append(row + [0] * (_MOST_SYLLABLES - len(row)))
        pairs = zip(TRAITS.values(), tags.split(", "), strict=True)
        traits.append([names.index(tag) for names, tag in pairs])
    return _Heard(np.stack(mels), np.array(labels), np.array(traits))


def _synthesised(count: int) -> Iterator[tuple[np.ndarray, str, str]]:
    for seed in range(count):
        made = song(seed, "train", seconds=SECONDS)
        yield made.waveform, made.tags, made.lyrics


def _decoded(folder: Path, run: Path, count: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Prepared songs of the training split through the codec, by more or fewer layers in turn."""
    codec, frames = load_codec(run), round(SECONDS * SAMPLE_RATE / 2048)
    songs = [each for each in read_coded(folder, "train") if each.codes.shape[1] == frames]
    for number, each in enumerate(songs[:count]):
        layers = _LAYERS[number % len(_LAYERS)]
        yield codec.decode(each.codes[:layers]), each.tags, each.lyrics


@click.group()
def main() -> None:
    """Train and test the judge of the demo's songs."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--songs", default=1500, show_default=True)
@click.option("--coded", type=click.Path(path_type=Path), help="Prepared songs, heard too.")
@click.option("--codec", type=click.Path(path_type=Path), help="The codec run they come from.")
@click.option("--through", default=400, show_default=True, help="How many of them.")
@click.option("--steps", default=1200, show_default=True)
def train(
    out: Path, songs: int, coded: Path | None, codec: Path | None, through: int, steps: int
) -> None:
    """Train on songs of the train split, write OUT/judge.safetensors."""
    heard = [_hear(_synthesised(songs))]
    if coded and codec:
        heard.append(_hear(_decoded(coded, codec, through)))
    mel, labels, traits = (
        np.concatenate([getattr(part, name) for part in heard])
        for name in ("mel", "labels", "traits")
    )
    mx.random.seed(0)
    judge = Judge()
    optimizer = optim.AdamW(optim.cosine_decay(2e-3, steps), weight_decay=0.01)

    def loss(mel: mx.array, labels: np.ndarray, traits: mx.array) -> mx.array:
        log_probs, scores = judge(mel)
        named = [nn.losses.cross_entropy(s, traits[:, i]).mean() for i, s in enumerate(scores)]
        return ctc_loss(log_probs, labels) + sum(named)

    value_and_grad = nn.value_and_grad(judge, loss)
    began = time.perf_counter()
    for step in range(steps):
        rng = np.random.default_rng([1, step])
        rows = rng.choice(len(mel), 16, replace=False)
        # Louder or softer, and a little noise: a judge should not hang on either.
        noisy = mel[rows] + rng.normal(0, 0.3, (16, 1, 1)) + rng.normal(0, 0.15, mel[rows].shape)
        value, gradients = value_and_grad(
            mx.array(noisy.astype(np.float32)), labels[rows], mx.array(traits[rows])
        )
        gradients, _ = optim.clip_grad_norm(gradients, 5.0)
        optimizer.update(judge, gradients)
        mx.eval(judge.parameters(), optimizer.state, value)
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            click.echo(f"step {step + 1}: loss {value.item():.3f}, {seconds:.0f} s", err=True)
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "judge.safetensors"), dict(tree_flatten(judge.parameters())))
    click.echo(str(out / "judge.safetensors"))


@main.command()
@click.argument("judge", type=click.Path(path_type=Path))
@click.option("--songs", default=400, show_default=True)
@click.option("--seconds", default=SECONDS, show_default=True)
def test(judge: Path, songs: int, seconds: float) -> None:
    """Judge songs of the test split; prints one JSON object."""
    truth = [song(seed, "test", seconds=seconds) for seed in range(songs)]
    verdicts = judge_songs(load_judge(judge), [each.waveform for each in truth])
    click.echo(json.dumps(score(verdicts, truth), indent=2))


def score(verdicts: Sequence[Verdict], truth: Sequence[Song]) -> dict[str, float]:
    """Syllable error, against the own and against others' lyrics, and share of traits heard."""
    said = [verdict.syllables for verdict in verdicts]
    wanted = [[s.text for s in each.syllables] for each in truth]
    figures = {
        "songs": len(truth),
        "syllable_error": syllable_error(said, wanted),
        "shuffled_error": shuffled_error(said, wanted),
    }
    for trait in TRAITS:
        pairs = zip(verdicts, truth, strict=True)
        figures[trait] = float(np.mean([getattr(v, trait) == getattr(t, trait) for v, t in pairs]))
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
