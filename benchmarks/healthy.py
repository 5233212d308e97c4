"""How far quantization and 16 bits move the figures of `khala models verify`, on healthy models.

    python benchmarks/healthy.py FULL

FULL is a model folder that is not quantized. For each quantization, goldens are recorded in
float32 and compared with the same weights in bfloat16, quantized where they are. Beside that stands
the distance from the goldens of FULL, the cost of quantization itself. The bounds of `models
verify` must be above the former (khala_mlx/quality/goldens.py, docs/parity.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from khala_mlx import Khala
from khala_mlx.convert import convert
from khala_mlx.errors import KhalaWarning
from khala_mlx.model import weights
from khala_mlx.quality import goldens

PACKINGS = ("8", "6", "4", "mxfp8", "mxfp4")
FIGURES = ("backbone_equal", "backbone_nats", "superres_equal", "superres_nats")
UNPACKED = weights.CPU_DEQUANTIZED_BYTES


def opened(folder: Path, dtype: str, *, packed: bool) -> Khala:
    """A model that is quantized when it computes, or not."""
    # The CPU backend dequantizes small models, a GPU does not.
    weights.CPU_DEQUANTIZED_BYTES = 0 if packed else UNPACKED
    return Khala.from_pretrained(folder, dtype=dtype)


def compared(folder: Path, dtype: str, reference: Path) -> dict[str, Any]:
    """The weights of a folder in `dtype`, beside goldens in float32 of themselves and of FULL."""
    path = folder / goldens.FILE
    goldens.record(opened(folder, "float32", packed=False))
    healthy = goldens.check(opened(folder, dtype, packed=True))
    # Goldens of other weights are refused but for this.
    kind = opened(folder, "float32", packed=False)
    kind.parts.fingerprint = Khala.from_pretrained(reference).parts.fingerprint
    path.write_bytes((reference / goldens.FILE).read_bytes())
    return {"healthy": healthy, "packing": goldens.check(kind)}


def main() -> None:
    """Convert, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a model folder that is not quantized")
    parser.add_argument("--packings", nargs="+", default=PACKINGS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Whose tokenizer it is does not matter here.
    warnings.simplefilter("ignore", KhalaWarning)
    told = {}
    with tempfile.TemporaryDirectory() as work:
        full = Path(work, "full")
        how: dict[str, Any] = {"dtype": "float32", "tokenizer": str(options.model)}
        convert(options.model, full, **how)
        goldens.record(opened(full, "float32", packed=False))
        for dtype in ("float16", "bfloat16"):
            told[dtype] = {"healthy": goldens.check(opened(full, dtype, packed=True))}
        for name in options.packings:
            made = Path(work, name)
            convert(options.model, made, quantize=name, **how)
            told[name] = compared(made, "bfloat16", full)
    if options.json:
        print(json.dumps(told))
        return
    for kind in ("healthy", "packing"):
        print(f"| {kind} | {' | '.join(FIGURES)} |")
        for name, each in told.items():
            if kind in each:
                print(f"| {name} | {' | '.join(str(each[kind][f]) for f in FIGURES)} |")


if __name__ == "__main__":
    main()
