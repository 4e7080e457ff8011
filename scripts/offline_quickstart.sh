#!/usr/bin/env bash
# Log a short run of Pong, then train CQL+C51 with a Soft MoE on it: the whole offline path in one command.
#
#     scripts/offline_quickstart.sh [folder]
#
# Sized for two CPU cores: a few minutes. The agent learns nothing worth reporting from so little data.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/offline_quickstart}
game=PongNoFrameskip-v4  # it starts without FIRE: an untrained agent ends its evaluation games
if [ -e "$folder" ]; then
    echo "error: $folder exists, name another folder" >&2
    exit 2
fi

python dqn_softmoe.py --env-id "$game" --layer dense --encoder nature --total-timesteps 24000 --eval-episodes 0 \
    --buffer-size 50000 --save-replay --runs-dir "$folder" --run-name logged
python cql_softmoe.py --env-id "$game" --dataset-dir "$folder/logged" --encoder nature --total-updates 600 \
    --iteration-updates 300 --eval-steps 2000 --runs-dir "$folder" --run-name offline
cat "$folder/offline/metrics.csv"
