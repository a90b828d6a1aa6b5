#!/usr/bin/env bash
# Trains on this machine: every argument goes to `python -m jaxtok.train`.
#   launch/local.sh --config=configs/flextok.py --workdir=runs/flextok
#   PROCESSES=2 launch/local.sh ...     as several processes, as a pod would; PORT=29400 is where they meet
#   launch/local.sh --dry-run ...       prints the commands and runs none
set -euo pipefail
processes=${PROCESSES:-1} port=${PORT:-29400}

command=(python -m jaxtok.train)
dry_run=false
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else command+=("$argument"); fi
done

show() {
    printf -v line ' %q' "$@"
    echo "${line:1}"
}

if [ "$processes" = 1 ]; then
    if $dry_run; then show "${command[@]}"; else exec "${command[@]}"; fi
    exit
fi

set -m # in groups of their own, so that Ctrl-C comes to them once, through the trap: a second signal would end them
started=()
trap '[ ${#started[@]} = 0 ] || kill "${started[@]}" 2>/dev/null || true' TERM INT # all save one step, and stop
for ((i = 0; i < processes; i++)); do
    one=("${command[@]}" "--coordinator=localhost:$port" "--processes=$processes" "--process=$i")
    if $dry_run; then
        show "${one[@]}"
    else
        "${one[@]}" &
        started+=($!)
    fi
done
status=0
for process in ${started[@]+"${started[@]}"}; do
    wait "$process" || { wait "$process" || status=$?; } # again, if a signal cut the first short
done
exit "$status"
