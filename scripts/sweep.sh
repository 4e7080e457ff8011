#!/usr/bin/env bash
# Runs the lines of a list, several at a time; called again it finishes what is left.
#
#   scripts/fig12_low_data.sh > fig12.txt
#   scripts/sweep.sh [--jobs N] [--dry-run | --status] fig12.txt
#
# Jobs at a time: one per GPU (--jobs 4 on 2 GPUs: two on each), without a GPU one per core, of one thread each. Output
# goes to fig12.txt.logs/<line>.log. Ctrl-C reaches the runs, which save a checkpoint; lines that fail are named with
# the end of their log. Exit code: 0 all finished, 1 a line failed, 75 some were stopped.
set -uo pipefail

finished() { [ -e "$1/config.json" ] && ! grep -q '"finished": 0' "$1/config.json"; }
run_dir() { sed -E 's/.* --runs-dir ([^ ]+).*/\1/' <<< "$1" | tr '\n' /; sed -E 's/.* --run-name ([^ ]+).*/\1/' <<< "$1"; }

state() {  # of a line, by its number
    local dir code=
    dir=$(run_dir "$(sed -n "$1p" "$list")")
    [ -e "$logs/$1.code" ] && code=$(< "$logs/$1.code")
    if finished "$dir"; then echo done
    elif [ -e "$dir/lock" ] && ! flock --nonblock "$dir/lock" true; then echo running
    elif [ -n "$code" ] && [ "$code" != 75 ]; then echo failed
    else echo todo; fi
}

if [ "${1:-}" = --line ]; then  # one line, in a slot of xargs'
    list=$2 logs=$2.logs number=$3
    [ "$GPUS" = 0 ] || export CUDA_VISIBLE_DEVICES=$((SLOT % GPUS))
    bash -c "$(sed -n "${number}p" "$list")" > "$logs/$number.log" 2>&1
    echo $? > "$logs/$number.code"
    exit 0
fi

jobs='' action=run list=''
while [ $# -gt 0 ]; do
    case $1 in
        --jobs) jobs=${2:-}; shift ;;
        --dry-run | --status) action=${1#--} ;;
        *) list=$1 ;;
    esac
    shift
done
[ -f "$list" ] || { echo "error: no list ${list:-was given}; usage: sweep.sh [--jobs N] [--dry-run | --status] LIST" >&2; exit 2; }
logs=$list.logs
GPUS=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
export GPUS
[ "$GPUS" = 0 ] && export OMP_NUM_THREADS=1
[ -n "$jobs" ] || jobs=$([ "$GPUS" = 0 ] && nproc || echo "$GPUS")
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: --jobs must be a number from 1, not $jobs" >&2; exit 2; }

states=$(for number in $(seq "$(wc -l < "$list")"); do echo "$(state "$number") $number"; done)
count() { grep -c "^$1 " <<< "$states"; }
summary() { echo "$(count done) done, $(count running) running, $(count failed) failed, $(count todo) to do, of $(wc -l < "$list")"; }
left=$(grep -E '^(failed|todo) ' <<< "$states" | cut -d' ' -f2)

case $action in
    status) summary; exit 0 ;;
    dry-run)
        for number in $left; do sed -n "${number}p" "$list"; done
        echo "$(summary); $jobs at a time, $GPUS GPUs" >&2
        exit 0 ;;
esac

mkdir -p "$logs"
rm -f "$logs"/*.code
exec 9> "$logs/lock"
flock --nonblock --shared 9  # every run holds it too
stopped=
trap 'stopped=yes' INT TERM
xargs --max-procs="$jobs" --process-slot-var=SLOT --replace bash "$0" --line "$list" {} <<< "$left"
exec 9>&-
until flock "$logs/lock" true; do :; done  # after Ctrl-C xargs is gone, and the runs save
trap - INT TERM
states=$(for number in $(seq "$(wc -l < "$list")"); do echo "$(state "$number") $number"; done)
for number in $(grep '^failed ' <<< "$states" | cut -d' ' -f2); do
    echo "line $number failed ($(< "$logs/$number.code")): $(sed -n "${number}p" "$list")"
    echo "    $(tail -n 1 "$logs/$number.log")"
done
summary
[ "$(count failed)" = 0 ] || exit 1
[ "$(count todo)" = 0 ] && [ -z "$stopped" ] || exit 75
