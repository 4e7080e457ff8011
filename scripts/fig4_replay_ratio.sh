#!/usr/bin/env bash
# Figure 4: 1, 2, 4 and 8 updates per four agent steps.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for agent in dqn rainbow; do
    for layer in "dense --num-experts 1" "softmoe --num-experts 8"; do
        for ratio in "" "--replay-ratio 0.5" "--replay-ratio 1" "--replay-ratio 2"; do
            lines $agent "$games20" --layer $layer $ratio
        done
    done
done
