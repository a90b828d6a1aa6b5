#!/usr/bin/env bash
# Trains on a TPU pod of Google Cloud: every argument goes to `python -m jaxtok.train`.
#   NAME=run1 ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite \
#       launch/tpu.sh --config=configs/flextok.py:d18_d28 --workdir=gs://BUCKET/run1
# Asks for the machines, copies this folder to all of them, installs it, and runs the same command on each. Machines that
# are taken away meanwhile are asked for again, and the run goes on from its newest checkpoint: workdir is in a bucket.
#   SLICES=2        several pods, joined by the data centre's network: take --config.mesh.data=2 (or a multiple)
#   SPOT=true       machines that may be taken away, and cost less
#   SETUP=...       how a machine gets a Python 3.11 in ~/venv
#   PATIENCE=120    seconds after which machines that were taken away show as such
#   --dry-run       prints the commands and runs none
# TYPE and VERSION: cloud.google.com/tpu/docs/runtimes. Delete the machines when the run has ended.
set -euo pipefail
: "${NAME:?a name for the machines}" "${ZONE:?such as us-west4-a}" "${TYPE:?such as v5litepod-256}" "${VERSION:?a runtime}"
slices=${SLICES:-1}
setup=${SETUP:-sudo apt-get install -y python3.11-venv && python3.11 -m venv ~/venv}

arguments=()
dry_run=false
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done

run() {
    if $dry_run; then
        printf -v line ' %q' "$@"
        echo "${line:1}"
    else
        "$@"
    fi
}

tpus() { run gcloud compute tpus queued-resources "$1" "$2" --zone="$ZONE" "${@:3}"; }

everywhere() { tpus ssh "$NAME" --node=all --worker=all --command="$1"; }

state() { gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)"; }

create() {
    local nodes=(--node-id="$NAME") spot=()
    if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$NAME"); fi
    if [ "${SPOT:-false}" = true ]; then spot=(--spot); fi
    tpus create "$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" "${nodes[@]}" ${spot[@]+"${spot[@]}"}
    $dry_run || until [ "$(state)" = ACTIVE ]; do
        if [ "$(state)" = FAILED ]; then
            echo "There are no such machines: see gcloud compute tpus queued-resources describe $NAME." >&2
            exit 1
        fi
        sleep "${PATIENCE:-120}"
    done
    run tar --exclude=.git --exclude=runs -czf /tmp/jaxtok.tgz .
    tpus scp /tmp/jaxtok.tgz "$NAME:" --node=all --worker=all
    everywhere "$setup && mkdir -p jaxtok && tar xzf jaxtok.tgz -C jaxtok && ~/venv/bin/pip install -e './jaxtok[tpu]'"
}

printf -v quoted ' %q' ${arguments[@]+"${arguments[@]}"}
train() { everywhere "cd jaxtok && ~/venv/bin/python -m jaxtok.train --coordinator=auto$quoted"; }

create
until train; do
    sleep "${PATIENCE:-120}"
    if [ "$(state)" = ACTIVE ]; then
        echo "The run failed on machines that are still there: see above, mend it, and delete or reuse $NAME." >&2
        exit 1
    fi
    tpus delete "$NAME" --force --quiet
    create
done
echo "# When done: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
