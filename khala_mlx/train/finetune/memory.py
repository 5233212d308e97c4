"""How much memory the training of an adapter takes, from sizes alone.

Counts arrays: what is held throughout, what layers keep for their gradients, and what is at work
while the gradients of one layer are taken. The first two follow from the graph, the last is fitted
to peaks measured on the CPU backend (docs/fine-tuning.md has the arithmetic and its accuracy).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from khala_mlx.config import KhalaConfig, TransformerConfig
from khala_mlx.model.attention import SCORE_BYTES, TRAINING_SCORE_BYTES, writes_scores
from khala_mlx.performance.cost import transformer_bytes
from khala_mlx.storage.adapter import module_key
from khala_mlx.storage.shapes import linear_sizes
from khala_mlx.train.finetune.loss import LOGIT_BYTES
from khala_mlx.train.settings import LoraTraining

# Adapters, their gradients and the optimiser's moments are float32 whatever the model is.
_FLOAT32 = 4
# Arrays [N, H] and [N, I] at work on the gradients of one layer.
_HIDDEN_AT_WORK, _INNER_AT_WORK = 12, 6
# The same for arrays as large as the attention scores that are written out, or a chunk of logits.
_SCORES_AT_WORK, _LOGITS_AT_WORK = 2.2, 3.2
# Chunks begin before the memory of the ones before them is free.
_SCORE_CHUNKS, _LOGIT_CHUNKS = 2, 3.4
# Copies of the adapter while it is updated, beside its values, moments and gradients.
_UPDATE_COPIES = 1.5
# What each linear layer reads; those that read the same rows share them.
_READS = {"q_proj": "x", "k_proj": "x", "v_proj": "x", "gate_proj": "h", "up_proj": "h"}


@dataclass(frozen=True)
class Machine:
    """Where a training runs: the bytes of an activation, on the CPU backend or not, and whether
    quantized layers were dequantized when they were loaded."""

    width: int
    on_cpu: bool
    unpacked: bool = False


@dataclass(frozen=True)
class Forecast:
    """Bytes: the frozen weights, the adapter with gradients and moments, what layers keep, and the
    most that is at work at one time."""

    weights: int
    adapter: int
    kept: int
    at_work: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapter + self.kept + self.at_work

    def to_dict(self) -> dict[str, int]:
        """All figures and their sum."""
        return {**asdict(self), "total": self.total}


def forecast(
    config: KhalaConfig, settings: LoraTraining, shape: tuple[int, int], machine: Machine
) -> Forecast:
    """The peak of a training whose largest batch is `shape`, songs and tokens [B, S]."""
    sizes, width = config.backbone, machine.width
    rows = shape[0] * shape[1]
    trained = settings.layers or sizes.num_layers
    written = writes_scores(sizes.head_dim, on_cpu=machine.on_cpu)
    scores = _score_bytes(sizes, *shape) if written else 0
    chunked = scores > SCORE_BYTES
    layer = _layer_bytes(config, settings, rows, machine) + (0 if chunked else scores)
    # The inputs of the layers and the inside of one, or the inside of all.
    inputs = trained * rows * sizes.hidden_size * width
    kept = inputs + layer if settings.grad_checkpoint else trained * layer
    work = _work_bytes(sizes, settings, rows, machine)
    work += _SCORE_CHUNKS * TRAINING_SCORE_BYTES if chunked else int(_SCORES_AT_WORK * scores)
    head, logits = _head_bytes(config, settings, rows, width)
    # While logits are at work no layer is, and with checkpointing the inside of none is there.
    logits -= layer if settings.grad_checkpoint else 0
    adapter = adapter_bytes(config, settings)
    copies = 4 + (settings.accumulate > 1) + (settings.patience > 0)
    # The layers need nothing any more then.
    update = int(_UPDATE_COPIES * adapter) - kept
    return Forecast(
        weight_bytes(config, machine), copies * adapter, kept, max(head + max(work, logits), update)
    )


def weight_bytes(config: KhalaConfig, machine: Machine) -> int:
    """The frozen backbone as it lies in memory."""
    config = replace(config, quantization={}) if machine.unpacked else config
    return transformer_bytes(config, "backbone", machine.width)


def adapter_bytes(config: KhalaConfig, settings: LoraTraining) -> int:
    """What the adapter's own values take."""
    shapes = _shapes(config.backbone, settings).values()
    values = sum(settings.rank * (into + out) + settings.dora * out for into, out in shapes)
    return _FLOAT32 * values * (settings.layers or config.backbone.num_layers)


def _shapes(sizes: TransformerConfig, settings: LoraTraining) -> dict[str, tuple[int, int]]:
    """(in, out) of the modules of a layer that get an adapter."""
    every = linear_sizes(sizes)
    return {module: every[f"layers.0.{module_key(module)}"] for module in settings.modules}


def _layer_bytes(config: KhalaConfig, settings: LoraTraining, rows: int, machine: Machine) -> int:
    """What one layer keeps for its gradients, attention scores aside."""
    sizes, width = config.backbone, machine.width
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    # Both norms' inputs and the sum between; queries, keys, values; gate, its sigmoid, silu and up.
    kept = width * (3 * hidden + queries + 2 * keys + 4 * inner)
    shapes = _shapes(sizes, settings)
    if width == _FLOAT32 and not settings.dropout:
        kept += width * sum({_READS.get(m, m): into for m, (into, _) in shapes.items()}.values())
    else:
        # Each module casts, or masks, a copy of its own; the mask takes a byte.
        kept += (_FLOAT32 + (settings.dropout > 0)) * sum(into for into, _ in shapes.values())
    if not settings.dora:
        return rows * kept
    kept += width * sum(out for _, out in shapes.values())
    packed = config.quantization and not machine.unpacked
    matrices = sum(into * out for into, out in shapes.values()) if packed else 0
    return rows * kept + width * matrices


def _work_bytes(
    sizes: TransformerConfig, settings: LoraTraining, rows: int, machine: Machine
) -> int:
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    work = machine.width * rows * (_HIDDEN_AT_WORK * hidden + _INNER_AT_WORK * inner)
    if machine.width != _FLOAT32:
        # The adapter's part of gate, up and down is float32.
        work += 3 * _FLOAT32 * rows * inner
    if settings.dora:
        # A changed matrix, and what its norm is taken of.
        work += 2 * _FLOAT32 * hidden * inner
    return work


def _head_bytes(
    config: KhalaConfig, settings: LoraTraining, rows: int, width: int
) -> tuple[int, int]:
    """Copies of the head's rows, and what the logits take while they are at work."""
    layout = config.tokens
    if settings.whole_vocabulary:
        head, logits = 0, _FLOAT32 * rows * config.backbone.vocab_size
    else:
        candidates = layout.codebook_size + 1
        head = width * layout.num_coarse * candidates * config.backbone.hidden_size
        logits = _FLOAT32 * rows * candidates
    # A chunk holds logits of one layer's codes only.
    chunk = min(logits // (1 if settings.whole_vocabulary else layout.num_coarse), LOGIT_BYTES)
    chunks = min(-(-logits // max(1, chunk)), _LOGIT_CHUNKS)
    return head, int(chunks * _LOGITS_AT_WORK * chunk)


def _score_bytes(sizes: TransformerConfig, batch: int, tokens: int) -> int:
    """The attention scores of a layer, where they are written out."""
    return _FLOAT32 * batch * sizes.num_heads * tokens**2
