#!/usr/bin/env bash
# Figure 18: filters of 3x3, 4x4 and 6x6 in the Impala encoder.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for filter in "" "--impala-filter 4" "--impala-filter 6"; do
    for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8"; do
        lines rainbow "$games20" --layer $layer $filter
    done
done
