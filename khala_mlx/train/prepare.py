"""A folder of songs as training data: codes beside the words that go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from khala_mlx.audio import load_codes, read_audio, save_codes
from khala_mlx.codec import Codec
from khala_mlx.config import KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.files import appears_whole
from khala_mlx.tokenizer import Tokenizer
from khala_mlx.train.codec import load_codec
from khala_mlx.train.data import SOUNDS
from khala_mlx.weights import find_model, load_part


def tools_of(folder: Path, model: str | None, run: Path | None, tokenizer: Path | None) -> Codec:
    """The codec of a model, or of a codec run; its tokenizer is copied into `folder`.

    Raises:
        KhalaError: if one of them cannot be read, or another tokenizer is there already.
    """
    if model is not None:
        source = find_model(model)
        config = KhalaConfig.load(source / "config.json")
        codec = load_part(Codec(config.codec), source, "codec", config)
        tokenizer = source / "tokenizer.json"
    else:
        assert run is not None
        assert tokenizer is not None
        codec = load_codec(run)
    Tokenizer.from_file(tokenizer)
    target = folder / "tokenizer.json"
    if not target.exists():
        with appears_whole(target) as temporary:
            temporary.write_bytes(tokenizer.read_bytes())
    elif target.read_bytes() != tokenizer.read_bytes():
        raise KhalaError(f"{folder} was prepared with another tokenizer; choose a new folder.")
    return codec


def prepare(
    songs: Path,
    folder: Path,
    codec: Codec,
    split: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode the sound files of `songs` into `folder`/codes and list them as `split`.

    Beside song.wav its song.caption.txt holds the tags and song.lyrics.txt the words; both may be
    missing. Songs that are encoded already are kept, so that an interrupted run goes on.

    Returns:
        How many songs the split now has.
    """
    found = songs.iterdir() if songs.is_dir() else ()
    files = sorted(path for path in found if path.suffix.lower() in SOUNDS)
    if not files:
        raise KhalaError(f"{songs} holds no sound files ({', '.join(SOUNDS)}).")
    entries = []
    for number, path in enumerate(files):
        name = f"{split}-{path.stem}"
        target = folder / "codes" / f"{name}.npz"
        if not target.exists():
            wave = read_audio(path, codec.config.sample_rate, codec.config.channels)
            save_codes(target, codec.encode(wave))
        entries.append(
            {
                "id": name,
                "split": split,
                "tags": _words(path, "caption"),
                "lyrics": _words(path, "lyrics"),
                "frames": int(load_codes(target).shape[1]),
            }
        )
        if on_progress is not None:
            on_progress(number + 1, len(files))
    _write_index(folder / "metadata.jsonl", split, entries)
    return len(entries)


def _words(sound: Path, kind: str) -> str:
    path = sound.with_suffix(f".{kind}.txt")
    return path.read_text(encoding="utf-8-sig").strip() if path.exists() else ""


def _write_index(index: Path, split: str, entries: list[dict[str, Any]]) -> None:
    """Replace the entries of one split, keep those of the others."""
    lines = index.read_text(encoding="utf-8").splitlines() if index.exists() else []
    kept = [line for line in lines if json.loads(line)["split"] != split]
    kept += [json.dumps(entry, ensure_ascii=False) for entry in entries]
    with appears_whole(index, overwrite=True) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
