"""The tokenizer and the three models of one model folder, each loaded when first used.

Which of them is needed when, and when it may go, is decided in khala.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from khala_mlx.config import DTYPES, KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model import weights
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.lora import Adapters
from khala_mlx.model.superres import SuperRes
from khala_mlx.pipeline.plan import Plan, limits
from khala_mlx.prompt.scope import Scope
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.storage.adapter import Adapter
from khala_mlx.storage.readahead import ReadAhead

Loaded = TypeVar("Loaded", Backbone, SuperRes, Codec)


class Parts:
    """The parts of a model folder, loaded and freed as the plan that is followed says."""

    def __init__(
        self,
        folder: Path,
        config: KhalaConfig,
        tokenizer: Tokenizer,
        *,
        dtype: str | None = None,
        keep_loaded: bool = True,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = dtype or weights.working_dtype(config)
        self.keep_loaded = keep_loaded
        self._loaded: dict[str, Any] = {}
        self._adapters = Adapters()
        self._plans: list[Plan] = []
        self._ahead: ReadAhead | None = None

    @classmethod
    def open(
        cls, source: str | Path, *, dtype: str | None = None, keep_loaded: bool = True
    ) -> Parts:
        """Find a model folder and read its config and tokenizer; see Khala.from_pretrained."""
        if dtype not in (None, *DTYPES):
            raise KhalaError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        folder = weights.find_model(source)
        config = KhalaConfig.load(folder / "config.json")
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        tokenizer.check(config.tokens)
        return cls(folder, config, tokenizer, dtype=dtype, keep_loaded=keep_loaded)

    @property
    def backbone(self) -> Backbone:
        """The backbone, with the adapters of `load_adapters` on it."""
        model = self._part("backbone", lambda c: Backbone(c.backbone, c.tokens))
        self._adapters.enter(model)
        return model

    @property
    def superres(self) -> SuperRes:
        """The superres."""
        return self._part("superres", lambda c: SuperRes(c.superres, c.tokens))

    @property
    def codec(self) -> Codec:
        """The codec."""
        return self._part("codec", lambda c: Codec(c.codec))

    def codec_codebooks(self) -> mx.array:
        """The codec's codebooks [K, codes, latent]; reads nothing else of the codec's file."""
        codec = self._loaded.get("codec")
        if codec is not None:
            return codec.quantizer.codebooks
        tensors = weights.read_tensors(weights.part_files(self.folder, "codec"))
        codebooks = tensors["quantizer.codebooks"]
        # Now: a file must not be read in the middle of the GPU's work.
        mx.eval(codebooks)
        return codebooks

    def load_adapters(
        self, adapters: Sequence[str | Path | Adapter], scales: Sequence[float] | None
    ) -> None:
        """Use these adapters on the backbone; see Khala.load_adapters."""
        self._adapters.choose(self.config, adapters, scales)

    @property
    def adapters(self) -> Adapters:
        """The adapters chosen by `load_adapters`."""
        return self._adapters

    def release(self, part: str) -> None:
        """Free the memory of "backbone", "superres" or "codec"; it is loaded again when needed."""
        if part == "backbone":
            self._adapters.leave()
        self._loaded.pop(part, None)
        mx.clear_cache()

    @contextmanager
    def following(self, plan: Plan) -> Iterator[None]:
        """Apply the plan's memory limits; free each part after its stage if the plan is staged."""
        self._plans.append(plan)
        try:
            with limits(plan):
                yield
        finally:
            # A callback may have started another song: the plans left are not this one's alone.
            del self._plans[next(n for n, each in enumerate(self._plans) if each is plan)]
            if self._ahead:
                self._ahead.stop()
                self._ahead = None

    def stage_done(self, part: str) -> None:
        """Free a part after its stage, unless all parts stay loaded."""
        if (self._plan and self._plan.staged) or not self.keep_loaded:
            self.release(part)
        # The next stage's arrays have other sizes: kept buffers would only add to them.
        mx.clear_cache()

    @functools.cached_property
    def scope(self) -> Scope | None:
        """What the model knows, if its folder states it."""
        return Scope.load(self.folder)

    @property
    def identity(self) -> str:
        """sha256 of config.json, which names the checksums of the weights' source."""
        return hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest that differs between models of the same config; see weights.fingerprint."""
        return weights.fingerprint(self.folder)

    def _part(self, name: str, build: Callable[[KhalaConfig], Loaded]) -> Loaded:
        if self._plan and self._plan.staged:
            # An earlier song may have left others loaded.
            for other in [part for part in self._loaded if part != name]:
                self.release(other)
        if name not in self._loaded:
            dtype = mx.float32 if name == "codec" else getattr(mx, self.dtype)
            model = build(self.config)
            self._loaded[name] = weights.load_part(model, self.folder, name, self.config, dtype)
            self._read_ahead_of(name)
        part: Loaded = self._loaded[name]
        return part

    @property
    def _plan(self) -> Plan | None:
        """The plan that is followed now, if any."""
        return self._plans[-1] if self._plans else None

    def _read_ahead_of(self, part: str) -> None:
        """Read the next part's files while `part` computes, if the plan has room for them."""
        following = self._plan.ahead_of(part) if self._plan else None
        if following and following not in self._loaded:
            self._ahead = ReadAhead(weights.part_files(self.folder, following))
