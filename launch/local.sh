#!/usr/bin/env bash
# Trains on this machine: every argument goes to `python -m jaxtok.train`.
#   launch/local.sh --config=configs/flextok.py --workdir=runs/flextok
#   launch/local.sh --dry-run --config=...      prints the command and does not run it
set -euo pipefail

command=(python -m jaxtok.train)
dry_run=false
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else command+=("$argument"); fi
done

if $dry_run; then
    printf -v line ' %q' "${command[@]}"
    echo "${line:1}"
else
    exec "${command[@]}"
fi
