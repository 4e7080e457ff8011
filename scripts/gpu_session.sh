#!/usr/bin/env bash
# Runs what only a GPU can show: tests, the benchmark, and trainings whose scores others have published. A stage that
# fails does not stop the next one, but the exit code is then 1. The last stage has only been rehearsed on a CPU.
#
#   scripts/gpu_session.sh [--quick] [tests] [graphs] [benchmark] [drq_eps]      (no names: all)
#
# Everything is written to $OUT (default: gpu_session): a log per stage, status.txt with the exit codes, the benchmark's
# files and the runs. Called again, it leaves finished runs alone. GAMES and SEEDS replace the runs' eight games and one
# seed, and JOBS is how many of them run at a time (default: 4). PYTEST_ADDOPTS="-n 10" runs the tests in ten processes.
# --quick is a rehearsal of minutes that works on a CPU, where the first two stages skip their tests.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_session}
quick='' stages='' failed=0
for word in "$@"; do
    case $word in
        --quick) quick=$word ;;
        tests | graphs | benchmark | drq_eps) stages="$stages $word" ;;
        *) echo "error: no stage is called $word" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2

drq_eps() {  # compiling takes half a minute, and a run only two
    local short="--total-timesteps 160 --learning-starts 80 --iteration-steps 80 --eval-episodes 1"
    export GAMES=${GAMES:-Breakout Boxing Asterix Seaquest Alien Amidar RoadRunner MsPacman} SEEDS=${SEEDS:-1}
    export RUNS_DIR=$out/runs FLAGS="--no-compile${quick:+ $short}"
    scripts/figure.sh drq_eps > "$out/drq_eps.list" && scripts/sweep.sh --jobs "${JOBS:-4}" "$out/drq_eps.list"
}

stage() {  # name, command
    local start=$SECONDS
    "${@:2}" > "$out/$1.log" 2>&1
    local code=$?
    [ $code = 0 ] || failed=1
    echo "$1: exit code $code, $((SECONDS - start)) s" | tee -a "$out/status.txt"
}

for name in ${stages:-tests graphs benchmark drq_eps}; do
    case $name in
        tests) stage tests pytest -m cuda -k "not graph" ;;
        graphs) stage graphs pytest -m cuda -k graph ;;
        benchmark) stage benchmark python scripts/benchmark.py $quick --output "$out/benchmark" ;;
        drq_eps) stage drq_eps drq_eps ;;
    esac
done
exit $failed
