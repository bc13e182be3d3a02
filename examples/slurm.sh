#!/usr/bin/env bash
# Two nodes of four GPUs: DATA=/scratch/data sbatch examples/slurm.sh
#
# Two minutes before the time is over Slurm sends SIGTERM: the run saves the step it stands at. Submitted again,
# or put back into the queue when a node fails, it goes on from there, in the middle of an epoch.
#SBATCH --job-name=revseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

out=runs/cityscapes
resume=()
if [ -e "$out/last.pt" ]; then resume=(--resume); fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m revseg train --data cityscapes --root "$DATA/cityscapes" --size 1024 2048 \
  --batch 4 --precision bfloat16 --out "$out" "${resume[@]}"
