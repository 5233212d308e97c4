"""Which songs are held out: drawn by hash, so that songs that come later move no other."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from khala_mlx.train.data.dataset import SPLITS

TRAIN, VALID = SPLITS


def draw_splits(
    songs: Sequence[tuple[str, str]], share: float, seed: int, before: Mapping[str, str]
) -> list[str]:
    """Return a split for each song, given as its artist ("" if unknown) and its sound's hash.

    About round(share * songs) songs are held out, never the last group. All songs of an artist
    stay together, unless all songs have the same artist. `before` holds the splits that sounds had
    earlier: they stay, so adding songs moves no other.
    """
    groups = groups_of(songs)
    sizes = Counter(groups)
    splits = _kept(groups, [sound for _, sound in songs], before)
    wanted = math.floor(share * len(songs) + 0.5)
    held = sum(sizes[group] for group, split in splits.items() if split == VALID)
    order = sorted((g for g in sizes if g not in splits), key=lambda group: _place(group, seed))
    for group in order:
        # Half a group too few is better than more than half a group too many.
        if wanted - held >= sizes[group] / 2 and wanted > held:
            splits[group] = VALID
            held += sizes[group]
        else:
            splits[group] = TRAIN
    if groups and TRAIN not in splits.values():
        last = max(order or splits, key=lambda group: _place(group, seed))
        splits[last] = TRAIN
    return [splits[group] for group in groups]


def groups_of(songs: Sequence[tuple[str, str]]) -> list[str]:
    """What each song, given as its artist ("" if unknown) and its sound's hash, goes together with.

    That is its artist; or the song alone, without one, or where all are of one artist.
    """
    groups = [f"artist {artist.strip().casefold()}" if artist.strip() else s for artist, s in songs]
    return groups if len(set(groups)) > 1 else [sound for _, sound in songs]


def _kept(
    groups: Sequence[str], sounds: Sequence[str], before: Mapping[str, str]
) -> dict[str, str]:
    """The splits of groups whose known songs agree on one."""
    known: dict[str, set[str]] = {}
    for group, sound in zip(groups, sounds, strict=True):
        if sound in before:
            known.setdefault(group, set()).add(before[sound])
    return {group: next(iter(splits)) for group, splits in known.items() if len(splits) == 1}


def _place(group: str, seed: int) -> float:
    """A number from 0 to below 1 that follows from the group and the seed alone."""
    digest = hashlib.sha256(f"{seed} {group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
