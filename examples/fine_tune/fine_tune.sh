#!/usr/bin/env bash
# Teach the bundled demo model a new style, and show what changed.
#
#     bash fine_tune.sh [WORK]        (WORK is ./work by default)
#
# Environment variables: MODEL, STEPS, SONGS (songs of the new style, and as many held out) and OLD
# (songs of the old styles, which the model should not forget). WORK must be new or empty.
set -euo pipefail
corpus=$(cd "$(dirname "$0")/../train_demo" && pwd)
work=${1:-work} model=${MODEL:-demo} steps=${STEPS:-120} songs=${SONGS:-20} old=${OLD:-80}
case $model in */*) model=$(cd "$model" && pwd) ;; esac
mkdir -p "$work"
cd "$work"

# Replace these songs with yours. The subfolder valid contains the held-out songs.
write() { PYTHONPATH=$corpus python -m corpus write "$@" --start 50000 --whole-frames; }
for split in train valid; do
    write new/$split --split $split --count "$songs" --style chiptune
    write old/$split --split $split --count "$old"
done

khala train prepare new new-coded --model "$model"
khala train prepare old old-coded --model "$model"
khala train lora --model "$model" --data new-coded --replay old-coded --replay-share 0.4 \
    --out chiptune --rank 8 --learning-rate 1e-3 --grad-accumulation 4 --steps "$steps"
khala train evaluate --model "$model" --data new-coded --adapter chiptune --adapter-scale 0.6 \
    --forget old-coded --listen pairs
khala generate --model "$model" --adapter chiptune --adapter-scale 0.6 \
    --tags "chiptune, fast, happy" --lyrics "do re mi" --seconds 6 --seed 1 --output chiptune.wav
khala train fuse chiptune-model --model "$model" --adapter chiptune --adapter-scale 0.6
