#!/usr/bin/env bash
# Figure 7: the Nature CNN as encoder.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for agent in dqn rainbow; do
    for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8"; do
        lines $agent "$games20" --encoder nature --layer $layer
    done
done
