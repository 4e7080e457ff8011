#!/usr/bin/env bash
# Figure 1: one to eight experts against dense layers as many times as wide.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for agent in dqn rainbow; do
    for layer in dense top1moe softmoe; do
        for experts in 1 2 4 8; do lines $agent "$games20" --layer $layer --num-experts $experts; done
    done
done
