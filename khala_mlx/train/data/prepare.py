"""A folder of songs as training data: codes beside the words that go with them.

First all files are looked at (whether they can be used, whether two are the same), then the sounds
that have no codes yet are encoded, so that the time left is known and a mistake shows early.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from khala_mlx.audio.files import load_codes, save_codes
from khala_mlx.config import KhalaConfig, TokenLayout
from khala_mlx.errors import AudioError, KhalaError, KhalaWarning, PromptError
from khala_mlx.model.codec import Codec
from khala_mlx.model.weights import find_model, load_part
from khala_mlx.prompt.prompt import Prompt, build_ids
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.storage.atomic import appears_whole
from khala_mlx.train.codec import load_codec
from khala_mlx.train.data.audio_index import Heard, Hearing
from khala_mlx.train.data.dataset import SPLITS
from khala_mlx.train.data.sequences import prompt_of
from khala_mlx.train.data.song_folder import (
    TABLE,
    Found,
    Unusable,
    Words,
    find_songs,
    has_splits,
    read_tables,
    words_of,
)
from khala_mlx.train.data.splits import draw_splits

Progress = Callable[[str, int, int], None]
STAGES = ("the backbone", "superres")
# Share of the songs that is held out by default, and how few songs are not split then.
DEFAULT_SHARE, FEWEST_TO_SPLIT = 0.1, 5


@dataclass(frozen=True)
class Tools:
    """What songs are prepared with.

    `config` is the model's; a codec run has none yet, and `max_prompt` says how many tokens the
    prompts of both language models may take, if that is known.
    """

    codec: Codec
    tokenizer: Tokenizer
    config: KhalaConfig | None
    max_prompt: int | None = None

    @property
    def layout(self) -> TokenLayout:
        """The model's token layout, else the usual one."""
        return TokenLayout() if self.config is None else self.config.tokens

    @property
    def limits(self) -> dict[str, int]:
        """The most tokens that a prompt may take, by the model that reads it."""
        if self.config is None:
            return {} if self.max_prompt is None else dict.fromkeys(STAGES, self.max_prompt)
        sizes = (self.config.backbone, self.config.superres)
        return {stage: each.max_prompt for stage, each in zip(STAGES, sizes, strict=True)}

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides on codes: sizes, encoder and codebooks."""
        sizes = self.codec.config.to_dict()
        told = {name: value for name, value in sizes.items() if not name.startswith("decoder")}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name, array in sorted(tree_flatten(self.codec.parameters())):
            if not name.startswith("decoder"):
                digest.update(name.encode())
                digest.update(np.array(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Chosen:
    """A song that can be used; `codes` names its file in the prepared folder."""

    found: Found
    heard: Heard
    words: Words
    minutes: int
    codes: str


def tools_of(
    folder: Path,
    model: str | None,
    run: Path | None,
    tokenizer: Path | None,
    max_prompt: int | None = None,
) -> Tools:
    """The codec of a model, or of a codec run; its tokenizer is copied into `folder`.

    Raises:
        KhalaError: if one of them cannot be read, or another tokenizer is there already.
    """
    check_folder(folder)
    config = None
    if model is not None:
        source = find_model(model)
        config = KhalaConfig.load(source / "config.json")
        codec = load_part(Codec(config.codec), source, "codec", config, mx.float32)
        tokenizer = source / "tokenizer.json"
    else:
        assert run is not None
        assert tokenizer is not None
        codec = load_codec(run)
    reader = Tokenizer.from_file(tokenizer)
    if config is not None:
        reader.check(config.tokens)
    target = folder / "tokenizer.json"
    if not target.exists():
        with appears_whole(target) as temporary:
            temporary.write_bytes(tokenizer.read_bytes())
    elif target.read_bytes() != tokenizer.read_bytes():
        raise KhalaError(f"{folder} was prepared with another tokenizer; choose a new folder.")
    return Tools(codec, reader, config, max_prompt)


def check_folder(folder: Path) -> None:
    """Refuse to overwrite a metadata.jsonl that lists sound files instead of codes.

    Raises:
        KhalaError: if `folder` holds one, as a folder of songs does.
    """
    ours = (folder / "codes").is_dir() or (folder / "report.json").exists()
    if (folder / TABLE).exists() and not ours:
        raise KhalaError(
            f"{folder} holds a {TABLE} that was not prepared here and would be written over; "
            "choose another folder."
        )


def prepare(
    songs: Path,
    folder: Path,
    tools: Tools,
    *,
    valid_share: float | None = None,
    seed: int = 0,
    max_minutes: float = 10.0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode the sound files below `songs` into `folder`/codes and list them in metadata.jsonl.

    Codes are named by the sound and the codec: what was encoded before, under whatever name or in
    a run that was interrupted, is not encoded again.

    Args:
        valid_share: share of the songs to hold out, unless `songs` has a folder per split. By
            default a tenth, and none of fewer than 5 songs.
        seed: of the draw of these.
        max_minutes: longer files are left out.
        on_progress: called as (stage, done, total), with files in "read", seconds in "encode".

    Returns:
        The report, as it is in `folder`/report.json; see docs/fine-tuning.md.

    Raises:
        KhalaError: if there is no sound file, none can be used, `folder` holds a table of another
            kind, or the disk is full. A song that
            cannot be used is not an error: it is in the report.
    """
    check_folder(folder)
    if not (0 < (valid_share or DEFAULT_SHARE) < 1 and max_minutes > 0):
        raise KhalaError("valid_share must be between 0 and 1, and max_minutes above 0.")
    report = on_progress or (lambda stage, done, total: None)
    codec = tools.codec.config
    hearing = Hearing(
        folder / "heard.json", codec.sample_rate, codec.channels, max_seconds=max_minutes * 60
    )
    chosen, skipped, remarks = _choose(songs, folder, tools, hearing, report)
    hearing.remember()
    encoded, failed = _encode(chosen, folder, tools, hearing, report)
    skipped += failed
    lost = {entry["file"] for entry in failed}
    chosen = [song for song in chosen if song.found.name not in lost]
    how: dict[str, Any] = {"by": "folder"}
    if not has_splits(songs):
        how = {"by": "hash", "valid_share": valid_share, "seed": seed}
    splits = _splits(chosen, how, _splits_before(folder, how))
    entries = [_entry(song, split, codec.hop) for song, split in zip(chosen, splits, strict=True)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    told = {
        "folder": str(folder),
        **_totals(entries, codec.frame_rate),
        **{
            split: _totals([each for each in entries if each["split"] == split], codec.frame_rate)
            for split in SPLITS
        },
        "encoded": encoded,
        "skipped": skipped,
        "remarks": remarks,
        "split": how,
        "max_minutes": max_minutes,
        "codec": tools.identity,
    }
    _write(folder / TABLE, lines)
    _write(folder / "report.json", json.dumps(told, ensure_ascii=False, indent=2) + "\n")
    if not entries:
        raise KhalaError(
            f"None of the sound files in {songs} can be used, {folder / 'report.json'} says why; "
            f"the first: {skipped[0]['file']}: {skipped[0]['detail']}"
        )
    if not told["train"]["songs"]:
        warnings.warn("No training songs found. Add at least one.", KhalaWarning, stacklevel=2)
    elif not told["valid"]["songs"]:
        text = (
            "No songs are held out, so training cannot tell learning from memorising. Add songs, "
            "or set --valid-share."
        )
        warnings.warn(text, KhalaWarning, stacklevel=2)
    return told


def _choose(
    songs: Path, folder: Path, tools: Tools, hearing: Hearing, report: Progress
) -> tuple[list[_Chosen], list[dict[str, str]], list[dict[str, str]]]:
    """The songs that can be used, each sound once; what is left out, and what else is to say."""
    found = find_songs(songs, folder)
    told, problems = read_tables(songs, found)
    skipped = [_skipped(where, error) for where, error in problems]
    remarks: list[dict[str, str]] = []
    chosen: dict[str, _Chosen] = {}
    for number, each in enumerate(found, 1):
        try:
            words = told.get(each.path, Words())
            if isinstance(words, Unusable):
                raise words
            song, said = _look(each, words, tools, hearing)
            if first := chosen.get(song.heard.sound):
                raise Unusable("duplicate", f"It holds the same sound as {first.found.name}.")
            chosen[song.heard.sound] = song
            remarks += [{"file": each.name, "detail": sentence} for sentence in said]
        except Unusable as error:
            skipped.append(_skipped(each.name, error, each.split))
        report("read", number, len(found))
    return list(chosen.values()), skipped, remarks


def _look(found: Found, told: Words, tools: Tools, hearing: Hearing) -> tuple[_Chosen, list[str]]:
    """One song and remarks on it; Unusable if there is something against it."""
    if found.split is None:
        raise Unusable("outside", f"It lies outside of the folders {' and '.join(SPLITS)}.")
    heard = hearing.listen(found.path)
    words, remarks = words_of(found.path, told)
    seconds = heard.samples / tools.codec.config.sample_rate
    minutes = min(words.minutes or minutes_of(seconds), tools.layout.max_minutes)
    _check_prompt(words, minutes, tools)
    codes = f"codes/{heard.sound[:24]}-{tools.identity[:8]}.npz"
    return _Chosen(found, heard, words, minutes, codes), remarks


def minutes_of(seconds: float) -> int:
    """What a prompt says of a song this long: the nearest whole minutes, at least one."""
    return max(1, int(seconds / 60 + 0.5))


def _check_prompt(words: Words, minutes: int, tools: Tools) -> None:
    """Refuse what generation would refuse."""
    try:
        prompt = prompt_of(words.tags, words.lyrics, words.instrumental, minutes)
        _check_limits(prompt, tools)
    except PromptError as error:
        raise Unusable("prompt", str(error)) from error


def _check_limits(prompt: Prompt, tools: Tools) -> None:
    if not tools.limits:
        return
    ids = build_ids(prompt, tools.layout, tools.tokenizer)
    lengths = dict(zip(STAGES, map(len, ids), strict=True))
    for stage, limit in tools.limits.items():
        taken = lengths[stage]
        if taken > limit:
            raise PromptError(
                f"Its prompt takes {taken} tokens where {stage} allows {limit}: shorten the "
                "lyrics or the caption."
            )


def _encode(
    chosen: Sequence[_Chosen], folder: Path, tools: Tools, hearing: Hearing, report: Progress
) -> tuple[int, list[dict[str, str]]]:
    """Write the codes that are missing; returns how many, and the songs that failed meanwhile."""
    codec, rate = tools.codec, tools.codec.config.sample_rate
    missing = [song for song in chosen if not _is_there(folder / song.codes)]
    total = -(-sum(song.heard.samples for song in missing) // rate)
    dtype = np.int16 if codec.config.codebook_size <= 2**15 else np.int32
    done, failed = 0, []
    for song in missing:
        before = done
        done += song.heard.samples

        def shown(frames: int, _: int, before: int = before, after: int = done) -> None:
            samples = min(before + frames * codec.config.hop, after)
            report("encode", -(-samples // rate), total)

        try:
            wave = hearing.wave(song.found.path, song.heard)
        except Unusable as error:
            failed.append(_skipped(song.found.name, error, song.found.split))
            continue
        codes = codec.encode(wave, on_progress=shown)
        save_codes(folder / song.codes, codes, dtype=dtype, overwrite=True)
    return len(missing) - len(failed), failed


def _is_there(codes: Path) -> bool:
    try:
        load_codes(codes)
    except AudioError:
        return False
    return True


def _splits(
    chosen: Sequence[_Chosen], how: Mapping[str, Any], before: Mapping[str, str]
) -> list[str]:
    if how["by"] == "folder":
        return [song.found.split or "" for song in chosen]
    songs = [(song.words.artist, song.heard.sound) for song in chosen]
    few = how["valid_share"] is None and len(songs) < FEWEST_TO_SPLIT
    share = 0.0 if few else how["valid_share"] or DEFAULT_SHARE
    return draw_splits(songs, share, how["seed"], before)


def _splits_before(folder: Path, how: Mapping[str, Any]) -> dict[str, str]:
    """The splits of sounds that were drawn in the same way when `folder` was last prepared."""
    try:
        if json.loads((folder / "report.json").read_text(encoding="utf-8"))["split"] != how:
            return {}
        lines = (folder / TABLE).read_text(encoding="utf-8").split("\n")
        entries = [json.loads(line) for line in lines if line]
        return {entry["sound"]: entry["split"] for entry in entries if entry["split"] in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _entry(song: _Chosen, split: str, hop: int) -> dict[str, Any]:
    """Return the row of a song; its lyrics are cleaned when they are read."""
    return {
        "id": song.found.name,
        "split": split,
        **asdict(song.words),
        "minutes": song.minutes,
        "frames": -(-song.heard.samples // hop),
        "codes": song.codes,
        "sound": song.heard.sound,
    }


def _totals(entries: Sequence[Mapping[str, Any]], frame_rate: float) -> dict[str, Any]:
    frames = sum(entry["frames"] for entry in entries)
    return {"songs": len(entries), "minutes": round(frames / frame_rate / 60, 2)}


def _skipped(name: str, error: Unusable, split: str | None = None) -> dict[str, str]:
    entry = {"file": name, "reason": error.reason, "detail": str(error)}
    return {**entry, "split": split} if split else entry


def _write(path: Path, text: str) -> None:
    with appears_whole(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
