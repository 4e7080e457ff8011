#!/usr/bin/env bash
# Figure 5: experts of 512 hidden units each, or of 512 together.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for width in "1" "2" "4" "8" "2 --expert-hidden-dim 256" "4 --expert-hidden-dim 128" "8 --expert-hidden-dim 64"; do
    lines rainbow "$games20" --layer softmoe --num-experts $width
done
