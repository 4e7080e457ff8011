#!/usr/bin/env bash
# Figures 12 and 16: Atari-100k, with 8 and with 4 experts.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8" \
    "top1moe --num-experts 4" "softmoe --num-experts 4"; do
    lines der "$games26" --encoder impala --layer $layer
done
