#!/usr/bin/env bash
# What only a GPU can show, the most telling first, meant for 25 minutes. A stage that fails does not stop the next, but
# the exit code is 1 then. On an H200 all GPU tests took two minutes by ten workers (PYTEST_ADDOPTS="-n 10", pytest-xdist),
# and 16 cases of the benchmark three; the whole has only been rehearsed on a CPU.
#
#   scripts/gpu_session.sh [--quick] [tests] [graphs] [benchmark] [dqn] [der]      (no names: all)
#
# Results go to $OUT (default: gpu_session) as they come: a log per stage and run, status.txt with exit codes, the
# benchmark's files, and the runs' own directories. Called again it goes on: runs that are finished are left alone.
# --quick is a rehearsal in minutes, on a CPU too, where the first two stages skip their tests.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_session}
quick='' stages='' failed=0
for word in "$@"; do
    case $word in
        --quick) quick=$word ;;
        tests | graphs | benchmark | dqn | der) stages="$stages $word" ;;
        *) echo "error: no stage is called $word" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
export OMP_NUM_THREADS=1
jobs=$(python -c 'import os, torch; print(16 if torch.cuda.is_available() else os.cpu_count())')
games="Breakout Pong Qbert Seaquest"

stage() {  # name, command
    local start=$SECONDS
    "${@:2}" > "$out/$1.log" 2>&1
    local code=$?
    [ $code = 0 ] || failed=1
    echo "$1: exit code $code, $((SECONDS - start)) s" | tee -a "$out/status.txt"
}

runs() {  # script, flags, "layer game" lines on stdin: side by side, a log each
    xargs -P "$jobs" -L 1 sh -c "
        name=\$1-${1%_softmoe.py}-\$0
        python $1 --layer \$0 --env-id \${1}NoFrameskip-v4 --runs-dir '$out/runs' --run-name \$name --resume auto \
            --no-checkpoint-at-end $2 > '$out'/\$name.log 2>&1
        code=\$?; tail -n 1 '$out'/\$name.log; exit \$code"
}

dqn() {
    local short="--total-timesteps 600 --learning-starts 400 --iteration-steps 200 --eval-episodes 0"
    for game in Breakout Pong; do echo "dense $game"; done |
        runs dqn_softmoe.py "--encoder nature --checkpoint-every 0 --total-timesteps 1000000 ${quick:+$short}"
}

der() {
    local short="--total-timesteps 160 --learning-starts 80 --iteration-steps 80 --eval-episodes 0"
    for layer in dense softmoe; do for game in $games; do echo "$layer $game"; done; done |
        runs der_softmoe.py "${quick:+$short}"
}

for name in ${stages:-tests graphs benchmark dqn der}; do
    case $name in
        tests) stage tests pytest -m cuda -k "not graph" ;;
        graphs) stage graphs pytest -m cuda -k graph ;;
        benchmark) stage benchmark python scripts/benchmark.py $quick --output "$out/benchmark" ;;
        dqn | der) stage "$name" "$name" ;;
    esac
done
exit $failed
