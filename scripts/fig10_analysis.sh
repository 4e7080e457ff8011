#!/usr/bin/env bash
# Figure 10: weights over training, for scripts/analyze.py.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for layer in "dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8"; do
    lines rainbow "Asterix Pong SpaceInvaders" --layer $layer --weights-every "${WEIGHTS_EVERY:-2500000}"
done
