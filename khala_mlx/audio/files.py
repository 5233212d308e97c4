"""Sound and code files. Knows samples and paths, nothing of models."""

from __future__ import annotations

import math
import mimetypes
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from khala_mlx.audio import tags as tagging
from khala_mlx.errors import AudioError, KhalaWarning
from khala_mlx.storage.atomic import appears_whole, check_destination
from khala_mlx.text import clock_time, is_text

# What a song is scaled down to when it would clip: the usual ceiling before lossy encoders.
CEILING_DBFS = -1.0
# A sound whose peak stays below one step of 16 bits is silent.
SILENCE = 1 / 32768
# What libsndfile cannot read, but a converter on the PATH can.
CONVERTED = (".m4a",)

_SUBTYPES: Mapping[str, Mapping[str, str]] = {
    ".wav": {"16": "PCM_16", "24": "PCM_24", "float": "FLOAT"},
    ".flac": {"16": "PCM_16", "24": "PCM_24"},
    ".ogg": {"16": "VORBIS"},
    ".mp3": {"16": "MPEG_LAYER_III"},
}
SUFFIXES = tuple(_SUBTYPES)
# Mixing 5.1 and 7.1 down to left and right, without LFE: ITU-R BS.775-4, table 2.
_HALF = 0.5**0.5
_DOWNMIX = {
    6: [(1, 0), (0, 1), (_HALF, _HALF), (0, 0), (_HALF, 0), (0, _HALF)],
    8: [(1, 0), (0, 1), (_HALF, _HALF), (0, 0), (_HALF, 0), (0, _HALF), (_HALF, 0), (0, _HALF)],
}
_MOST_FOLDED = 8
# Never sound, whatever they begin with.
_TEXTS = (".txt", ".lrc", ".json", ".jsonl", ".csv", ".tsv", ".md")
# libsndfile's Vorbis encoder overflows its stack on huge single writes.
_BLOCK = 65536
# Samples by which a lossy file may differ in length; they are exact in practice.
_CODEC_DELAY = 4096
_quiet_lock = threading.RLock()
# What libsndfile says of a stream whose header does not state its length.
_UNKNOWN_LENGTH = 2**63 - 1


def is_sound(path: Path) -> bool:
    """Return whether a file is sound: libsndfile reads its format, or its name says so.

    A damaged file with the name of a sound counts, so that it is reported, not passed over.
    """
    import soundfile

    suffix = path.suffix.lower()
    kind, _ = mimetypes.guess_type(path.name)
    if suffix in CONVERTED or (kind or "").startswith("audio/"):
        return True
    # Headerless sound, and formats of numbers that libsndfile can read as sound.
    named = suffix[1:].upper() in soundfile.available_formats().keys() - {"RAW", "MAT4", "MAT5"}
    if named or suffix in _TEXTS:
        return named
    try:
        with quiet_decoder():
            soundfile.info(os.fsencode(path))
    except (soundfile.SoundFileError, OSError, RuntimeError):
        return False
    return True


def check_output(path: Path, bit_depth: str = "16") -> None:
    """Refuse a file name or depth that `write_audio` could not serve, before any work."""
    if path.suffix.lower() not in _SUBTYPES:
        raise AudioError(
            f"{path} must end in one of {', '.join(_SUBTYPES)}, the formats that can be written."
        )
    if not is_text(path.name):
        raise AudioError(f"{path.name!a} is not valid text, as the name of a song must be.")
    depths = _SUBTYPES[path.suffix.lower()]
    if bit_depth not in depths:
        raise AudioError(
            f"{path.suffix} files cannot hold bit depth {bit_depth!r}, only {', '.join(depths)}."
        )


def check_waveform(waveform: np.ndarray) -> None:
    """Refuse anything but finite float samples [L, C]."""
    if not isinstance(waveform, np.ndarray):
        raise AudioError(f"A waveform must be a NumPy array, got {type(waveform).__name__}.")
    if waveform.ndim != 2 or 0 in waveform.shape or waveform.dtype.kind != "f":
        raise AudioError(
            f"A waveform must be floats of shape [samples, channels], got {waveform.dtype} of "
            f"shape {list(waveform.shape)}."
        )
    if not np.isfinite(waveform).all():
        raise AudioError("The waveform contains NaN or infinite samples.")


def fit_scale(waveform: np.ndarray, *, normalize: bool) -> tuple[np.ndarray, dict[str, float]]:
    """Scale a waveform [L, C] that exceeds full scale down to -1 dBFS, and say so.

    Returns:
        The waveform, and {peak_dbfs, samples_over, gain_db} of what came in and was done.
    """
    peak = float(np.abs(waveform).max())
    over = int(np.count_nonzero(np.abs(waveform) > 1.0))
    peak_dbfs = 20 * math.log10(peak) if peak > 0 else -math.inf
    gain_db = CEILING_DBFS - peak_dbfs if over and normalize else 0.0
    if over:
        done = (
            f"the song is turned down by {-gain_db:.1f} dB"
            if normalize
            else "they clip, as normalising is off"
        )
        warnings.warn(
            f"{over} samples exceed full scale (peak {peak_dbfs:+.1f} dBFS): {done}.",
            KhalaWarning,
            stacklevel=3,
        )
    report = {"peak_dbfs": round(max(peak_dbfs, -200.0), 2), "samples_over": over}
    scaled = waveform * np.float32(10 ** (gain_db / 20)) if gain_db else waveform
    return scaled, {**report, "gain_db": round(gain_db, 2)}


def write_audio(
    path: Path,
    waveform: np.ndarray,
    sample_rate: int,
    *,
    bit_depth: str = "16",
    tags: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write float samples [L, C] as wav, flac, ogg or mp3, by suffix. Clips beyond full scale.

    `tags` are texts by name, of tags.NAMES; a KhalaWarning names those the file cannot hold.
    """
    check_output(path, bit_depth)
    check_waveform(waveform)
    with appears_whole(path, overwrite=overwrite) as temporary:
        encode_audio(temporary, path, waveform, sample_rate, bit_depth=bit_depth, tags=tags)


def encode_audio(
    temporary: Path,
    path: Path,
    waveform: np.ndarray,
    sample_rate: int,
    *,
    bit_depth: str = "16",
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write checked samples to a `temporary` file that is to become `path`; see `write_audio`."""
    import soundfile

    subtype = _SUBTYPES[path.suffix.lower()][bit_depth]
    try:
        with soundfile.SoundFile(
            os.fsencode(temporary), "w", sample_rate, waveform.shape[1], subtype=subtype
        ) as file:
            for name, text in tagging.plain(path, tags or {}).items():
                setattr(file, name, text)
            for start in range(0, len(waveform), _BLOCK):
                file.write(waveform[start : start + _BLOCK])
        # Encoders of lossy formats say nothing when the disk is full.
        written = soundfile.info(os.fsencode(temporary)).frames
    except soundfile.SoundFileError as error:
        raise AudioError(f"{path} cannot be written: {_write_reason(error)}.") from error
    if abs(written - len(waveform)) > _CODEC_DELAY:
        raise AudioError(f"{path} cannot be written whole: the disk seems full.")
    if missing := tagging.write(temporary, tags or {}):
        _tell_missing_tags(path, missing)


def _tell_missing_tags(path: Path, missing: list[str]) -> None:
    fix = (
        "this format cannot hold them"
        if tagging.with_mutagen()
        else "`pip install 'khala-mlx[tags]'` lets every format hold them"
    )
    warnings.warn(
        f"{path} does not hold these tags: {', '.join(missing)}; {fix}.", KhalaWarning, stacklevel=3
    )


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """A sound file as it is: float32 samples [L, C] and their rate.

    Raises:
        AudioError: if it cannot be read, holds no samples or some that are NaN or infinite, or
            would not fit half of the memory.
    """
    with _opened(path) as file:
        _check_format(path, file, file.samplerate, file.channels)
        waveform = file.read(dtype="float32", always_2d=True)
        rate = int(file.samplerate)
    if len(waveform) == 0:
        raise AudioError(f"{path} holds no samples.")
    _check_finite(path, waveform, rate)
    return waveform, rate


def read_audio(
    path: Path, sample_rate: int, channels: int, *, start: int = 0, samples: int = -1
) -> np.ndarray:
    """Read a sound file as float32 samples [L, channels]; mono is copied to every channel.

    A file at another rate is read whole and resampled, band-limited. From sample `start` of the
    result on, at most `samples` of them; -1 is all.

    Raises:
        AudioError: if it cannot be read, has other channels, is empty, or would not fit half of
            the memory.
    """
    with _opened(path) as file:
        _check_format(path, file, sample_rate, channels)
        if file.samplerate == sample_rate:
            file.seek(start)
            waveform = file.read(samples, dtype="float32", always_2d=True)
        else:
            whole = file.read(dtype="float32", always_2d=True)
            stop = None if samples < 0 else start + samples
            waveform = _resampled(whole, file.samplerate, sample_rate)[start:stop]
    if len(waveform) == 0:
        raise AudioError(f"{path} holds no samples.")
    _check_finite(path, waveform, sample_rate, start)
    if waveform.shape[1] > channels:
        how = "by ITU-R BS.775" if waveform.shape[1] in _DOWNMIX else "to their mean"
        warnings.warn(
            f"{path} has {waveform.shape[1]} channels; they are mixed down {how}.",
            KhalaWarning,
            stacklevel=2,
        )
        waveform = downmix(waveform, channels)
    return np.repeat(waveform, channels // waveform.shape[1], axis=1)


def downmix(waveform: np.ndarray, channels: int) -> np.ndarray:
    """Mix samples [L, C] of 3 to 8 channels down to [L, channels], channels 1 or 2.

    5.1 and 7.1 in the order of wav files (front left and right, centre, LFE, then left and right
    of the others) are mixed to stereo by ITU-R BS.775; all else to the mean of its channels.
    """
    matrix = _DOWNMIX.get(waveform.shape[1])
    if matrix is None or channels != 2:
        mean = waveform.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return np.repeat(mean, channels, axis=1)
    return (waveform @ np.array(matrix, dtype=np.float32)).astype(np.float32)


def _check_finite(path: Path, waveform: np.ndarray, rate: float, start: int = 0) -> None:
    """Raise AudioError naming the first time at which samples are NaN or infinite."""
    wrong = ~np.isfinite(waveform).all(axis=1)
    if wrong.any():
        seconds = (start + int(np.argmax(wrong))) / rate
        raise AudioError(
            f"{path} has NaN or infinite samples, the first at {clock_time(seconds)} "
            f"({seconds:.3f} s). Export it again from its source."
        )


def sound_length(path: Path, sample_rate: int) -> int:
    """How many samples `read_audio` gives at most, by the file's header alone.

    Raises:
        AudioError: if the file cannot be read, or does not state its length.
    """
    with _opened(path) as file:
        _check_length_known(path, file.frames)
        return round(file.frames * sample_rate / file.samplerate)


@contextmanager
def readable(path: Path, *, seconds: float | None = None) -> Iterator[Path]:
    """`path` itself or, where libsndfile cannot read the format, a temporary wav made of it.

    Where the converter allows it, the wav ends after `seconds`.

    Raises:
        AudioError: if there is no converter for the format (CONVERTED), or it fails.
    """
    if path.suffix.lower() not in CONVERTED:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "converted.wav"
        _convert(path, target, seconds)
        yield target


def _convert(path: Path, target: Path, seconds: float | None) -> None:
    # ffmpeg would take a name with a colon for an address.
    source = path.absolute()
    if ffmpeg := shutil.which("ffmpeg"):
        limit = [] if seconds is None else ["-t", f"{seconds:.3f}"]
        command = [ffmpeg, "-nostdin", "-v", "error", *limit, "-i", f"file:{source}"]
        command += ["-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto", f"file:{target}"]
    elif afconvert := shutil.which("afconvert"):
        command = [afconvert, "-f", "WAVE", "-d", "LEF32", str(source), str(target)]
    else:
        raise AudioError(
            f"{path} can only be read where ffmpeg is installed (`brew install ffmpeg`): install "
            "it, or convert the file to wav."
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode or not target.exists():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise AudioError(f"{path} cannot be read as sound: {said[-1].rstrip('.')}.")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open soundfile.SoundFile of a path; its errors become AudioErrors."""
    import soundfile

    try:
        path.stat()
        # As bytes, since names on Linux need not be valid text.
        with (
            readable(path) as source,
            quiet_decoder() if path.suffix.lower() == ".mp3" else nullcontext(),
            soundfile.SoundFile(os.fsencode(source)) as file,
        ):
            yield file
    except soundfile.SoundFileError as error:
        # Of damaged mp3 files libsndfile says nothing, or that they do not exist.
        reason = _reason(error)
        if not reason or reason.startswith("File does not exist"):
            reason = "it is damaged or none"
        raise AudioError(f"{path} cannot be read as sound: {reason}.") from error
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def quiet_decoder() -> Iterator[None]:
    """Keep libmpg123 from writing to standard error about damaged mp3 files: we report them."""
    with _quiet_lock:
        try:
            before = os.dup(2)
        except OSError:
            # There is no standard error.
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            os.close(nowhere)


def _resampled(waveform: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    import soxr

    # Its best quality: far below what 24 bits hold, and still hundreds of times real time.
    resampled: np.ndarray = soxr.resample(waveform, rate, wanted, quality="VHQ")
    return resampled


def _check_format(path: Path, file: Any, sample_rate: int, channels: int) -> None:
    _check_length_known(path, file.frames)
    if file.channels not in (1, channels) and (file.channels > _MOST_FOLDED or channels > 2):
        raise AudioError(
            f"{path} has {file.channels} channels, and the model takes {channels}. Mix it down to "
            "stereo first."
        )
    longest = max(file.frames, round(file.frames * sample_rate / file.samplerate))
    if longest * max(channels, file.channels) * 4 > _memory() // 2:
        minutes = file.frames / file.samplerate / 60
        raise AudioError(f"{path} lasts {minutes:.0f} minutes, too long for this memory.")


def _check_length_known(path: Path, frames: int) -> None:
    if frames == _UNKNOWN_LENGTH:
        raise AudioError(
            f"{path} does not state its length. Write it again, for example with `ffmpeg -i "
            f"{path.name} again.flac`."
        )


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _write_reason(error: Exception) -> str:
    # libsndfile's word for a failed write.
    return _reason(error).replace("System error", "the disk seems full")


def _reason(error: Exception) -> str:
    # soundfile says "Error opening 'name': reason."; the name is said already.
    return str(error).rsplit(": ", 1)[-1].rstrip(".")


def save_codes(
    path: Path, codes: np.ndarray, *, dtype: npt.DTypeLike = np.int32, overwrite: bool = False
) -> None:
    """Write codes [K, T] as the one integer array `codes` of an .npz file."""
    check_codes_name(path, overwrite=overwrite)
    with appears_whole(path, overwrite=overwrite) as temporary:
        np.savez_compressed(temporary, codes=codes.astype(dtype))


def check_codes_name(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file name `save_codes` could not serve, before any work."""
    if path.suffix != ".npz":
        raise AudioError(f"{path} must end in .npz, the format of codes.")
    if not overwrite:
        check_destination(path)


def load_codes(path: Path) -> np.ndarray:
    """Read the integer array `codes` [K, T] of an .npz file; nothing is ever unpickled."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("codes.npy") as member:
            codes = np.lib.format.read_array(member, allow_pickle=False)
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise AudioError(f"{path} is not a .npz file with an integer array `codes`.") from error
    if codes.dtype.kind not in "iu" or codes.ndim != 2:
        raise AudioError(f"{path} is not a .npz file with an integer array `codes` [K, T].")
    return np.asarray(codes)
