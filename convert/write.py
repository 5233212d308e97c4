"""One part of a model folder written: its sources checked, its tensors streamed into files."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from khala_mlx.convert.checksums import checked_sha256
from khala_mlx.convert.formats.safetensors import Output, write
from khala_mlx.convert.formats.tensors import Extent
from khala_mlx.convert.layouts.parts import Part, naming
from khala_mlx.convert.outputs import Packing, codec_outputs, files, index, transformer_outputs
from khala_mlx.convert.source import Located
from khala_mlx.errors import ConvertError
from khala_mlx.text import shown

Progress = Callable[[str, int, int], None]


def write_part(
    part: Part[Any], packing: Packing, located: Located, folder: Path, on_progress: Progress | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Check a part's sources, then convert them while they are in the page cache."""
    outputs_of = codec_outputs if part.name == "codec" else transformer_outputs
    outputs = outputs_of(part, packing)
    extents = {extent for tensor in part.tensors.values() for extent in tensor.extents}
    sources = sorted({extent.path for extent in extents} | set(part.files))
    total = sum(_size(path) for path in sources) + sum(output.bytes for output in outputs)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress(part.name, done, total)

    with naming(part.name):
        checksums = _check_sources(sources, extents, located, part.root or located.root, count)
        shards = write_files(part.name, outputs, folder, count)
    entries = [entry for output in outputs for entry in output.entries]
    return {
        "tensors": len(entries),
        "parameters": sum(tensor.size for tensor in part.tensors.values()),
        "bytes": sum(entry.bytes for entry in entries),
        "files": shards,
        "dropped_rows": part.dropped_rows,
    }, checksums


def _check_sources(
    sources: Iterable[Path],
    extents: Iterable[Extent],
    located: Located,
    root: Path,
    count: Callable[[int], None],
) -> dict[str, str]:
    checksums = {}
    for path in sources:
        name = path.relative_to(root).as_posix()
        used = [extent for extent in extents if extent.path == path]
        checksums[name] = checked_sha256(path, used, count)
        if name in located.partial:
            checksums[name] = located.checksums.get(name, "")
        if located.checksums.get(name, checksums[name]) != checksums[name]:
            raise ConvertError(
                f"{shown(name)} is not what the Hub holds; remove it from the cache and try again."
            )
    return checksums


def write_files(
    part: str, outputs: list[Output], folder: Path, count: Callable[[int], None]
) -> list[str]:
    """Write a part's tensors into one file, or several with an index; returns their names."""
    shards = files(part, outputs)
    try:
        for file, shard in shards:
            write(folder / file, shard, count)
        if len(shards) > 1:
            write_json(folder / f"{part}.safetensors.index.json", index(shards))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        need = sum(output.bytes for output in outputs) / 1e9
        raise ConvertError(f"the disk is full, this part takes {need:.3g} GB.") from error
    return [file for file, _ in shards]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConvertError(f"{shown(path.name)} cannot be read: {error.strerror}.") from error


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
