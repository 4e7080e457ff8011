#!/usr/bin/env bash
# Figure 18: larger filters in the Impala encoder.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for filter in 4 6; do
    for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8"; do
        lines rainbow "$games20" --impala-filter $filter --layer $layer
    done
done
