#!/usr/bin/env bash
# Figure 8: phi learned, or drawn afresh at every forward; 60 games.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
lines rainbow "$games60" --layer dense --num-experts 1
for phi in "" --no-learned-phi; do lines rainbow "$games60" --layer softmoe --num-experts 8 $phi; done
