#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk made: every argument goes to `python -m jaxtok.train`.
#   CLUSTER=pods NAME=run1 IMAGE=REGISTRY/jaxtok TYPE=v5litepod-256 \
#       launch/xpk.sh --config=configs/flextok.py:d18_d28 --workdir=gs://BUCKET/run1
#   SLICES=2        several slices: take --config.mesh.data=2 (or a multiple)
#   RESTARTS=100    how often the run may begin again, each time from its newest checkpoint
#   --dry-run       prints the command and does not run it
set -euo pipefail
: "${CLUSTER:?of xpk}" "${NAME:?a name for the run}" "${IMAGE:?with jaxtok[tpu] in it}" "${TYPE:?such as v5litepod-256}"

arguments=()
dry_run=false
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done

printf -v quoted ' %q' python -m jaxtok.train ${arguments[@]+"${arguments[@]}"}
command=(
    xpk workload create --cluster="$CLUSTER" --workload="$NAME" --docker-image="$IMAGE" --tpu-type="$TYPE"
    --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-100}" --command="${quoted:1}"
)
if $dry_run; then
    printf -v line ' %q' "${command[@]}"
    echo "${line:1}"
else
    exec "${command[@]}"
fi
