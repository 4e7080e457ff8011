#!/usr/bin/env bash
# Figure 9: auxiliary losses that balance Top-1 routing.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for agent in dqn rainbow; do
    for loss in "" "--load-balancing importance" "--load-balancing load" "--load-balancing importance+load"; do
        lines $agent "$games20" --layer top1moe --num-experts 8 $loss
    done
done
