#!/usr/bin/env bash
# Figures 13 to 15: the encoder before the experts or in each, with and without normalised routing. Experts with encoders
# read 84 * 84 tokens: routing weights alone take 6 GB at a batch of 32. "All" of the figures was never released.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for agent in dqn rainbow; do
    lines $agent "$games20" --layer dense --num-experts 1
    for variant in "" --normalize-router "--expert-variant big" "--expert-variant big --normalize-router"; do
        lines $agent "$games20" --layer softmoe --num-experts 8 $variant
    done
done
