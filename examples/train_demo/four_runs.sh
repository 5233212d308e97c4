#!/usr/bin/env bash
# Four trainings of superres of equal budget: from the backbone or from scratch, hybrid or with
# full attention alone. Prints the held-out nats of each. Run make_demo.sh first, same WORK.
#
#     bash four_runs.sh [WORK]
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
cd "${1:-work}"
for settings in "$here"/four_runs/*.json; do
    run=runs/four/$(basename "$settings" .json)
    resume=()
    [ -f "$run/checkpoint.safetensors" ] && resume=(--resume)
    [ -f "$run/superres.safetensors" ] || khala train superres --data coded_short \
        --out "$run" --config "$settings" "${resume[@]}"
done
python - <<'PYTHON'
import json
from pathlib import Path

for run in sorted(Path("runs/four").iterdir()):
    layers = json.loads((run / "by_layer.json").read_text())
    picked = {layer: round(layers[layer], 3) for layer in ("2", "3", "4", "8", "16", "32", "63")}
    print(run.name, "mean", round(sum(layers.values()) / len(layers), 4), picked)
PYTHON
