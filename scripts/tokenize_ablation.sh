#!/usr/bin/env bash
# "Don't flatten, tokenize!" (Sokar et al., 2024): what of a Soft MoE carries the gain.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for layer in dense gap tokenized softmoe; do
    for experts in 1 4; do lines rainbow "$games20" --layer $layer --num-experts $experts; done
done
lines rainbow "$games20" --layer softmoe --num-experts 1 --expert-hidden-dim 2048
lines rainbow "$games20" --layer expert_choice --num-experts 4
for tokens in PerFeat PerSamp PerPatch Shuffled; do
    lines rainbow "$games20" --layer softmoe --num-experts 4 --tokenization $tokens
done
for capacity in 0.1 0.5; do lines rainbow "$games20" --layer softmoe --num-experts 4 --capacity-factor $capacity; done
