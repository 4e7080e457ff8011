#!/usr/bin/env bash
# Runs the lines of a list, several at a time; called again it finishes what is left.
#
#   scripts/figure.sh 12 > fig12.list
#   scripts/sweep.sh [--jobs N] [--dry-run | --status] fig12.list
#
# Before the first run starts, the scripts check the arguments of every line: a mistake in one is told, and nothing runs.
# Jobs at a time: one per GPU, of CUDA_VISIBLE_DEVICES if that is set (--jobs 4 on 2 GPUs: two on each); without a GPU
# one per core, of one thread each. Output goes to fig12.list.logs/<line>.log. Ctrl-C and SIGTERM reach the runs, which
# save a checkpoint; lines that fail are named with the error in their log. Exit code: 0 all finished, 1 a line failed, 75
# some were stopped, 2 nothing could be run.

set -uo pipefail
fail() { echo "error: $1" >&2; exit 2; }

jobs='' action=run list='' number=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --jobs) jobs=${2:-}; shift ;;
        --line) number=${2:-}; shift ;;  # what xargs calls
        --dry-run | --status) action=${1#--} ;;
        -*) fail "$1 is no option: sweep.sh [--jobs N] [--dry-run | --status] LIST" ;;
        *) [ -z "$list" ] || fail "one list at a time, not $list and $1"; list=$1 ;;
    esac
    shift
done
[ -f "$list" ] || fail "no list ${list:-was given}: sweep.sh [--jobs N] [--dry-run | --status] LIST"
mapfile -t lines < "$list"
lines=("${lines[@]%$'\r'}")
logs=$list.logs

if [ -n "$number" ]; then
    gpus=($GPUS)
    [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
    exec > "$logs/$number.log" 2>&1  # what bash says of a killed run goes there, too
    bash -c "${lines[number - 1]}"
    printf '%s\n' $? "${lines[number - 1]}" > "$logs/$number.code"
    exit 0
fi

state() {  # of a line, by its number
    local line=${lines[$1 - 1]} runs=runs dir='' code='' of='' wanted=1 finished=0
    [[ $line =~ ^[[:space:]]*(#|$) ]] && return
    [[ $line =~ \ --runs-dir\ ([^\ ]+) ]] && runs=${BASH_REMATCH[1]}
    [[ $line =~ \ --run-name\ ([^\ ]+) ]] && dir=$runs/${BASH_REMATCH[1]}
    [[ $line =~ \ --total-(timesteps|updates)\ ([0-9]+) ]] && wanted=${BASH_REMATCH[2]}
    [ -e "$dir/config.json" ] && [[ $(< "$dir/config.json") =~ \"finished\":\ ([0-9]+) ]] && finished=${BASH_REMATCH[1]}
    [ -e "$logs/$1.code" ] && { read -r code; IFS= read -r of; } < "$logs/$1.code"
    [ "$of" = "$line" ] || code=''  # the list was another then
    if [ "$finished" -ge "$wanted" ] || [ "$dir$code" = 0 ]; then echo "done $1"
    elif [ -e "$dir/lock" ] && ! flock --shared --nonblock "$dir/lock" true; then echo "running $1"
    elif [ -n "$code" ] && [ "$code" != 75 ]; then echo "failed $1"
    else echo "todo $1"; fi
}
look() { states=$(for i in "${!lines[@]}"; do state $((i + 1)); done); }
those() { grep -E "^($1) " <<< "$states" | cut -d' ' -f2; }
count() { those "$1" | wc -l; }
reason() {  # an error's line in a log: one that begins so, or the first in a frame of tyro's, or the last one with letters
    awk '/^([A-Za-z_.]*Error|error): / { why = $0 } framed { gsub(/│/, ""); why = $0 } { framed = /^╭/ }
        /[[:alpha:]]/ { last = $0 } END { print why != "" ? why : last }' "$1" |
        sed -E 's/^ *//; s/ *$//; s/^.*: line [0-9]+: +[0-9]+ ([A-Z][a-z ]*[a-z])  .*/\1/'  # "Killed" without its number
}
summary() { echo "$(count done) done, $(count running) running, $(count failed) failed, $(count todo) to do"; }

GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
[ -z "$GPUS" ] || GPUS=${CUDA_VISIBLE_DEVICES-$GPUS}
gpus=(${GPUS//,/ })
export GPUS="${gpus[*]}"
[ -n "$jobs" ] || jobs=$([ -z "$GPUS" ] && env -u OMP_NUM_THREADS nproc || echo ${#gpus[@]})
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs must be a number from 1, not $jobs"
[ -n "$GPUS" ] || export OMP_NUM_THREADS=1

look
left=$(those "failed|todo")
[ "$action" = status ] || ! grep -q '_softmoe\.py' "$list" ||
    python "$(dirname "$0")/preflight.py" "$list" <<< "$left" || exit 2
case $action in
    status) summary; exit 0 ;;
    dry-run)
        for i in $left; do echo "${lines[i - 1]}"; done
        echo "$(summary); $jobs at a time, ${#gpus[@]} GPUs" >&2
        exit 0 ;;
esac

mkdir -p "$logs" && exec 9> "$logs/lock" || fail "cannot write to $logs"
flock --nonblock 9 || fail "$list is run by another sweep, or $logs is where files cannot be locked"
stopped=''
for i in $left; do rm -f "$logs/$i.code"; done
if [ -n "$left" ]; then
    set -m  # the runs get a process group, to which signals are passed on
    xargs --max-procs="$jobs" --process-slot-var=SLOT --replace bash "$0" --line {} "$list" <<< "$left" 9>&- &
    exec 2> /dev/null  # where bash would tell of jobs that a signal ended
    trap 'stopped=yes; kill -INT -- -$!' INT TERM
    while kill -0 -- -$!; do wait $! || sleep 0.2; done  # xargs goes at once, the runs save
    trap - INT TERM
fi
look
declare -A numbers
for i in $(those failed); do
    why="failed ($(head -n 1 "$logs/$i.code")): $(reason "$logs/$i.log")"
    numbers[$why]=${numbers[$why]:+${numbers[$why]}, }$i
done
for why in "${!numbers[@]}"; do echo "line ${numbers[$why]} $why"; done | sort -n -k 2
summary
[ "$(count failed)" = 0 ] || exit 1
[ "$(count todo)" = 0 ] && [ -z "$stopped" ] || exit 75
