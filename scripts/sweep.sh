#!/usr/bin/env bash
# Runs the commands of a list, several at a time. Called again, it finishes what is left.
#
#   scripts/figure.sh 12 > fig12.list
#   scripts/sweep.sh [--jobs N] [--dry-run | --status] fig12.list
#
# The arguments of every line are checked before the first run starts. If a line has a mistake, nothing runs.
# One run at a time is started on each GPU (of CUDA_VISIBLE_DEVICES, if that is set). Without a GPU, one run with one
# thread is started on each core. --jobs changes the number: --jobs 4 on 2 GPUs puts two runs on each. The output of line
# N goes to fig12.list.logs/N.log. Ctrl-C, SIGTERM and SIGHUP (a lost connection) stop the runs with SIGTERM, and they
# save a checkpoint. At the end, the lines that failed are listed with the error in their log.
# Exit codes: 0: all lines are finished. 1: a line failed. 75: some were stopped or are running elsewhere. 2: nothing
# could be run.

set -uo pipefail
fail() { echo "error: $1" >&2; exit 2; }

jobs='' action=run list='' number=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --jobs) jobs=${2:-}; shift ;;
        --line) number=${2:-}; shift ;;  # xargs below calls this script so, once per line
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
    exec > "$logs/$number.log" 2>&1  # bash reports there if a run was killed
    bash -c "${lines[number - 1]}"
    printf '%s\n' $? "${lines[number - 1]}" > "$logs/$number.code"
    exit 0
fi

state() {  # prints "done", "running", "failed" or "todo" and the number of the line
    local line=${lines[$1 - 1]} runs=runs dir='' code='' of='' wanted=1 finished=0
    [[ $line =~ ^[[:space:]]*(#|$) ]] && return
    [[ $line =~ \ --runs-dir\ ([^\ ]+) ]] && runs=${BASH_REMATCH[1]}
    [[ $line =~ \ --run-name\ ([^\ ]+) ]] && dir=$runs/${BASH_REMATCH[1]}
    [[ $line =~ \ --total-(timesteps|updates)\ ([0-9]+) ]] && wanted=${BASH_REMATCH[2]}
    [ -e "$dir/config.json" ] && [[ $(< "$dir/config.json") =~ \"finished\":\ ([0-9]+) ]] && finished=${BASH_REMATCH[1]}
    [ -e "$logs/$1.code" ] && { read -r code; IFS= read -r of; } < "$logs/$1.code"
    [ "$of" = "$line" ] || code=''  # the code is of another line: the list has changed
    if [ "$finished" -ge "$wanted" ] || [ "$dir$code" = 0 ]; then echo "done $1"
    elif [ -e "$dir/lock" ] && ! flock --shared --nonblock "$dir/lock" true; then echo "running $1"
    elif [ -n "$code" ] && [ "$code" != 75 ]; then echo "failed $1"
    else echo "todo $1"; fi
}
update_states() { states=$(for i in "${!lines[@]}"; do state $((i + 1)); done); }
lines_in() { grep -E "^($1) " <<< "$states" | cut -d' ' -f2; }
count() { lines_in "$1" | wc -l; }
reason() {  # prints the error in a log: a line that begins with "error", else the first in tyro's frame, else the last one
    awk '/^([A-Za-z_.]*Error|error): / { why = $0 } framed { gsub(/│/, ""); why = $0 } { framed = /^╭/ }
        /[[:alpha:]]/ { last = $0 } END { print why != "" ? why : last }' "$1" |
        sed -E 's/^ *//; s/ *$//; s/^.*: line [0-9]+: +[0-9]+ ([A-Z][a-z ]*[a-z])  .*/\1/'  # "Killed", without the number of the process
}
summary() { echo "$(count done) done, $(count running) running, $(count failed) failed, $(count todo) to do"; }

GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null) || GPUS=''
[ -z "$GPUS" ] || GPUS=${CUDA_VISIBLE_DEVICES-$GPUS}
gpus=(${GPUS//,/ })
export GPUS="${gpus[*]}"
[ -n "$jobs" ] || jobs=$([ -z "$GPUS" ] && env -u OMP_NUM_THREADS nproc || echo ${#gpus[@]})
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs must be a number from 1, not $jobs"
[ -n "$GPUS" ] || export OMP_NUM_THREADS=1

update_states
[ "$action" != status ] || { summary; exit 0; }
left=$(lines_in "failed|todo")
! grep -q '_softmoe\.py' "$list" || python "$(dirname "$0")/preflight.py" "$list" <<< "$left" || exit 2
if [ "$action" = dry-run ]; then
    for i in $left; do echo "${lines[i - 1]}"; done
    echo "$(summary); $jobs at a time, ${#gpus[@]} GPUs" >&2
    exit 0
fi

mkdir -p "$logs" && exec 9> "$logs/lock" || fail "cannot write to $logs"
flock --nonblock 9 || fail "$list is run by another sweep, or $logs is where files cannot be locked"
stopped=''
for i in $left; do rm -f "$logs/$i.code"; done
if [ -n "$left" ]; then
    set -m  # the runs get a process group of their own, to which the trap passes signals on
    xargs --max-procs="$jobs" --process-slot-var=SLOT --replace bash "$0" --line {} "$list" <<< "$left" 9>&- &
    exec 2> /dev/null  # bash would report the jobs that a signal ended
    trap 'stopped=yes; kill -TERM -- -$!' INT TERM HUP
    while kill -0 -- -$!; do wait $! || sleep 0.2; done  # xargs ends at once, and the runs are still saving
    trap - INT TERM HUP
fi
update_states
declare -A numbers
for i in $(lines_in failed); do
    why="failed ($(head -n 1 "$logs/$i.code")): $(reason "$logs/$i.log")"
    numbers[$why]=${numbers[$why]:+${numbers[$why]}, }$i
done
for why in "${!numbers[@]}"; do echo "line ${numbers[$why]} $why"; done | sort -n -k 2
summary
[ "$(count failed)" = 0 ] || exit 1
[ "$(count "running|todo")" = 0 ] && [ -z "$stopped" ] || exit 75
