#!/usr/bin/env bash
# Saves the transitions of a short run of Pong and trains CQL+C51 with a Soft MoE on them.
#
#     scripts/offline_quickstart.sh [folder]
#
# The script takes a few minutes on two CPU cores. The agent learns next to nothing from so little data.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/offline_quickstart}
game=PongNoFrameskip-v4  # starts without the FIRE action, so that an untrained agent finishes its games
if [ -e "$folder" ]; then
    echo "error: $folder already exists; name another folder" >&2
    exit 2
fi

python dqn_softmoe.py --env-id "$game" --layer dense --encoder nature --total-timesteps 24000 --eval-episodes 0 \
    --buffer-size 50000 --save-replay --runs-dir "$folder" --run-name logged
python cql_softmoe.py --env-id "$game" --dataset-dir "$folder/logged" --encoder nature --total-updates 600 \
    --iteration-updates 300 --eval-steps 2000 --runs-dir "$folder" --run-name offline
cat "$folder/offline/metrics.csv"
