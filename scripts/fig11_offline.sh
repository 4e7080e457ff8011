#!/usr/bin/env bash
# Figures 11 and 17: offline, on 5, 10 and 50% of the data in $DATA/<game> (default: data/<game>).
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for loss in "" --no-distributional; do
    for share in 0.05 0.1 0.5; do
        for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8"; do
            lines cql "$games17" --layer $layer $loss --data-fraction $share
        done
    done
done
