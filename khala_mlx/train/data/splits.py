"""Which songs are held out: drawn by hash, so that songs that come later move no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from khala_mlx.train.data.dataset import SPLITS

TRAIN, VALID = SPLITS


def draw_splits(
    songs: Sequence[tuple[str, str]], share: float, seed: int, before: Mapping[str, str]
) -> list[str]:
    """A split for each song, given as its artist ("" if unknown) and the hash of its sound.

    All songs of an artist go together, unless all songs are of one; about `share` of the artists
    and of the songs without one are held out. `before` holds the splits that sounds had earlier:
    they stay. Two songs or more leave no split empty.
    """
    groups = groups_of(songs)
    places = {group: _place(group, seed) for group in groups}
    kept = _kept(groups, [sound for _, sound in songs], before)
    splits = {group: VALID if place < share else TRAIN for group, place in places.items()} | kept
    # What had no split yet moves first.
    movable = [group for group in places if group not in kept] or list(places)
    for split, first in ((VALID, min), (TRAIN, max)):
        if len(splits) > 1 and split not in splits.values():
            splits[first(movable, key=lambda group: places[group])] = split
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
