#!/bin/bash
# A Slurm job that goes on until it is finished, however often it is interrupted:
#   sbatch --nodes=2 accelerate_configs/slurm.sh --annotations ann --recipe cifar100 --output_dir runs/a
# Words after the file's name go to train_coreg.py; sbatch's own options before it win over those below. Where the package is
# installed without a checkout, `python -m coreg.scripts slurm.sh` prints the place of this file.
#SBATCH --job-name=coreg
#SBATCH --nodes=1
# a task for each GPU; all tasks of a node see all of its GPUs and take the one of their local rank
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# five minutes before the time is up every task gets SIGUSR1, writes a checkpoint and ends with exit code 75
#SBATCH --signal=USR1@300
# lets Slurm put a preempted job back into the queue, and this script itself
#SBATCH --requeue
# all attempts write into one log
#SBATCH --open-mode=append
set -u

interrupted=75
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# jobs that share a node need different ports
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Slurm starts the processes itself: a launcher in between would swallow the signal and the exit code
srun --kill-on-bad-exit=0 --wait=60 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task "${PYTHON:-python}" -m train_coreg "$@"
code=$?
if [ "$code" -eq "$interrupted" ]; then
    echo "interrupted with a checkpoint; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
