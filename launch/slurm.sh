#!/usr/bin/env bash
#SBATCH --job-name=jaxtok
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on GPUs under SLURM: every argument goes to `python -m jaxtok.train`.
#   sbatch launch/slurm.sh --config=configs/flextok.py:d18_d28 --workdir=/SHARED/run1 --config.mesh.fsdp=8
#   sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh ...     other nodes
#   launch/slurm.sh --dry-run ...       prints the command and does not run it
# One process a GPU, which finds the others by what SLURM tells it. Three minutes before its time ends the run saves and
# stops: submit the same line again, and it goes on. After a preemption SLURM does that itself.
set -euo pipefail

command=(srun --kill-on-bad-exit=1 python -m jaxtok.train)
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
