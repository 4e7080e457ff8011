#!/usr/bin/env bash
# Figure 6: what is a token, with soft and with sparse routing.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
for layer in softmoe top1moe; do
    for tokens in "" "--tokenization PerFeat" "--tokenization PerSamp"; do
        lines rainbow "$games20" --layer $layer --num-experts 8 $tokens
    done
done
