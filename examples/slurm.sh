#!/usr/bin/env bash
# Trains on a Slurm cluster, on one node or several. When the job's time is up it goes back into the queue, and goes on.
#
#   sbatch examples/slurm.sh                            # one node with 4 GPUs
#   sbatch --nodes 2 examples/slurm.sh --epochs 150     # two such nodes; options of train.py follow
#
#SBATCH --job-name=iclevr-ddpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Two minutes before the end Slurm sends USR1 to all tasks. train.py saves a checkpoint and exits with 0. As long as the
# run is not finished the job is requeued, and the same command goes on from the checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
out=${OUT:-runs/slurm}
mkdir -p "$(dirname "$out")"

# What torch.distributed wants to know, of the whole job and of each task.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train.py "$@"' task --out "$out" "$@" |
    tee "$out.txt"

# What train.py prints last: in a run that ended now, and in one that had ended before.
if ! grep -q -e "trained to step" -e "was finished" "$out.txt"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
