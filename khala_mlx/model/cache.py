"""Key-value caches of the backbone, made from mlx_lm.models.

Keys and values are [B, G, S, D]; quantized ones are mlx-lm's triples of codes, scales and biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from khala_mlx.errors import KhalaError
from khala_mlx.text import shown

# Bits of a quantized cache; fewer than 4 are not known to work for keys.
KV_BITS = (4, 8)


def check_kv_bits(kv_bits: int | None, head_dim: int) -> None:
    """Raise KhalaError if mlx-lm cannot quantize a cache in this way."""
    if kv_bits is None:
        return
    if kv_bits not in KV_BITS:
        raise KhalaError(f"kv_bits must be {' or '.join(map(str, KV_BITS))}, got {shown(kv_bits)}.")
    if head_dim % 32:
        raise KhalaError(
            f"kv_bits needs heads of 32 dimensions or a multiple, this model's have {head_dim}. "
            "Leave kv_bits out."
        )


def make_cache(
    num_layers: int, capacity: int, *, kv_bits: int | None = None, head_dim: int = 64
) -> list[Any]:
    """Return mlx-lm key-value caches that allocate room for `capacity` tokens once.

    With `kv_bits` keys and values are quantized, in groups of 64 or, for narrower heads, 32.
    """
    with file_limit_kept():
        from mlx_lm.models.cache import KVCache, QuantizedKVCache
    if kv_bits is None:
        caches = [KVCache() for _ in range(num_layers)]
    else:
        group = 64 if head_dim % 64 == 0 else 32
        caches = [QuantizedKVCache(group_size=group, bits=kv_bits) for _ in range(num_layers)]
    for cache in caches:
        # The classes grow by `step` and copy each time; one step of the full size never grows.
        cache.step = capacity
    return caches


def spread(prompt: list[Any], caches: list[Any], rows: int) -> None:
    """Copy the caches of one prompt, batch 1, into empty `caches` of `rows` rows.

    The source of each layer is freed before the next is copied.
    """
    for index, cache in enumerate(caches):
        keys, values = prompt[index].keys_and_values()
        cache.update_and_fetch(*(mx.repeat(x, rows, axis=0) for x in (keys, values)))
        prompt[index] = None
        mx.eval(cache.keys, cache.values)


def keep_rows(caches: list[Any], rows: mx.array) -> None:
    """Keep only these rows of the batch; one array at a time is copied."""
    for cache in caches:
        for name in ("keys", "values"):
            kept = tree_map(lambda x: x[rows], getattr(cache, name))
            setattr(cache, name, kept)
            mx.eval(kept)


@contextmanager
def file_limit_kept() -> Iterator[None]:
    """Keep RLIMIT_NOFILE, which importing mlx_lm lowers, hard limit included."""
    import resource

    setrlimit = resource.setrlimit
    # A lowered hard limit cannot be raised again, so the call itself must have no effect.
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = setrlimit
