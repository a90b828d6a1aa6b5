#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet: every argument goes to `python -m jaxtok.train`.
#   NAME=run1 IMAGE=REGISTRY/jaxtok ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16 MACHINES=64 \
#       launch/gke.sh --config=configs/flextok.py:d18_d28 --workdir=gs://BUCKET/run1
# Needs JobSet in the cluster, node pools of that accelerator and topology, and an image with jaxtok[tpu] in it. A machine
# that is taken away restarts the set, and the run goes on from its newest checkpoint.
#   MACHINES        of a slice: its chips by CHIPS, those of a machine (4)
#   SLICES=2        several slices: take --config.mesh.data=2 (or a multiple)
#   RESTARTS=100    how often the set may begin again
#   --dry-run       prints the manifest and applies nothing
set -euo pipefail
: "${NAME:?a name for the set}" "${IMAGE:?a container image}" "${ACCELERATOR:?as the node pool says}"
: "${TOPOLOGY:?such as 16x16}" "${MACHINES:?how many a slice has}"

arguments=()
dry_run=false
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done

quoted=""
for argument in ${arguments[@]+"${arguments[@]}"}; do quoted+=", '${argument//\'/\'\'}'"; done

manifest=$(
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $MACHINES
        completions: $MACHINES
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: train
              image: $IMAGE
              command: [python, -m, jaxtok.train$quoted]
              ports:
              - containerPort: 8471
              - containerPort: 8080
              securityContext:
                privileged: true
              resources:
                limits:
                  google.com/tpu: ${CHIPS:-4}
YAML
)

if $dry_run; then
    echo "kubectl apply -f - <<YAML"
    echo "$manifest"
    echo "YAML"
else
    kubectl apply -f - <<<"$manifest"
fi
