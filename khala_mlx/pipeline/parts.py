"""The three stages of one model folder, each loaded when first used, on plain arrays.

What they are called for, in which order and when each may go, is the pipeline's to say.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import mlx.core as mx
import numpy as np

from khala_mlx import token_ids as tokens
from khala_mlx.config import DTYPES, KhalaConfig
from khala_mlx.errors import KhalaError
from khala_mlx.model import weights
from khala_mlx.model.backbone import Backbone, check_whole
from khala_mlx.model.codec import Codec
from khala_mlx.model.expected import Expected
from khala_mlx.model.lora import Adapters
from khala_mlx.model.sampling import stage_key
from khala_mlx.model.superres import SuperRes
from khala_mlx.model.weights import find_model, load_part, part_files, read_tensors, working_dtype
from khala_mlx.performance.machine import Machine, this_machine
from khala_mlx.performance.memory import Setting
from khala_mlx.pipeline.plan import Job, Plan, limits, make_plan
from khala_mlx.prompt.duration import backbone_room, warn_window
from khala_mlx.prompt.prompt import Prompt, prompt_ids
from khala_mlx.prompt.tokenizer import Tokenizer
from khala_mlx.storage.adapter import Adapter
from khala_mlx.storage.readahead import ReadAhead
from khala_mlx.text import shown

Loaded = TypeVar("Loaded", Backbone, SuperRes, Codec)


# Pieces of a song that is heard while it is rendered: the first comes soon.
HEARD_SECONDS = 5.0


class Stages:
    """Tokenizer, backbone, superres and codec of one model folder, each loaded when first used."""

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
        self.dtype = dtype or working_dtype(config)
        self.keep_loaded = keep_loaded
        # Hears each piece that `render` makes, and the count of all samples of the song.
        self.on_sound: Callable[[np.ndarray, int], None] | None = None
        self.source = str(folder)
        self._parts: dict[str, Any] = {}
        self._adapters = Adapters()
        self._machine: Machine | None = None
        self._plans: list[Plan] = []
        self._ahead: ReadAhead | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "demo", *, dtype: str | None = None, keep_loaded: bool = True
    ) -> Self:
        """Open a model.

        Args:
            source: "demo" (the model in the box), a model folder, or a Hub repository that holds
                one.
            dtype: what the language models compute in, "bfloat16", "float16" or "float32"; by
                default what they are stored in, on the CPU backend float32, since 16-bit
                matrices are slower there by orders of magnitude. There, for the same reason, a
                quantised model that takes at most 1 GiB in float32 is unpacked, whatever the
                dtype. The codec is float32.
            keep_loaded: keep every stage in memory for the next song, if all fit. Otherwise
                `generate` frees each stage when it is done, so that the largest, not the sum, has
                to fit.

        Raises:
            KhalaError: if there is no such model or it is damaged.
        """
        if dtype not in (None, *DTYPES):
            raise KhalaError(f"dtype has to be one of {', '.join(DTYPES)}, got {dtype!r}.")
        folder = find_model(source)
        config = KhalaConfig.load(folder / "config.json")
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        tokenizer.check(config.tokens)
        khala = cls(folder, config, tokenizer, dtype=dtype, keep_loaded=keep_loaded)
        khala.source = str(source)
        return khala

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded when first asked for, with the adapters of `load_adapters` on it."""
        model = self._part("backbone", lambda c: Backbone(c.backbone, c.tokens))
        self._adapters.enter(model)
        return model

    @property
    def superres(self) -> SuperRes:
        """The superres, loaded when first asked for."""
        return self._part("superres", lambda c: SuperRes(c.superres, c.tokens))

    @property
    def codec(self) -> Codec:
        """The codec, loaded when first asked for."""
        return self._part("codec", lambda c: Codec(c.codec))

    def load_adapters(
        self, adapters: Sequence[str | Path | Adapter], scales: Sequence[float] | None = None
    ) -> None:
        """Put these adapters, and no others, on the backbone; none takes all off.

        The base is neither loaded again nor changed: without adapters, or with scales of 0, it
        gives what it gave before, bit by bit.

        Args:
            adapters: folders made by `khala train lora` (or mlx-lm), or what
                `khala_mlx.convert.read_adapter` makes of other formats.
            scales: how strongly each works, 1 as trained.

        Raises:
            KhalaError: if one cannot be read, or fits neither the layers nor the weights; what was
                on the backbone before then stays.
        """
        self._adapters.choose(self.config, adapters, scales)

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """Name, sha256 and scale of each adapter of `load_adapters`."""
        return self._adapters.told()

    def release(self, part: str) -> None:
        """Free the memory of "backbone", "superres" or "codec"; it is loaded again when needed."""
        if part == "backbone":
            self._adapters.leave()
        self._parts.pop(part, None)
        mx.clear_cache()

    def prompt_ids(
        self,
        tags: str = "",
        description: str = "",
        genre: str = "",
        lyrics: str = "",
        instrumental: bool = False,
        language: str = "",
        minutes: int = 1,
        text_mode: str = "same_as_backbone_no_description",
        truncate_lyrics: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the backbone's and the superres prompt, int64 [P] each.

        Raises:
            PromptError: if the prompt is malformed, or too long and not `truncate_lyrics`.
        """
        asked = Prompt(tags, description, genre, lyrics, instrumental, language, minutes, text_mode)
        return prompt_ids(self.tokenizer, self.config, asked, truncate=truncate_lyrics)

    def compose(
        self,
        ids: np.ndarray,
        *,
        max_frames: int,
        min_frames: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        seed: int = 0,
        reachable_only: bool = True,
        kv_bits: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Coarse codes, int [2, T] in 0..codebook_size-1, behind the backbone prompt `ids`.

        More frames than fit the trained window are cut to those that do, with a KhalaWarning.
        See Backbone.generate_many for the other arguments and errors.
        """
        return self.compose_many(
            ids,
            seeds=[seed],
            max_frames=max_frames,
            min_frames=min_frames,
            temperature=temperature,
            top_k=top_k,
            reachable_only=reachable_only,
            kv_bits=kv_bits,
            on_progress=on_progress,
        )[0]

    def compose_many(
        self,
        ids: np.ndarray,
        *,
        seeds: Sequence[int],
        max_frames: int,
        min_frames: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        reachable_only: bool = True,
        kv_bits: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Coarse codes, int [2, T], for each seed, from one prompt and one reading of the weights.

        Each equals what `compose` gives for its seed alone (in float32; 16-bit and packed weights
        round differently in a batch). Where only some fail, theirs are [2, 0] and a KhalaWarning
        tells why. More frames than fit the trained window are cut to those that do, with a
        KhalaWarning. See Backbone.generate_many for the other arguments and errors.
        """
        seeds, ids = check_seeds(seeds), tokens.check_prompt(ids)
        check_whole(max_frames=max_frames, min_frames=min_frames)
        room = backbone_room(self.config, len(ids))
        if max_frames > room > 0:
            warn_window(self.config, max_frames, room)
            max_frames, min_frames = room, min(min_frames, room)
        return self.backbone.compose_many(
            ids,
            keys=[stage_key(seed, 0) for seed in seeds],
            max_frames=max_frames,
            min_frames=min_frames,
            temperature=temperature,
            top_k=top_k,
            reachable_only=reachable_only,
            kv_bits=kv_bits,
            on_progress=on_progress,
        )

    def refine(
        self,
        ids: np.ndarray,
        coarse: np.ndarray,
        *,
        top_k: int = 10,
        seed: int = 0,
        refined: np.ndarray | None = None,
        layers: int | None = None,
        kept: np.ndarray | None = None,
        expected: Expected | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """All codes, int [K, T], from the superres prompt `ids` and coarse codes [2, T].

        It can go on behind `refined` layers, stop at `layers`, leave `kept` codes as they are, and
        choose codes by expectation (`expecting`) instead of drawing: see SuperRes.refine.
        """
        key = stage_key(seed, 1)
        # Before the model is loaded.
        ids = tokens.check_prompt(ids)
        tokens.check_begun(self.config.tokens, coarse, refined)
        return self.superres.refine(
            ids,
            coarse,
            top_k=top_k,
            key=key,
            refined=refined,
            layers=layers,
            kept=kept,
            expected=expected,
            on_progress=on_progress,
        )

    def expecting(self, frames: int) -> Expected:
        """What chooses the codes of a song of so many frames by expectation; for `refine`."""
        codec = self._parts.get("codec")
        if codec is not None:
            codebooks = codec.quantizer.codebooks
        else:
            # Of the codec's file nothing else is read; and now, not within the GPU's work.
            codebooks = read_tensors(part_files(self.folder, "codec"))["quantizer.codebooks"]
            mx.eval(codebooks)
        return Expected(codebooks, frames, self.config.tokens.num_coarse)

    def render(
        self,
        codes: np.ndarray,
        *,
        draft: bool = False,
        chunk_frames: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Sound of codes [K, T]: float32 [hop * T, channels]; of a draft, codes of fewer layers."""
        self._check_codes(codes, draft)
        if self.on_sound:
            piece = round(HEARD_SECONDS * self.config.codec.frame_rate)
            chunk_frames = max(1, min(chunk_frames or piece, piece))
        return self.codec.decode(
            codes, chunk_frames=chunk_frames, on_progress=on_progress, on_block=self.on_sound
        )

    def render_stream(
        self, codes: np.ndarray, *, draft: bool = False, chunk_frames: int | None = None
    ) -> Iterator[np.ndarray]:
        """`render` piece by piece, float32 [L, channels] each, to be heard while the rest is made.

        Put together the pieces equal the whole.
        """
        self._check_codes(codes, draft)
        return self.codec.decode_stream(codes, chunk_frames=chunk_frames)

    @property
    def machine(self) -> Machine:
        """What work is planned for: this machine, unless another was set."""
        if self._machine is None:
            self._machine = this_machine()
        return self._machine

    @machine.setter
    def machine(self, machine: Machine) -> None:
        self._machine = machine

    def envelope(self, job: Job, machine: Machine | None = None) -> Plan:
        """How a job of these sizes is made to fit this machine or another, from config alone."""
        machine = machine or self.machine
        # Another machine may compute in what this one's CPU backend is slow at.
        elsewhere = mx.default_device() == mx.cpu and not machine.on_cpu
        dtype = self.config.dtype if elsewhere else self.dtype
        setting = Setting(dtype, machine.on_cpu, job.kv_bits, self._adapters.extent)
        return make_plan(self.config, setting, machine, job, keep_loaded=self.keep_loaded)

    def _check_codes(self, codes: np.ndarray, draft: bool) -> None:
        layout = self.config.tokens
        tokens.check_codes(
            codes, layers=layout.num_codebooks, codebook_size=layout.codebook_size, fewer=draft
        )

    def _part(self, name: str, build: Callable[[KhalaConfig], Loaded]) -> Loaded:
        if self._plan and self._plan.staged:
            # What an earlier song left loaded.
            for other in [part for part in self._parts if part != name]:
                self.release(other)
        if name not in self._parts:
            dtype = mx.float32 if name == "codec" else getattr(mx, self.dtype)
            model = build(self.config)
            self._parts[name] = load_part(model, self.folder, name, self.config, dtype)
            self._read_ahead_of(name)
        part: Loaded = self._parts[name]
        return part

    @property
    def _plan(self) -> Plan | None:
        """The plan that is followed now, if any."""
        return self._plans[-1] if self._plans else None

    @contextmanager
    def _following(self, plan: Plan) -> Iterator[None]:
        """Within its limits, and with its parts freed when they are done if it says so."""
        self._plans.append(plan)
        try:
            with limits(plan):
                yield
        finally:
            # What is left is that of a song in whose callbacks this one was asked for.
            del self._plans[next(n for n, each in enumerate(self._plans) if each is plan)]
            if self._ahead:
                self._ahead.stop()
                self._ahead = None

    def _read_ahead_of(self, part: str) -> None:
        """While `part` computes, let the files of the next be read, if the plan has room."""
        following = self._plan.ahead_of(part) if self._plan else None
        if following and following not in self._parts:
            self._ahead = ReadAhead(part_files(self.folder, following))

    def _done_with(self, part: str) -> None:
        if (self._plan and self._plan.staged) or not self.keep_loaded:
            self.release(part)
        # The next stage's arrays have other sizes: buffers kept for these would only add to them.
        mx.clear_cache()

    @property
    def identity(self) -> str:
        """sha256 of config.json, which names the checksums of what the weights came from."""
        return hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells the model from others of its kind; see weights.fingerprint."""
        return weights.fingerprint(self.folder)


def check_seeds(seeds: Iterable[int]) -> list[int]:
    """Seeds as a list of Python's numbers; refuse what is no seed, or none at all."""
    if not isinstance(seeds, Iterable):
        raise KhalaError(f"Seeds have to be a list, got {shown(seeds)}.")
    listed = list(seeds)
    if not listed:
        raise KhalaError("At least one seed is needed.")
    for seed in listed:
        stage_key(seed, 0)
    return [int(seed) for seed in listed]
