#!/usr/bin/env bash
# Make the demo model from scratch: corpus, codec, tokens, backbone, superres, model folder.
#
#     bash make_demo.sh [WORK]        (WORK is ./work by default)
#
# After an interruption, run the same command again: finished steps are skipped, and training resumes
# from its checkpoint.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
work=${1:-work}
mkdir -p "$work"
cd "$work"

corpus() { # folder, split, first seed, count, further options
    local folder=$1 split=$2 start=$3 count=$4
    shift 4
    [ -f "$folder/metadata.jsonl" ] || {
        rm -rf "$folder"
        PYTHONPATH=$here python -m corpus write "$folder" --split "$split" --start "$start" \
            --count "$count" "$@"
    }
}

train() { # part, data, run, settings
    [ -f "$3/$1.safetensors" ] || {
        local resume=()
        [ -f "$3/checkpoint.safetensors" ] && resume=(--resume)
        khala train "$1" --data "$2" --out "$3" --config "$here/$4" "${resume[@]}"
    }
}

prepare() { # songs, coded
    [ -f "$2/done" ] || {
        khala train prepare "$1" "$2" --codec runs/codec --tokenizer tokenizer.json
        touch "$2/done"
    }
}

join() { # coded, parts...
    local folder=$1
    shift
    [ -f "$folder/metadata.jsonl" ] || {
        mkdir -p "$folder/codes"
        for part in "$@"; do
            ln -f "$part"/codes/* "$folder/codes/"
            cp "$part/tokenizer.json" "$folder/"
        done
        cat "${@/%//metadata.jsonl}" >"$folder/metadata.jsonl"
    }
}

corpus songs/train train 0 800
corpus songs/valid valid 0 50
corpus short/train train 0 3000 --seconds 3 --whole-frames
corpus short/valid valid 0 64 --seconds 3 --whole-frames
corpus long/train train 10000 1200 --seconds 6 --seconds 6 --seconds 9 --seconds 12 --whole-frames
corpus long/valid valid 10000 64 --seconds 6 --whole-frames
corpus long_more/train train 11200 2000 --seconds 6 --seconds 6 --seconds 9 --seconds 12 --whole-frames
corpus long_more/valid valid 20000 2 --seconds 6 --whole-frames
[ -f tokenizer.json ] || python "$here/tokenizer.py" tokenizer.json

train codec songs runs/codec codec.json
prepare short coded_short
prepare long coded_long
prepare long_more coded_long_more
join coded coded_short coded_long
join coded_whole coded_long coded_long_more
train backbone coded_short runs/backbone_short backbone_short.json
train backbone coded_whole runs/backbone backbone.json
train superres coded runs/superres superres.json
train superres coded runs/superres_more superres_more.json

[ -d demo ] || khala train pack demo --codec runs/codec --backbone runs/backbone \
    --superres runs/superres_more --tokenizer tokenizer.json \
    --dtype float16 --codec-dtype float16 --quantize 6
